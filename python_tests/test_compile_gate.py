"""The gate of .ci/compile_kernels.py: what lets a kernel pass, and what does not."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from selftest import ROOT

GATE = ROOT / ".ci" / "compile_kernels.py"
UNNAMED = "_GLOBAL__N__486e9c4e_7_cuda_cu_39c22f22"  # as nvcc calls an unnamed namespace
MODES = f"_ZN4wsss6deform{len(UNNAMED)}{UNNAMED}6sampleIfLNS1_4ModeE1EEEvPKT_PFvvE"
PLAIN = "_ZN4wsss3ocr4rankIiEEvPT_"
OF_BYTES = "_ZN4wsss3ocr4rankIhEEvPT_"
Gate = Callable[..., int]


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """gate(kernels, *options): the exit status for one file with these kernels, mangled name -> usage everywhere.

    bytewise: those of them that store single bytes.
    """
    if shutil.which("c++filt") is None:
        pytest.fail("c++filt is missing: it comes with the compiler")
    script = runpy.run_path(str(GATE))
    main = script["main"]

    def run(
        kernels: dict[str, tuple[int, int, int]], *options: str, nvcc: str = "13.0", bytewise: Collection[str] = ()
    ) -> int:
        compiled = {name: dict.fromkeys(script["ARCHITECTURES"], usage) for name, usage in kernels.items()}
        main.__globals__.update(
            TABLE=tmp_path / "kernels.txt",
            CSRC=tmp_path,
            compiler_version=lambda: nvcc,
            compile_source=lambda source: (compiled, bytewise),
        )
        monkeypatch.setattr(sys, "argv", ["compile_kernels.py", *options])
        return main()

    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "cuda.cu").touch()
    return run


def test_names_are_short_and_whole(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate({MODES: (40, 0, 0), PLAIN: (20, 8, 0)}, "--update") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# nvcc 13.0: ")
    assert lines[2].endswith("     0  deform::sample<float, (deform::Mode)1>")
    assert lines[3].endswith("     0  ocr::rank<int>")
    assert lines[3].split()[:4] == ["20", "8", "0", "20"]


@pytest.mark.parametrize(
    ("after", "difference"),
    [
        ({PLAIN: (21, 8, 0)}, "+     21     8     0"),
        ({PLAIN: (20, 16, 0)}, "+     20    16     0"),
        ({PLAIN: (20, 8, 0), MODES: (40, 0, 0)}, "deform::sample"),
        ({MODES: (40, 0, 0)}, "ocr::rank"),
    ],
)
def test_differences_fail(
    gate: Gate, capsys: pytest.CaptureFixture[str], after: dict[str, tuple[int, int, int]], difference: str
) -> None:
    assert gate({PLAIN: (20, 8, 0)}, "--update") == 0
    assert gate({PLAIN: (20, 8, 0)}) == 0
    capsys.readouterr()
    assert gate(after) == 1
    errors = capsys.readouterr().err
    assert difference in errors
    assert "python .ci/compile_kernels.py --update" in errors
    assert gate(after, "--update") == 0
    assert gate(after) == 0


def test_spills_never_pass(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate({PLAIN: (255, 8, 4)}, "--update") == 1
    assert gate({PLAIN: (255, 8, 4)}) == 1
    assert "registers are spilled by ocr::rank<int>" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--update"]])
def test_lost_alignment_never_passes(gate: Gate, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    kernels = {PLAIN: (20, 8, 0), OF_BYTES: (20, 8, 0)}
    assert gate(kernels, "--update", bytewise={OF_BYTES}) == 0
    assert gate(kernels, *options, bytewise={OF_BYTES, PLAIN}) == 1
    assert "single bytes are stored by ocr::rank<int>\n" in capsys.readouterr().err


def test_stores_of_bytes_are_found() -> None:
    storing_bytes = runpy.run_path(str(GATE))["storing_bytes"]
    assembly = """
.visible .entry narrow(
	st.global.v2.b8 	[%rd1], {%rs1, %rs2};
.visible .entry wide(
	ld.global.nc.u8 	%rs3, [%rd1];
	st.global.v4.b32 	[%rd1+8], {%r1, %r2, %r3, %r4};
.visible .entry shared(
	st.shared.u8 	[%rd1], %rs4;
"""
    assert storing_bytes(assembly) == {"narrow", "shared"}


def test_another_compiler(gate: Gate) -> None:
    assert gate({PLAIN: (20, 8, 0)}, "--update") == 0
    assert gate({PLAIN: (32, 8, 0)}, nvcc="12.6") == 0
    assert gate({MODES: (20, 8, 0)}, nvcc="12.6") == 1


def test_first_table_is_asked_for(gate: Gate) -> None:
    assert gate({PLAIN: (20, 8, 0)}) == 1


def test_table_has_every_room() -> None:
    """Where nvcc is missing, this much can be said of the committed table."""
    csrc = ROOT / "csrc"
    rooms = {path.relative_to(csrc).parts[0] for path in csrc.rglob("cuda.cu")}
    lines = (ROOT / ".ci" / "kernels.txt").read_text().splitlines()[2:]
    assert {line.split(None, 9)[-1].partition("::")[0] for line in lines} == rooms
