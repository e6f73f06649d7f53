"""Benchmark results as a table that people read, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def header(results: dict[str, Any]) -> str:
    return "\n".join(f"{name + ':':14} {fact}" for name, fact in results["environment"].items())


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['rounds']} interleaved rounds on {results['device']}: medians, and the median of ratios by round"
    ]
    for case in results["cases"]:
        lines += ["", f"{case['name']}: {case['work']}"]
        unit, amount = ("GFLOP/s", case["flops"]) if case.get("flops") else ("GB/s", case["moved_bytes"])
        label = max(20, *(len(name) for name in case["functions"]))
        lines.append(f"  {'':{label}}{'ms':>10}{'10% - 90%':>22}{'x floor':>9}{unit:>8}{'peak MB':>9}")
        for name, figures in case["functions"].items():
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


def plot(results: dict[str, Any], path: Path) -> None:
    """A bar for each function's time as a multiple of its case's floor; written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = results["cases"]
    names = list(dict.fromkeys(name for case in cases for name in case["functions"]))
    figure = Figure(figsize=(9, 1.2 + 0.9 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for position, name in enumerate(names):
        rows = [row for row, case in enumerate(cases) if name in case["functions"]]
        ratios = [cases[row]["functions"][name]["times_floor"] for row in rows]
        bars = axes.barh([row + position * height for row in rows], ratios, height, label=name)
        axes.bar_label(bars, [f" {ratio:.2f}" for ratio in ratios], fontsize=7)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], [case["name"] for case in cases])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time as a multiple of the floor (lower is better)")
    axes.set_title(
        f"wsss_ops on {results['environment'].get('gpu 0', results['environment']['processor'])}", fontsize=10
    )
    axes.legend(fontsize=8)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=130)
    partial.replace(path)
