"""The scope in which float32 products go to another library: exact, and nothing of it is left behind."""

import threading

import pytest
import torch

from san_hf.modeling import fast_linear_san
from san_hf.modeling.fast_linear_san import MAX_ERROR, fast_linear, is_exact, small_products
from tests.tiny import segmenting_model


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing measured before this test nor left to the next."""
    is_exact.cache_clear()
    yield
    is_exact.cache_clear()


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(fast_linear_san, "measure_error", lambda: MAX_ERROR / 10)


def test_setting_is_what_it_was_afterwards(exact):
    """A global flag left set behind a library's user: after an error, nested blocks, over one of the user's own."""
    before = setting()
    with pytest.raises(KeyError), fast_linear("cpu"):
        assert setting() == "bf16"
        with fast_linear(torch.device("cpu")):
            assert setting() == "bf16"
        assert setting() == "bf16"
        raise KeyError
    assert setting() == before
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        with fast_linear("cpu"):
            assert setting() == "bf16"
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_overlapping_blocks_of_two_threads(exact):
    """The one that entered first and leaves first takes the setting away from the other; the last leaves it set."""
    before = setting()
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fast_linear("cpu"):
            entered.set()
            leave.wait()

    with fast_linear("cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
    assert setting() == "bf16"
    leave.set()
    thread.join()
    assert setting() == before


def test_small_products_within(exact):
    """Attention of few tokens by the library that is slow at it; or the setting left behind when a block of another
    thread ends meanwhile."""
    before = setting()
    with small_products():
        assert setting() == before
    with fast_linear("cpu"):
        with small_products():
            assert setting() == before
        assert setting() == "bf16"
    block, small = fast_linear("cpu"), small_products()
    block.__enter__()
    small.__enter__()
    block.__exit__(None, None, None)
    small.__exit__(None, None, None)
    assert setting() == before


@pytest.mark.parametrize("error", [4e-3, 5e-4, float("nan")])
def test_less_than_float32_is_refused(error, monkeypatch):
    """A processor with bfloat16 matrix units, on which the same setting gives bfloat16's results; measured once."""
    measured = []
    monkeypatch.setattr(fast_linear_san, "measure_error", lambda: measured.append(1) or error)
    before = setting()
    for _ in range(2):
        with fast_linear("cpu"):
            assert setting() == before
    assert len(measured) == 1


def test_other_devices_and_builds_are_left_alone(exact, monkeypatch):
    before = setting()
    with fast_linear("cuda"), fast_linear(torch.device("meta")):
        assert setting() == before
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with fast_linear("cpu"):
        assert setting() == before


def test_measurement_sees_bfloat16(monkeypatch):
    """A measurement that compares a product with itself, or leaves its own setting behind."""
    before, linear = setting(), torch.nn.functional.linear

    def reduced(inputs, weight, bias):
        if inputs.dtype == torch.float32:
            inputs, weight, bias = inputs.bfloat16().float(), weight.bfloat16().float(), bias.bfloat16().float()
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", reduced)
    assert 1e-3 < fast_linear_san.measure_error() < 1e-1 and setting() == before
    assert not is_exact()


def test_measurement_does_not_depend_on_its_caller():
    """Autocast, or another default device, around the first block of a process: refused for good, or an error."""
    expected = fast_linear_san.measure_error()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert fast_linear_san.measure_error() == expected


@torch.no_grad()
def test_results_are_float32_s():
    """Whatever the processor: within the block a product is as exact as outside."""
    inputs, weight = torch.randn(300, 256), torch.randn(512, 256)
    expected = inputs.double() @ weight.double().T
    with fast_linear("cpu"):
        got = torch.nn.functional.linear(inputs, weight)
    assert (got - expected).abs().max() / expected.abs().max() <= MAX_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision(exact, dtype, monkeypatch):
    """Catches attention that stays in half precision where float32 is faster, or float32 where it costs memory."""
    model = segmenting_model().to(dtype)
    attended = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is None:  # recognition's is small
            attended.append(query.dtype)
        return inner(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)

    def dtypes_of_attention():
        attended.clear()
        assert model.encode_images(pixels).masks_queries_logits.dtype == dtype
        assert len(attended) >= model.config.num_hidden_layers + model.config.recognition_layer
        return set(attended)

    with torch.inference_mode():
        assert dtypes_of_attention() == {torch.float32}
        monkeypatch.setattr(fast_linear_san, "measure_error", lambda: 1e-2)
        is_exact.cache_clear()
        assert dtypes_of_attention() == {dtype}
    is_exact.cache_clear()
    monkeypatch.setattr(fast_linear_san, "measure_error", lambda: MAX_ERROR / 10)
    assert dtypes_of_attention() == {dtype}
