"""Float32 linear layers on a CPU by the library that is faster there, where it is as exact; and attention that uses it.

PyTorch sends float32 products to MKL, which runs at half speed on processors that aren't Intel's, unless it is told
that less precision will do: then they go to oneDNN. What oneDNN makes of that leave depends on the processor: with
bfloat16 matrix units (AMX) it takes it, elsewhere it computes in float32 as before. So the error is measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward


# Of a product's largest value. Float32 gives about 1e-6, TF32 5e-4, bfloat16 4e-3.
MAX_ERROR = 1e-5


# What PyTorch's setting was before each block that is running, in any thread: there is one setting for the process.
_settings: list[str] = []
_lock = Lock()


@contextmanager
def fast_linear(device: torch.device | str) -> Iterator[None]:
    """
    Within the block, float32 matrix products on the CPU are computed by oneDNN, if a measurement of its error (once in
    a process, a few milliseconds) finds it as exact as float32. Results differ by float32's rounding only.

    PyTorch's setting for it, `torch.backends.mkldnn.matmul.fp32_precision`, belongs to the process: other threads have
    it too, meanwhile. When all have left such blocks it is what it was.

    Args:
        device: the model's. The block changes nothing unless it is the CPU.
    """
    if torch.device(device).type != "cpu" or not is_exact():
        yield
        return
    with _lock:
        _settings.append(_set_precision("bf16"))
    try:
        yield
    finally:
        with _lock:
            _set_precision(_settings.pop())


@contextmanager
def small_products() -> Iterator[None]:
    """
    Within a block of [`fast_linear`], PyTorch's own choice again: for attention among few tokens, whose products are so
    small that oneDNN takes three times as long, most of it to start.
    """
    with _lock:
        setting = _set_precision(_settings[0]) if _settings else None
    try:
        yield
    finally:
        with _lock:
            if setting is not None and _settings:  # else all have left their blocks, in other threads
                _set_precision(setting)


def attention_function(implementation: str) -> Callable[..., Any]:
    """
    Transformers' attention function of this name. "sdpa" computes half precision in float32 on a CPU without matrix
    units for it, where PyTorch's kernel takes 1.5 to 1.8 times as long in bfloat16; that is more exact, too. Not so
    where gradients are kept, which would take twice the memory, under autocast, and when compiled.
    """
    return _sdpa if implementation == "sdpa" else _named(implementation)


def _named(implementation: str) -> Callable[..., Any]:
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    dtype = _attention_dtype(query)
    states = (query.to(dtype), key.to(dtype), value.to(dtype))
    output, _ = _named("sdpa")(module, *states, attention_mask, **kwargs)
    return output.to(query.dtype), None


def _attention_dtype(states: torch.Tensor) -> torch.dtype:
    if states.device.type != "cpu" or states.dtype not in (torch.bfloat16, torch.float16):
        return states.dtype
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return states.dtype
    return torch.float32 if is_exact() else states.dtype


@cache
def is_exact() -> bool:
    """Whether oneDNN, allowed to use less, computes float32 products in float32 on this processor."""
    return torch.backends.mkldnn.is_available() and measure_error() <= MAX_ERROR


@torch.autocast("cpu", enabled=False)
@torch.inference_mode()
def measure_error() -> float:
    """The largest error of oneDNN's products when it may use less than float32, each in terms of its largest value."""
    generator = torch.Generator().manual_seed(0)
    expected = _products(generator, torch.float64)
    generator.manual_seed(0)
    with _lock:
        setting = _set_precision("bf16")
        try:
            got = _products(generator, torch.float32)
        finally:
            _set_precision(setting)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected))


def _products(generator: torch.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    """A product of each kind: linear layer, batch of matrices, and transposed matrices as in a backward pass."""
    shapes = ((2, 160, 512), (2, 512, 160), (768, 512), (768,))
    inputs, others, weight, bias = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    return [F.linear(inputs, weight, bias), inputs @ others, inputs[0].T @ inputs[1]]


def _set_precision(setting: str) -> str:
    """Sets what oneDNN may compute float32 matrix products in, and returns what it was."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # the module puts an object in its own place
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    return before
