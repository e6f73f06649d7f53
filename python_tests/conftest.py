"""The backends that every operator test runs on, and memory that is never zero by accident."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from wsss_ops import _backend

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """wsss_ops._emulated: the text of every cuda.cu compiled for the CPU, built here because users do not need it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--emulated"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"building wsss_ops._emulated failed:\n{built.stdout}{built.stderr}"
    return importlib.import_module("wsss_ops._emulated")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test's tensors live; for `emulated` CPU tensors are handed to the CUDA kernels' emulation."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; the same case runs on cpu and emulated")
        assert _backend.cuda_module() is not None, _backend.missing_cuda()
        yield torch.device("cuda")
    elif request.param == "emulated":
        with _backend.use_module(request.getfixturevalue("emulated_module")):
            yield torch.device("cpu")
    else:
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and largest integers, so an output that is not written whole is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
