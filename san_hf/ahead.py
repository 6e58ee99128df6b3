"""Work on the next items while the caller is at work on one: in order, and never more than so many ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """
    Calls a function on items, one after the other, in a thread of its own.

    Args:
        function: of one item.
        items: read as they are needed.
        count: of the items that are worked on, or done and waiting, beside the one that the caller has.

    Yields:
        Items in their order, each with the future of its result, which raises what the function raised. When the
        caller stops, what hasn't begun doesn't begin, and what has begun is waited for.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        for item in items:
            pending.append((item, executor.submit(function, item)))
            if len(pending) > count:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        executor.shutdown(cancel_futures=True)
