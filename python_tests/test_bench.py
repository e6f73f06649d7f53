"""The benchmark's instruments on functions whose answers are known, and its command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from wsss_ops import reference
from wsss_ops.__main__ import main
from wsss_ops.bench import cases, measure, runner
from wsss_ops.bench.cases.case import Case, Precision, arithmetic

CPU = torch.device("cpu")


def test_interleaved_times_each_once_a_round_and_takes_the_first_as_floor() -> None:
    order = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.004)

    def fast() -> None:
        order.append("fast")

    timings, errors = measure.interleaved([{"slow": slow, "fast": fast}] * 4, CPU, rounds=6)
    assert errors == {}
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


def case_of(name: str, functions: dict[str, measure.Function], op: str = "patch") -> Case:
    return Case(name, op, "work", "cpu", lambda device, compiled: functions)


def raiser(text: str, calls: int = 0) -> measure.Function:
    """Raises after so many calls."""
    left = [calls]

    def function() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError(text + "\nand a long story")

    return function


@pytest.mark.parametrize("calls", [0, 10, 12])
@pytest.mark.parametrize(("name", "status"), [("reference", 0), ("wsss_ops", 1), ("floor: nothing", 1)])
def test_error_of_a_function_costs_the_others_nothing(
    name: str,
    status: int,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first call, while it is timed, or when its memory is looked at."""
    functions: dict[str, measure.Function] = dict.fromkeys(["floor: nothing", "wsss_ops", "reference"], lambda: None)
    broken = case_of("broken", functions | {name: raiser("no memory", calls + (calls == 12))})
    monkeypatch.setattr(runner, "CASES", [broken, case_of("sound", functions)])
    out, picture = tmp_path / "results.json", tmp_path / "plot.png"
    options = ["--device", "cpu", "--rounds", "5", "--op", "patch", "--no-compile", "--out", str(out)]
    assert main(["bench", *options, "--plot", str(picture)]) == status
    first, second = json.loads(out.read_text())["cases"]
    assert first["functions"][name] == {"error": "RuntimeError: no memory"}
    others = [each for each in functions if each != name] if name != "floor: nothing" or calls == 12 else []
    assert [each for each, figures in first["functions"].items() if "error" not in figures] == others
    assert all("median_ms" in figures for figures in second["functions"].values())
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no memory" in printed
    assert printed.endswith(f"failed: broken, {name}, RuntimeError: no memory\n")


def test_case_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build(device: torch.device, compiled: bool) -> dict[str, measure.Function]:
        raise ImportError("no package")

    monkeypatch.setattr(runner, "CASES", [Case("broken", "patch", "work", "cpu", build)])
    assert main(["bench", "--device", "cpu", "--rounds", "5", "--op", "patch", "--no-compile"]) == 1
    assert "broken: work\n  failed: ImportError: no package" in capsys.readouterr().out


def test_what_was_measured_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    cases = [case_of("first", {"floor": lambda: None}), case_of("second", {"floor": interrupt})]
    monkeypatch.setattr(runner, "CASES", cases)
    out = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--device", "cpu", "--rounds", "5", "--no-compile", "--op", "patch", "--out", str(out)])
    assert [case["name"] for case in json.loads(out.read_text())["cases"]] == ["first"]


def test_results_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: dict[str, measure.Function] = {"floor": lambda: None}
    monkeypatch.setattr(runner, "CASES", [case_of("a", nothing), case_of("b", nothing, "ocr")])
    options = ["bench", "--device", "cpu", "--rounds", "5", "--no-compile"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for op in ("ocr", "patch", "ocr"):  # the last time in place of the first
        assert main([*options, "--op", op, "--out", str(one), "--add"]) == 0
    merged = json.loads(one.read_text())
    assert [case["name"] for case in merged["cases"]] == ["b", "a"]
    assert sorted(merged["host_overhead_us"]) == ["ocr_loss", "patch_split"]
    assert main([*options, "--op", "ocr", "--out", str(two)]) == 0
    capsys.readouterr()
    assert main(["bench", "--show", str(two), str(one)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith(": work")] == ["b: work", "a: work"]
    two.write_text(two.read_text().replace('"python": "', '"python": "2'))
    assert main(["bench", "--show", str(two), str(one)]) == 2
    assert "different machines or versions, which make no table (python: 23." in capsys.readouterr().err
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("measured"))
    assert main([*options, "--out", str(two), "--add"]) == 2
    assert "different machines or versions" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["3", "[]", '{"cases": []}', "no JSON", None])
def test_a_file_that_holds_no_results_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert main(["bench", "--show", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}")


def test_a_gpu_sleeps_while_the_host_enqueues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the time of the host's part, at most a tenth of a second."""
    slept: list[int] = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 3.0)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timings, _ = measure.interleaved([{"floor": lambda: time.sleep(0.004)}], torch.device("cuda"), rounds=5)
    assert timings["floor"].median == 3e-3
    assert all(0.008 * 2e9 < cycles <= 0.1 * 2e9 for cycles in slept)
    assert len(slept) == 5


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
        (["--add"], "--add needs --out"),
        (["--out", "/nowhere/results.json"], "--out: there is no folder /nowhere"),
        (["--plot", "/nowhere/plot.png"], "--plot: there is no folder /nowhere"),
        (["--out", "/tmp"], "--out: /tmp is a folder, a file is needed"),
        (["--plot", "/tmp"], "--plot: /tmp is a folder, a file is needed"),
        (["--out", "/proc/results.json"], "--out: nothing can be written into /proc: "),
    ],
)
def test_bad_options_are_refused_before_measuring(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("measured"))
    assert main(["bench", "--device", "cpu", *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err


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
