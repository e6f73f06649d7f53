"""What the operator tests share: memory layouts to feed, settings to run under, and comparison with float64
references."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from wsss_ops import _backend, _columns, set_workspace_limit

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _sliced(x: Tensor) -> Tensor:
    """The middle of a larger tensor: odd strides, storage offset, addresses aligned to one element only."""
    larger = torch.full([size + 3 for size in x.shape], 7.0).to(x)
    view = larger[tuple(slice(1, size + 1) for size in x.shape)]
    return view.copy_(x)


def _sliced_channels_last(x: Tensor) -> Tensor:
    return _sliced(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _transposed(x: Tensor) -> Tensor:
    """Pixels of a row far apart, columns dense."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _stepped(x: Tensor) -> Tensor:
    """Every second pixel of a row."""
    larger = torch.full([*x.shape[:3], 2 * x.shape[3]], 7.0).to(x)
    return larger[..., ::2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "transposed": _transposed,
    "stepped": _stepped,
    "expanded": lambda x: x[:1].expand(x.shape) if x.shape[0] > 0 else x,
}


def values(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, never zero, of any real dtype."""
    if dtype == torch.bool:
        return torch.rand(*shape, device=device) < 0.5
    if dtype.is_floating_point:
        return torch.randn(*shape, dtype=torch.float64, device=device).add_(3).to(dtype)
    return torch.randint(1, 100, tuple(shape), device=device).to(dtype)


def untouched(numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is reserved but not poisoned: far more than the machine has costs nothing until it is written."""
    poison = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(numbers, dtype=dtype, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = poison


@contextmanager
def instruction_set(level: str) -> Iterator[None]:
    """The CPU backend computes with one of its instruction sets."""
    module = _backend.cpu_module()
    before = module.level()
    module.set_level(level)
    try:
        yield
    finally:
        module.set_level(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, and with it the CPU backend, computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workspace(nbytes: int) -> Iterator[None]:
    """deform_conv2d holds so many bytes of columns at once."""
    before = _columns._workspace
    set_workspace_limit(nbytes)
    try:
        yield
    finally:
        set_workspace_limit(before)


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the CPU wait for a GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def in_threads(work: Callable[[], None]) -> None:
    """Calls work in four Python threads at once, and raises what it raises in any of them."""
    count = 4
    together = threading.Barrier(count)

    def start() -> None:
        together.wait()
        work()

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(start) for _ in range(count)]:
            future.result()


def gradient(output: Tensor, source: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(output, source, grad)[0]


def short_name(value: object) -> str | None:
    """A test's id of a dtype or a shape; None leaves other values to pytest."""
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, tuple)) else None


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in float64; infinite where got is not finite but expected is."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"shape {list(got.shape)} for {list(expected.shape)}"
    if not torch.equal(got.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    return float((got[finite] - expected[finite]).norm() / expected[finite].norm().clamp_min(1e-300))
