"""Benchmark results as a table that people read, and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from wsss_ops._files import write_atomic

from .results_file import Results, succeeded


def header(results: Results) -> str:
    return "\n".join(f"{name + ':':14} {fact}" for name, fact in results["environment"].items())


def table(results: Results) -> str:
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


def plot(results: Results, path: Path) -> None:
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
    canvas.draw()
    # 64 colours are a third of the bytes: results are committed with their pictures.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)
    write_atomic(path, lambda file: picture.save(file, format="png"))
