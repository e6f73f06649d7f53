"""Choosing a backend: instruction sets, what is said where CUDA is missing, and the build's own promises."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from harness import instruction_set, threads, values

from wsss_ops import _backend, patch_merge, patch_split, reference


@pytest.mark.parametrize("level", _backend.cpu_module().levels())
def test_every_instruction_set(level: str) -> None:
    with instruction_set(level):
        assert _backend.cpu_module().level() == level
        for width in range(1, 200, 7):  # every way to copy a row
            x = values((2, 3, 3, width), torch.uint8, torch.device("cpu"))
            patches = patch_split(x, (2, 2))
            assert torch.equal(patches, reference.patch_split(x, (2, 2)))
            assert torch.equal(patch_merge(patches, (2, 2), (3, width)), x)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r'"x87" is not one this processor can run: \w+'):
        _backend.cpu_module().set_level("x87")


def test_one_and_many_threads_agree() -> None:
    x = values((3, 7, 33, 65), torch.float32, torch.device("cpu"))
    for count in (1, 2, 5):
        with threads(count):
            assert torch.equal(patch_split(x, (4, 4)), reference.patch_split(x, (4, 4)))


def test_shares_the_openmp_runtime_of_torch() -> None:
    """Two runtimes would keep two pools of threads that spin against each other."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


def test_cuda_tensor_without_cuda_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_cuda", None)
    with pytest.raises(RuntimeError, match=r"without its CUDA backend.*nvcc.*WSSS_OPS_CUDA=1 pip install"):
        _backend.call("patch_split", torch.device("cuda", 0))


def test_device_without_backend() -> None:
    with pytest.raises(RuntimeError, match="no backend for tensors on xpu:0: it has cpu and cuda"):
        _backend.call("patch_split", torch.device("xpu", 0))


def test_missing_cpu_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wsss_ops._cpu", None)
    with pytest.raises(ImportError, match=r"wsss_ops._cpu, the compiled part .* cannot be loaded .*pip install"):
        runpy.run_module("wsss_ops._backend")


def test_imports_beside_the_checkout(tmp_path: Path) -> None:
    """A folder named wsss_ops in the current directory, as the checkout is in its parent, does not hide the package."""
    (tmp_path / "wsss_ops").mkdir()
    program = "import wsss_ops, wsss_ops.bench.runner; print(wsss_ops.patch_split.__name__)"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == "patch_split\n", result.stderr


def setup_fails(**environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    return result.stderr


def test_build_settings_are_checked(tmp_path: Path) -> None:
    assert "WSSS_OPS_CUDA must be 0, 1 or unset, got 'yes'" in setup_fails(WSSS_OPS_CUDA="yes")
    assert "nvcc was not found under CUDA_HOME" in setup_fails(WSSS_OPS_CUDA="1", CUDA_HOME=str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_80 compute_90\n")
    nvcc.chmod(0o755)
    cuda = {"WSSS_OPS_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    assert "'Hopper' is not of the form 9.0" in setup_fails(**cuda, TORCH_CUDA_ARCH_LIST="Hopper")
    assert "can compile for none of 5.0" in setup_fails(**cuda, TORCH_CUDA_ARCH_LIST="5.0")


def test_no_symbol_is_shared_between_instruction_sets() -> None:
    """A weak function in two levels' objects would be linked once, perhaps from the level the processor lacks."""
    objects = sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag}-*/x86_64*/*.o"))
    if not objects:
        pytest.skip("needs the objects of several instruction sets, which a build in this folder leaves in build/")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.match(r"[0-9a-f]* *[Wu] ", line)]
        assert weak == [], f"{path.name} of {path.parent.name}"
