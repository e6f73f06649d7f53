"""Benchmark results as Markdown tables: what README.md shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .results_file import Results

Case = dict[str, Any]
Figures = dict[str, float]

OURS = "wsss_ops"
FLOOR = "floor"  # stands for a case's first function, whose name says what it is


@dataclass(frozen=True)
class Columns:
    """Which functions a table shows, and what of them."""

    ms: Sequence[str]
    times_floor: Sequence[str] = (OURS,)
    ratio: Sequence[str] = ()
    megabytes: Sequence[str] = (OURS,)
    rate: Sequence[str] = ()


def default_columns(cases: Sequence[Case]) -> Columns:
    """Floor and ours, and how the others compare. Cases that only look at the machine have nothing of ours."""
    ours = [OURS] if compares(cases) else []
    others = [name for name in functions(cases) if ours and name != OURS]
    return Columns(ms=[FLOOR, *ours], times_floor=ours, ratio=others, megabytes=[*ours, *others], rate=[FLOOR])


def functions(cases: Iterable[Case]) -> list[str]:
    """All that compete with the floor, in the order of the results."""
    names = dict.fromkeys(name for case in cases for name in case["functions"])
    return [name for name in names if not name.startswith(f"{FLOOR}: ")]


def compares(cases: Iterable[Case]) -> bool:
    return OURS in functions(cases)


def operators(results: Results) -> dict[str, list[Case]]:
    """The cases of each operator."""
    found: dict[str, list[Case]] = {}
    for case in results["cases"]:
        found.setdefault(case["op"], []).append(case)
    return found


def floor_name(case: Case) -> str:
    name: str = next(iter(case["functions"]))
    return name


def figures(case: Case, function: str) -> Figures | None:
    found: Figures | None = case["functions"].get(floor_name(case) if function == FLOOR else function)
    return found


def ratio(case: Case, function: str) -> float | None:
    """Of the medians: rounds are not in the results. None where ours failed."""
    if OURS not in case["functions"]:
        return None
    own: float = case["functions"][function]["median_ms"] / case["functions"][OURS]["median_ms"]
    return own


def digits(value: float | None) -> str:
    """Three of them, more than the spread of most figures allows."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def rate(case: Case, function: Figures) -> str:
    for amount, unit in ((case.get("flops"), "GFLOP/s"), (case.get("moved_bytes"), "GB/s")):
        if amount:
            number = amount / function["median_ms"] / 1e6
            return f"{digits(number)} {unit}" if number < 1e4 else f"{digits(number / 1e3)} T{unit[1:]}"
    return "-"


def table(cases: Sequence[Case], columns: Columns) -> str:
    # The first column of each kind says what the kind is.
    kinds: list[tuple[str, Sequence[str], Callable[[Case, str, Figures], str]]] = [
        ("ms", columns.ms, lambda case, name, own: digits(own["median_ms"])),
        ("times floor", columns.times_floor, lambda case, name, own: digits(own["times_floor"])),
        ("ratio", columns.ratio, lambda case, name, own: digits(ratio(case, name))),
        ("MB", columns.megabytes, lambda case, name, own: digits(own["peak_bytes"] / 1e6)),
        ("rate", columns.rate, lambda case, name, own: rate(case, own)),
    ]
    head = ["case"]
    rows = [[case["name"]] for case in cases]
    for kind, names, text in kinds:
        for name in names:
            head.append(f"{kind}: {name}" if name == names[0] else name)
            for row, case in zip(rows, cases, strict=True):
                own = figures(case, name)
                row.append("-" if own is None else text(case, name, own))
    return _markdown(head, rows)


def overheads(results: Results) -> str:
    """Host overhead of a call, in microseconds."""
    calls: dict[str, Figures] = results["host_overhead_us"]
    names = list(dict.fromkeys(name for call in calls.values() for name in call))
    rows = [
        [operator, *(digits(call[name]) if name in call else "-" for name in names)] for operator, call in calls.items()
    ]
    return _markdown(["host overhead of a call, us", *names], rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])


def legend(cases: Sequence[Case]) -> str:
    """What the cases' names mean, and what their floors are."""
    sizes: dict[str, list[list[str]]] = {}
    for case in cases:
        sizes.setdefault(case["work"], []).append(case["name"].split())
    works = [f"{_common_words(names)}: {work}" for work, names in sizes.items()]
    floors = dict.fromkeys(floor_name(case).removeprefix(f"{FLOOR}: ") for case in cases)
    return f"{'; '.join(works)}. Floor: {' or '.join(floors)}."


def _common_words(names: Iterable[Sequence[str]]) -> str:
    """With which all of the names begin."""
    return " ".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False)))


def measured(results: Results) -> str:
    """Where and how, in one line."""
    facts = results["environment"]
    machine, drivers = ("gpu 0", ["gpu driver"]) if results["device"] == "cuda" else ("processor", [])
    versions = [f"{name} {facts[name]}" for name in (*drivers, "torch", OURS)]
    return ", ".join([facts[machine], *versions, f"{results['rounds']} rounds"])
