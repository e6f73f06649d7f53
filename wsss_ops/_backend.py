"""Picks the compiled module for a tensor's device, and explains what is missing and how to get it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # before the modules: they then share the OpenMP runtime that torch brings

REBUILD = "pip install --no-deps --force-reinstall -e ."


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    try:
        return importlib.import_module(f"wsss_ops.{name}"), ""
    except ImportError as error:
        return None, str(error)


_cpu, _cpu_error = _load("_cpu")
_cuda, _cuda_error = _load("_cuda")
if _cpu is None:
    raise ImportError(
        f"wsss_ops._cpu, the compiled part of wsss_ops, cannot be loaded ({_cpu_error}). Build it in the "
        f"checkout's folder for this interpreter: {REBUILD}"
    )
# What runs operations on CPU tensors: tests put the emulated CUDA backend in its place (use_module).
_on_cpu: ModuleType = _cpu


def cpu_module() -> ModuleType:
    """The module that runs operations on CPU tensors."""
    return _on_cpu


def cuda_module() -> ModuleType | None:
    """The CUDA module, or None where it was not built (missing_cuda says more)."""
    return _cuda


def missing_cuda() -> str:
    """What keeps CUDA tensors from working, with the command that mends it; empty where nothing does."""
    if _cuda is None:
        return (
            f"wsss_ops was installed without its CUDA backend ({_cuda_error}). With the CUDA toolkit (nvcc, 12.6 or "
            "later) on this machine, build again in the checkout's folder: CUDA_HOME=/usr/local/cuda WSSS_OPS_CUDA=1 "
            f"{REBUILD}"
        )
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch (pytorch.org names the "
            "command for each CUDA version); wsss_ops need not be built again"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU: nvidia-smi tells whether the driver does"
    return ""


def module_for(device: torch.device) -> ModuleType:
    """The module that runs operations on tensors of `device`; RuntimeError where there is none."""
    if device.type == "cpu":
        return _on_cpu
    if device.type != "cuda":
        raise RuntimeError(f"wsss_ops has no backend for tensors on {device}: it has cpu and cuda")
    if _cuda is None:
        raise RuntimeError(missing_cuda())
    return _cuda


def call(operation: str, device: torch.device, *arguments: Any) -> None:
    """Runs an operation of the compiled module for `device`, on PyTorch's current stream or with its threads."""
    module = module_for(device)
    where = torch.get_num_threads() if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    getattr(module, operation)(*arguments, where)


def offers(device: torch.device, operation: str) -> bool:
    """Whether the module for `device` has an operation that not every backend needs."""
    return hasattr(_on_cpu if device.type == "cpu" else _cuda, operation)


@contextmanager
def use_module(module: ModuleType) -> Iterator[None]:
    """Runs operations on CPU tensors by another module, for tests."""
    global _on_cpu
    before, _on_cpu = _on_cpu, module
    try:
        yield
    finally:
        _on_cpu = before
