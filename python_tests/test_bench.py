"""The benchmark's instruments on functions whose answers are known, and its command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsss_ops import reference
from wsss_ops.__main__ import main
from wsss_ops.bench import cases, measure, runner
from wsss_ops.bench.cases.case import Precision, arithmetic

CPU = torch.device("cpu")


def test_interleaved_times_each_once_a_round_and_takes_the_first_as_floor() -> None:
    order = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.004)

    def fast() -> None:
        order.append("fast")

    timings = measure.interleaved([{"slow": slow, "fast": fast}] * 4, CPU, rounds=6)
    rounds = [frozenset(order[-12:][i : i + 2]) for i in range(0, 12, 2)]
    assert rounds == [{"slow", "fast"}] * 6
    assert timings["slow"].ratio == 1
    assert timings["fast"].ratio < 1
    assert 0.004 <= timings["slow"].low <= timings["slow"].median <= timings["slow"].high


def test_peak_memory_counts_what_is_freed_within() -> None:
    def function() -> torch.Tensor:
        temporary = torch.ones(1000, 1000)
        result = temporary.sum(0)
        del temporary
        return result

    assert measure.peak_memory(function, CPU) == 4_000_000 + 4_000
    assert measure.peak_memory(lambda: None, CPU) == 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = cases.patch.patch_case("small", "cpu", (1, 4, 8, 8), (2, 2), "split", channels_last=True)
    monkeypatch.setattr(runner, "CASES", [small])
    out, picture = tmp_path / "results.json", tmp_path / "plot.png"
    options = ["--device", "cpu", "--rounds", "5", "--no-compile", "--out", str(out), "--plot", str(picture)]
    assert main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    assert "small split channels_last: N1 D4 8x8 fp32, grid 2x2" in printed
    results = json.loads(out.read_text())
    figures = results["cases"][0]["functions"]
    assert list(figures) == ["floor: clone", "wsss_ops", "its kernel alone", "reference"]
    assert figures["wsss_ops"]["peak_bytes"] == 4 * 4 * 64
    assert figures["reference"]["median_ms"] > 0
    assert results["host_overhead_us"]["patch_split"]["wsss_ops"] > 0
    assert "processor" in results["environment"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "results.json"]


@pytest.mark.parametrize("form", [cases.prototype.by_products, cases.prototype.by_broadcast])
def test_other_forms_of_the_prototypes_compute_the_same(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    levels, cam = [torch.randn(2, 6, 7, 9), torch.randn(2, 4, 3, 5)], torch.rand(2, 5, 7, 9)
    tags = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    expected = reference.prototype_cam(levels, cam, tags)
    assert expected.any()
    torch.testing.assert_close(form(levels, cam, tags), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "4"], "--rounds must be at least 5, got 4"),
        (["--out", "/nowhere/results.json"], "--out: there is no folder /nowhere"),
        (["--plot", "/nowhere/plot.png"], "--plot: there is no folder /nowhere"),
    ],
)
def test_bad_options_are_refused_before_measuring(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=message):
        main(["bench", "--device", "cpu", *options])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_arithmetic_is_set_for_a_call_alone(precision: Precision) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    seen = arithmetic(precision, lambda: [backend.allow_tf32 for backend in backends])()
    assert seen == [precision == "tf32"] * 2
    with pytest.raises(ZeroDivisionError):
        arithmetic(precision, lambda: 1 / 0)()
    assert [backend.allow_tf32 for backend in backends] == before


def test_every_case_builds_what_it_names() -> None:
    """At its real size, without timing: every function of every CPU case runs, the first is the floor."""
    for case in cases.CASES:
        if case.device == "cpu":
            functions = dict(case.build(CPU, False))
            assert next(iter(functions)).startswith("floor"), case.name
            assert case.op == "ceilings" or "wsss_ops" in functions
            for function in functions.values():
                function()
