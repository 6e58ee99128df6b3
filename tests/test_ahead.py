"""Work on the next items while the caller is at work on one."""

import threading

import pytest

from san_hf.ahead import run_ahead


@pytest.mark.parametrize("count", [0, 1, 3])
def test_never_more_than_so_many_ahead(count):
    """Catches items that are all begun at once, another order, and an item that is left out."""
    begun, taken, most = [], 0, 0

    def double(item):
        begun.append(item)
        return 2 * item

    def items():
        for item in range(9):
            nonlocal most
            most = max(most, item + 1 - taken)
            yield item

    results = []
    for item, future in run_ahead(double, items(), count):
        taken += 1
        results.append((item, future.result()))
    assert results == [(item, 2 * item) for item in range(9)] and begun == list(range(9))
    assert most == count + 1


def test_it_is_done_beside_the_caller():
    """Catches work that begins only when its result is asked for: the caller waits for the second item, with the first
    one's result in hand."""
    second = threading.Event()
    work = run_ahead(lambda item: second.set() if item == 1 else None, range(3), 1)
    assert next(work)[0] == 0
    assert second.wait(timeout=60)
    assert [item for item, _ in work] == [1, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_are_of_their_item(error):
    """Catches an error of one item that ends the others, or that nobody hears of."""

    def fail(item):
        if item == 1:
            raise error("no")
        return item

    for item, future in run_ahead(fail, range(3), 1):
        if item == 1:
            with pytest.raises(error, match="no"):
                future.result()
        else:
            assert future.result() == item


def test_a_caller_that_stops():
    """Catches work that goes on for nobody, and a thread that is left behind."""
    begun, threads = [], threading.active_count()
    work = run_ahead(begun.append, range(100), 2)
    next(work)
    work.close()
    assert len(begun) <= 3 and threading.active_count() == threads
