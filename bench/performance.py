"""Writes the part of README.md between the two markers, and its pictures, from bench/results.

python bench/performance.py                  after a results file or sections.py has changed
python bench/performance.py --check          exits 1 if README.md says something else
python bench/performance.py --results FILE   prints the tables of any file that `wsss-ops bench --out` wrote
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

# Not relative, so that this file runs as a script, too.
from wsss_ops.bench.markdown import (
    Case,
    Columns,
    compares,
    default_columns,
    legend,
    measured,
    operators,
    overheads,
    table,
)
from wsss_ops.bench.report import plot
from wsss_ops.bench.results_file import Results, load, succeeded
from wsss_ops.bench.sections import RESULTS, SECTIONS

README = RESULTS.parent.parent / "README.md"
BEGIN = "<!-- written by bench/performance.py from here -->\n"
END = "<!-- to here -->\n"
INTRODUCTION = """\
`ms` is the median of interleaved rounds. `times floor` is the median of the rounds' ratios to the floor, the least that
the work can cost on that machine; the pictures show it. `ratio` is a function's median over that of wsss_ops, which is
faster where it exceeds 1. `MB` is the most memory that a call holds beyond what was there before."""
GPU = """\
Cases and floors are those of the CPU's sections, at sizes that fill a GPU, and of `deform_conv2d` in float32 proper,
TF32, bfloat16 and under autocast. `graphs` replays a call from a CUDA graph; its floor is the same call without one."""
NO_GPU = "No figure here was measured on a GPU yet."


def block(folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        file = folder / section.file
        results = succeeded(load(file))
        parts += [f"### {section.operator} ({results['device']})", section.prose(results), source(file, results)]
        parts += facts(operators(results)[section.op], section.columns, picture(file, section.op))
    gpu = newest_gpu(folder)
    if gpu is None:
        parts.append(NO_GPU)
    else:
        results = succeeded(load(gpu))
        parts += ["### On a GPU", GPU, source(gpu, results), *everything(results, gpu)]
    return "\n\n".join(parts) + "\n"


def source(file: Path, results: Results) -> str:
    return f"Measured on {measured(results)} ([results](bench/results/{file.name}))."


def facts(cases: Sequence[Case], columns: Columns, image: Path | None) -> list[str]:
    drawn = [f"![time as a multiple of the floor](bench/results/{image.name})"] if image and compares(cases) else []
    return [legend(cases), *drawn, table(cases, columns)]


def everything(results: Results, file: Path | None = None) -> list[str]:
    """All cases of the results, with the pictures drawn of the file."""
    parts = []
    for op, cases in operators(results).items():
        parts += [f"#### {op}", *facts(cases, default_columns(cases), picture(file, op) if file else None)]
    return [*parts, overheads(results)]


def newest_gpu(folder: Path) -> Path | None:
    return max(folder.glob("gpu-*.json"), default=None)


def picture(file: Path, op: str) -> Path:
    return file.with_suffix(f".{op}.png")


def draw(folder: Path = RESULTS) -> None:
    """Every picture that block() names."""
    shown = [(folder / section.file, section.op) for section in SECTIONS]
    if gpu := newest_gpu(folder):
        shown += [(gpu, op) for op, cases in operators(succeeded(load(gpu))).items() if compares(cases)]
    for file, op in shown:
        results = succeeded(load(file))
        plot({**results, "cases": operators(results)[op]}, picture(file, op))


def updated(readme: str) -> str:
    """README.md's text with the block in it."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"{README} must hold each of these lines once: {BEGIN}{END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="README.md's figures and pictures from bench/results.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="write nothing, exit 1 if README.md says something else")
    only.add_argument("--results", type=Path, help="write nothing, print the tables of all cases of this file")
    options = parser.parse_args(arguments)
    if options.results is not None:
        try:
            results = succeeded(load(options.results))
        except ValueError as error:
            parser.error(f"--results: {error}")
        print("\n\n".join([f"Measured on {measured(results)}.", *everything(results)]))
        return 0
    current = README.read_text()
    wanted = updated(current)
    if options.check:
        if current != wanted:
            print("README.md is not what bench/results say: run python bench/performance.py and commit what it writes")
        return int(current != wanted)
    draw()
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
