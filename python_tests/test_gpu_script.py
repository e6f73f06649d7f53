"""bench/gpu.sh with stand-ins for the GPU's commands and for Python: what it runs, what stops it, what it tells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = {
    "nvidia-smi": 'echo "a GPU, 1.2.3"',
    # Options and their values come before the command.
    "compute-sanitizer": """
while [[ $1 == --* ]]; do [[ $1 == --log-file ]] && echo "$REPORT" >"$2"; shift 2; done
"$@"; status=$?; echo "========= ERROR SUMMARY: 0 errors"; exit $status""",
    # Writes down what it is called for, and fails where that matches FAIL.
    "stand-in": """
echo "$*" >>"$CALLS"
[[ ! "$*" =~ $FAIL ]] || { echo "as told"; exit 3; }
while [[ $# -gt 0 ]]; do [[ $1 == --out ]] && echo {} >"$2"; shift; done
echo "all is well" """,
}
FILES = sorted((ROOT / "python_tests").glob("test_*.py"))
ON_ALL_BACKENDS = r"^def test_\w+\(device: torch\.device"
ON_GPUS_ALONE = r"^def (test_\w+)\(.*\n(?:    \"\"\".*\"\"\"\n)?    if .*\n        pytest\.skip\(\"needs .*GPU"

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def gpu_script(tmp_path: Path) -> Run:
    """gpu_script(steps...) returns the exit status, summary.txt and what Python was called for."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*steps: str, fail: str = "^$", report: str = "") -> tuple[int, str, list[str]]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "stand-in"),
            "CALLS": str(tmp_path / "calls"),
            "FAIL": fail,
            "REPORT": report,
        }
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), "out", *steps]  # a relative folder
        done = subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        summary = tmp_path / "out" / "summary.txt"
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, summary.read_text() if summary.exists() else done.stdout, calls

    return run


def verdicts(summary: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S+) +(passed|failed \(\d+\)|stopped \(\d+\)) +\d+ s ", summary, re.MULTILINE))


def test_all_of_it(gpu_script: Run, tmp_path: Path) -> None:
    status, summary, calls = gpu_script()
    ended = verdicts(summary)
    assert status == 0
    assert set(ended.values()) == {"passed"}
    parts = ["nvidia-smi", "machine", "build", "info", "test_ocr", "bench-deform", "memcheck", "initcheck-kernels"]
    assert [name for name in parts if name not in ended] == []
    assert list(ended)[-1] == "compiled"
    # A process for each file of tests that has some for the GPU, and one for each tool.
    tested = [re.search(r"(test_\w+.py) -k (cuda or .*)", call) for call in calls]
    expressions = {match[1]: match[2].split(" or ") for match in tested if match}
    sources = {file.name: file.read_text() for file in FILES}
    assert set(expressions) == {
        name for name, text in sources.items() if re.search(ON_ALL_BACKENDS, text, re.MULTILINE)
    }
    for name, text in sources.items():
        for test in re.findall(ON_GPUS_ALONE, text, re.MULTILINE):
            assert any(word in test for word in expressions[name]), test
    assert sum("pytest" in call and "test_dtypes" in call for call in calls) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "bench.json",
        "compiled.json",
        "initcheck.txt",
        "log.txt",
        "summary.txt",
    ]
    assert "==== test_ocr: " in (tmp_path / "out" / "log.txt").read_text()


def test_no_gpu_is_told_and_ends_it(gpu_script: Run) -> None:
    status, summary, calls = gpu_script(fail="^bench/machine.py")
    assert status == 1
    assert verdicts(summary) == {"nvidia-smi": "passed", "machine": "failed (3)"}
    assert calls == ["bench/machine.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, "bench/machine.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"^missing: .*a GPU that torch sees$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("package", "missing"),
    [
        (("setuptools", "76.1.0"), "the Python package setuptools 76.2 or newer (here is 76.1.0)"),
        (("setuptools", "76.2.0rc1"), ""),
        (("setuptools", "80"), ""),
        (None, "the Python package setuptools 76.2 or newer"),
    ],
)
def test_machine_with_an_older_package(tmp_path: Path, package: tuple[str, str] | None, missing: str) -> None:
    if package is not None:
        folder = tmp_path / f"{package[0]}-{package[1]}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package[0]}\nVersion: {package[1]}\n")
    code = "import sys; sys.path = sys.argv[1:] + [p for p in sys.path if 'site-packages' not in p]; import machine; "
    code += "print(machine.lacking_package('setuptools', '76.2'))"
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "bench")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == missing


def test_failed_build_ends_it(gpu_script: Run) -> None:
    status, summary, calls = gpu_script(fail="^setup.py")
    assert status == 1
    assert verdicts(summary)["build"] == "failed (3)"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("fail", "parts"),
    [
        ("test_clip.py -k cuda or", {"test_clip"}),
        ("--op deform", {"bench-deform"}),
        ("test_dtypes", {"memcheck", "racecheck", "synccheck", "initcheck"}),
        ("compiled.json --op|--op patch --op ocr --op prototype --out", {"compiled"}),
    ],
)
def test_other_failures_end_nothing_else(gpu_script: Run, fail: str, parts: set[str]) -> None:
    status, summary, _ = gpu_script(fail=fail)
    ended = verdicts(summary)
    assert status == 1
    assert {name for name, verdict in ended.items() if verdict == "failed (3)"} == parts
    assert list(ended)[-1] == "compiled"


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        ("=========     at void wsss::ocr::add_shares<float>()+0x10", "failed (1)"),
        ("=========     at void at::native::reduce_kernel()+0x10", "passed"),
    ],
)
def test_reads_of_unwritten_memory_count_in_our_kernels(gpu_script: Run, report: str, verdict: str) -> None:
    status, summary, _ = gpu_script("sanitize", report=report)
    assert verdicts(summary)["initcheck-kernels"] == verdict
    assert status == (verdict != "passed")


def test_steps_that_are_asked_for(gpu_script: Run) -> None:
    status, summary, _ = gpu_script("bench", "build")
    assert status == 0
    assert list(verdicts(summary))[2:] == [
        "bench-operators",
        "bench-deform",
        "bench-graphs",
        "bench-steps",
        "build",
        "info",
    ]


def test_steps_that_there_are_not(gpu_script: Run) -> None:
    status, printed, calls = gpu_script("build", "benhc")
    assert (status, calls) == (2, [])
    assert printed.startswith("usage: bench/gpu.sh OUT_DIR [build|")
