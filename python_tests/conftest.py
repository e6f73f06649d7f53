"""The backends that every operator test runs on, and memory that is never zero by accident.

WSSS_EMULATION_SEED=number draws the schedules of the emulated kernels: in which order blocks, warps and lanes run. Each
run of the tests takes another seed unless this says which, and prints it; a failure with it is one to repeat.

WSSS_TESTS_SECONDS=number ends a run after so long, with a report of what has run. WSSS_TESTS_UNFILLED=1 leaves new
memory as it is, for compute-sanitizer's initcheck, which looks for reads of what nobody has written.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from selftest import ROOT, Selftest, load

from wsss_ops import _backend

SEED = "WSSS_EMULATION_SEED"
UNDER_ADDRESS_SANITIZER = "libasan" in Path("/proc/self/maps").read_text()
END = time.monotonic() + float(os.environ.get("WSSS_TESTS_SECONDS", "inf"))
UNFILLED = os.environ.get("WSSS_TESTS_UNFILLED") == "1"


def pytest_configure(config: pytest.Config) -> None:
    seed = os.environ.setdefault(SEED, str(secrets.randbelow(2**32)))  # for processes that tests start, too
    if not seed.isdecimal() or int(seed) >= 2**64:
        raise pytest.UsageError(f"{SEED} must be a number below 2^64, got {seed!r}")
    if UNDER_ADDRESS_SANITIZER:
        # It ends the process with its report, which is lost where pytest has redirected stderr: here it has not yet.
        ctypes.CDLL(None).__sanitizer_set_report_fd(ctypes.c_void_p(os.dup(2)))


def pytest_runtest_setup() -> None:
    if time.monotonic() > END:
        pytest.exit("the seconds of WSSS_TESTS_SECONDS are over", returncode=1)


def pytest_report_header() -> str:
    return f"schedules of emulated kernels: {SEED}={os.environ[SEED]}"


@pytest.fixture
def emulation_seed(request: pytest.FixtureRequest) -> int:
    """The seed of all schedules, shown with the test should it fail."""
    request.node.add_report_section("setup", "emulated kernels", f"{SEED}={os.environ[SEED]} repeats their schedules")
    return int(os.environ[SEED])


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The text of every cuda.cu compiled for the CPU, built here because users do not need it."""
    variant = "sanitized" if UNDER_ADDRESS_SANITIZER else "emulated"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"--{variant}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"building the emulated backend failed:\n{built.stdout}{built.stderr}"
    return importlib.import_module("wsss_ops._emulated" if variant == "emulated" else "wsss_ops._emulated_sanitized")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test's tensors live; for `emulated` CPU tensors are handed to the CUDA kernels' emulation."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; the same case runs on cpu and emulated")
        assert _backend.cuda_module() is not None, _backend.missing_cuda()
        yield torch.device("cuda")
    elif request.param == "emulated":
        module = request.getfixturevalue("emulated_module")
        module.set_seed(request.getfixturevalue("emulation_seed"))
        with _backend.use_module(module):
            yield torch.device("cpu")
    else:
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and largest integers, so an output that is not written whole is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = not UNFILLED
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """On a GPU PyTorch's convolutions would have 11 bits, rounded differently in each memory format."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def selftest(emulation_seed: int) -> Selftest:
    """The emulation's own kernels, with the checks that this run has."""
    functions = load("sanitized" if UNDER_ADDRESS_SANITIZER else "checked")
    functions("set_seed", emulation_seed)
    return functions
