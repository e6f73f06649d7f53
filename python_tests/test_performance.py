"""The README's figures of speed are those of the committed results, and any results become tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from wsss_ops.bench import markdown, performance


def figures(median_ms: float, times_floor: float, megabytes: float) -> dict[str, float]:
    spread = {"p10_ms": median_ms, "p90_ms": median_ms}
    return {"median_ms": median_ms, **spread, "times_floor": times_floor, "peak_bytes": megabytes * 1e6}


def gpu_results() -> dict[str, Any]:
    deform = {
        "floor: mm": figures(2, 1, 8),
        "wsss_ops": figures(2.5, 1.26, 300),
        "reference": figures(10, 5.1, 900),
        "torchvision": figures(123.4, 61, 700),
    }
    compared = {"op": "deform", "moved_bytes": 0, "flops": 4 * 10**9, "functions": deform}
    failed = {"error": "NotImplementedError: no kernel"}
    alone = {**compared, "functions": {**deform, "torchvision": failed}}
    lost = {**compared, "functions": {**deform, "floor: mm": failed}}
    return {
        "environment": {
            "wsss_ops": "0.1.0 (0123456789)",
            "torch": "2.13.0+cu130",
            "processor": "A CPU, 16 threads",
            "gpu 0": "A GPU, architecture 9.0",
            "gpu driver": "570.1",
        },
        "device": "cuda",
        "rounds": 20,
        "cases": [
            {**compared, "name": "D1 fp32 forward NCHW", "work": "large, fp32"},
            {**compared, "name": "D1 fp32 all NCHW", "work": "large, fp32"},
            {**alone, "name": "D2 forward", "work": "small"},
            {**lost, "name": "D3 forward", "work": "lost"},
            {**compared, "name": "D4 forward", "work": "ours failed", "functions": {**deform, "wsss_ops": failed}},
            {"op": "ceilings", "name": "copy", "work": "1 GiB", "moved_bytes": 2 * 10**9, "flops": 0,
             "functions": {"floor: copy": figures(1, 1, 0)}},
        ],
        "host_overhead_us": {"deform_conv2d": {"wsss_ops": 34.22, "reference": 1805.3}, "clip": {"wsss_ops": 0.5}},
    }  # fmt: skip


@pytest.fixture
def gpu_file(tmp_path: Path) -> Path:
    """Among the results that README.md shows."""
    for section in performance.SECTIONS:
        (tmp_path / section.file).write_bytes((performance.RESULTS / section.file).read_bytes())
    (tmp_path / "gpu-2026-01-01.json").write_text("not the newest")
    file = tmp_path / "gpu-2026-02-01.json"
    file.write_text(json.dumps(gpu_results()))
    return file


def test_readme_says_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    status = performance.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_check_tells_a_changed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = performance.README.read_text()
    changed = tmp_path / "README.md"
    changed.write_text(readme.replace("| ms: floor |", "| ms: other |", 1))
    monkeypatch.setattr(performance, "README", changed)
    assert performance.main(["--check"]) == 1
    assert "run python bench/performance.py" in capsys.readouterr().out
    assert performance.updated(changed.read_text()) == readme


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"README\.md must hold each of these lines once"):
        performance.updated(performance.BEGIN)


def test_pictures_of_the_readme_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", performance.README.read_text())
    assert len(pictures) >= len(performance.SECTIONS)
    for picture in pictures:
        assert (performance.README.parent / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_tables_of_a_gpu(gpu_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--results", str(gpu_file)]) == 0
    assert (
        capsys.readouterr().out
        == """\
Measured on A GPU, architecture 9.0, gpu driver 570.1, torch 2.13.0+cu130, wsss_ops 0.1.0 (0123456789), 20 rounds.

#### deform

D1 fp32: large, fp32; D2 forward: small; D4 forward: ours failed. Floor: mm.

| case | ms: floor | wsss_ops | times floor: wsss_ops | ratio: reference | torchvision | MB: wsss_ops | reference | torchvision | rate: floor |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
| D1 fp32 forward NCHW | 2.00 | 2.50 | 1.26 | 4.00 | 49.4 | 300 | 900 | 700 | 2000 GFLOP/s |
| D1 fp32 all NCHW | 2.00 | 2.50 | 1.26 | 4.00 | 49.4 | 300 | 900 | 700 | 2000 GFLOP/s |
| D2 forward | 2.00 | 2.50 | 1.26 | 4.00 | - | 300 | 900 | - | 2000 GFLOP/s |
| D4 forward | 2.00 | - | - | - | - | - | 900 | 700 | 2000 GFLOP/s |

#### ceilings

copy: 1 GiB. Floor: copy.

| case | ms: floor | rate: floor |
|---|--:|--:|
| copy | 1.00 | 2000 GB/s |

| host overhead of a call, us | wsss_ops | reference |
|---|--:|--:|
| deform_conv2d | 34.2 | 1805 |
| clip | 0.500 | - |
"""  # noqa: E501
    )


def test_newest_gpu_results_come_into_the_readme(gpu_file: Path) -> None:
    block = performance.block(gpu_file.parent)
    assert performance.NO_GPU not in block
    assert f"### On a GPU\n\n{performance.GPU}\n\nMeasured on A GPU, architecture 9.0" in block
    assert "| D2 forward | 2.00 | 2.50 | 1.26 | 4.00 | - | 300 | 900 | - | 2000 GFLOP/s |" in block
    assert "(bench/results/gpu-2026-02-01.deform.png)" in block
    assert "ceilings.png" not in block  # nothing to compare
    for file in gpu_file.parent.glob("gpu-*.json"):
        file.unlink()
    assert performance.NO_GPU in performance.block(gpu_file.parent)


def test_every_picture_named_is_drawn(gpu_file: Path) -> None:
    performance.draw(gpu_file.parent)
    named = re.findall(r"\(bench/results/(.*?\.png)\)", performance.block(gpu_file.parent))
    assert sorted(named) == sorted(path.name for path in gpu_file.parent.glob("*.png"))


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name, message in (
        ("none.json", "cannot be read as results"),
        ("other.json", "is not what wsss-ops bench --out writes"),
    ):
        with pytest.raises(SystemExit) as error:
            performance.main(["--results", str(tmp_path / name)])
        assert error.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.0123, "0.0123"), (7.1, "7.10"), (99.96, "100"), (1433.6, "1434")]
)
def test_three_digits(value: float, text: str) -> None:
    assert markdown.digits(value) == text
