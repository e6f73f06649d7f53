"""Benchmark results as a table that people read, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def header(results: dict[str, Any]) -> str:
    return "\n".join(f"{name + ':':14} {fact}" for name, fact in results["environment"].items())


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['rounds']} interleaved rounds on {results['device']}: medians, and the median of ratios by round"
    ]
    for case in results["cases"]:
        lines += ["", f"{case['name']}: {case['work']}"]
        if "error" in case:
            lines.append(f"  failed: {case['error']}")
            continue
        unit, amount = ("GFLOP/s", case["flops"]) if case.get("flops") else ("GB/s", case["moved_bytes"])
        label = max(20, *(len(name) for name in case["functions"]))
        lines.append(f"  {'':{label}}{'ms':>10}{'10% - 90%':>22}{'x floor':>9}{unit:>8}{'peak MB':>9}")
        for name, figures in case["functions"].items():
            if "error" in figures:
                lines.append(f"  {name:{label}}  failed: {figures['error']}")
                continue
            rate = f"{amount / figures['median_ms'] / 1e6:.1f}" if amount else "-"
            spread = f"{figures['p10_ms']:.3f} - {figures['p90_ms']:.3f}"
            lines.append(
                f"  {name:{label}}{figures['median_ms']:10.3f}{spread:>22}{figures['times_floor']:9.2f}{rate:>8}"
                f"{figures['peak_bytes'] / 1e6:9.1f}"
            )
    lines += ["", "host overhead of a call, us"]
    for operation, functions in results["host_overhead_us"].items():
        lines += [f"  {operation + ', ' + name:30}{overhead:8.1f}" for name, overhead in functions.items()]
    return "\n".join(lines)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several runs as one; where two have a case, the later one's."""
    cases: dict[str, Any] = {}
    overheads: dict[str, Any] = {}
    for part in parts:
        if part["environment"] != parts[0]["environment"]:
            raise SystemExit("these results are of different machines or versions, which make no table")
        cases |= {case["name"]: case for case in part["cases"]}
        overheads |= part["host_overhead_us"]
    return {**parts[-1], "cases": list(cases.values()), "host_overhead_us": overheads}


def failures(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Case, function and error of each that raised one; no function where it was all of the case."""
    failed = [(case["name"], "", case["error"]) for case in results["cases"] if "error" in case]
    return failed + [
        (case["name"], name, figures["error"])
        for case in results["cases"]
        for name, figures in case["functions"].items()
        if "error" in figures
    ]


def succeeded(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what failed: functions, and cases whose floor did."""
    cases = []
    for case in results["cases"]:
        functions = {name: figures for name, figures in case["functions"].items() if "error" not in figures}
        if functions and next(iter(case["functions"])) in functions:
            cases.append({**case, "functions": functions})
    return {**results, "cases": cases}


def plot(results: dict[str, Any], path: Path) -> None:
    """A dot for each function's time as a multiple of its case's floor; written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    cases = succeeded(results)["cases"]
    names = dict.fromkeys(name for case in cases for name in case["functions"] if not name.startswith("floor"))
    figure = Figure(figsize=(9, 1.1 + 0.27 * len(cases)), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(1, color="black", linewidth=1, label="floor")
    for name in names:
        rows = [row for row, case in enumerate(cases) if name in case["functions"]]
        ratios = [cases[row]["functions"][name]["times_floor"] for row in rows]
        axes.plot(ratios, rows, "o", markersize=9 if name == "wsss_ops" else 6, label=name)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.8), max(right, 2.2))  # two ticks at least
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.set_xlabel("time as a multiple of the floor, on a logarithmic axis (left is better)")
    machine = results["environment"]["gpu 0" if results["device"] == "cuda" else "processor"]
    axes.set_title(f"wsss_ops on {machine}", fontsize=10)
    figure.legend(fontsize=9, loc="outside right upper")
    partial = path.with_name(path.name + ".partial")
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64).save(partial, format="png")  # a third of the bytes: results are committed with their pictures
    partial.replace(path)
