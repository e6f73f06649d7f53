"""`wsss-ops bench`: runs the cases, prints a table, writes JSON and a plot."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wsss_ops.info import environment, missing

from .cases import CASES, OPERATORS, OVERHEADS, Case
from .measure import host_overhead, interleaved, peak_memory
from .report import header, plot, table

DATA_SETS = 4  # per case, more than caches hold at the sizes of the cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPERATORS, action="append", help="measure this operator only (repeatable)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=30, help="how often each function is timed, at least 5")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile'd references out")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="draw the results as PNG (needs matplotlib)")


def main(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and (reason := next((line for line in missing() if line.startswith("CUDA")), "")):
        raise SystemExit(f"--device cuda: {reason}")
    if arguments.rounds < 5:
        raise SystemExit(f"--rounds must be at least 5, got {arguments.rounds}")
    for option, path in (("--out", arguments.out), ("--plot", arguments.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise SystemExit(f"{option}: there is no folder {path.absolute().parent}")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    results = run(torch.device(device), arguments.op or OPERATORS, arguments.rounds, not arguments.no_compile)
    print(header(results))
    print(table(results))
    if arguments.out is not None:
        partial = arguments.out.with_name(arguments.out.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(arguments.out)
        print(f"wrote {arguments.out}")
    if arguments.plot is not None:
        plot(results, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


def run(device: torch.device, operators: Sequence[str], rounds: int, compiled: bool) -> dict[str, Any]:
    """Every case of the operators for the device's type; what `--out` writes."""
    cases = [case for case in CASES if case.device == device.type and case.op in operators]
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "device": device.type,
        "rounds": rounds,
        "cases": [run_case(case, device, rounds, compiled) for case in tqdm(cases, "bench", disable=None)],
        "host_overhead_us": {},
    }
    for name, build in OVERHEADS.items():
        functions = build(device)
        results["host_overhead_us"][name] = {
            function: host_overhead(call, device) * 1e6 for function, call in functions.items()
        }
    return results


def run_case(case: Case, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    sets = [case.build(device, compiled) for _ in range(DATA_SETS)]
    timings = interleaved(sets, device, rounds)
    return {
        "name": case.name,
        "op": case.op,
        "work": case.work,
        "moved_bytes": case.moved_bytes,
        "flops": case.flops,
        "functions": {
            name: {
                "median_ms": timing.median * 1e3,
                "p10_ms": timing.low * 1e3,
                "p90_ms": timing.high * 1e3,
                "times_floor": timing.ratio,
                "peak_bytes": peak_memory(sets[0][name], device),
            }
            for name, timing in timings.items()
        },
    }
