"""`wsss-ops bench`: runs the cases, prints a table, writes JSON and a plot."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wsss_ops._files import check_file, write_json
from wsss_ops.info import environment, missing

from .cases import CASES, OPERATORS, OVERHEADS, Case
from .measure import host_overhead, interleaved, noting, peak_memory
from .report import header, plot, table
from .results_file import Results, check_environments, failures, load, merged

DATA_SETS = 4  # per case, more than caches hold at the sizes of the cases
PEERS = ("reference", "torchvision", "bmm", "broadcast")  # how their names begin; an error of theirs is theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = "an operator; a system's training step; ceilings, what the machine can; graphs, calls replayed on a GPU"
    parser.add_argument("--op", choices=OPERATORS, action="append", help=f"measure this only (repeatable): {parts}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=30, help="how often each function is timed, at least 5")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile'd references out")
    parser.add_argument("--out", type=Path, help="write the results as JSON, after each case what is there")
    parser.add_argument("--add", action="store_true", help="keep what the file of --out has of other cases")
    parser.add_argument("--plot", type=Path, help="draw the results as PNG (needs matplotlib)")
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="measure nothing: results of earlier runs, as one"
    )


def main(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(arguments, device)
    earlier = [load(path) for path in arguments.show or []]
    if arguments.add and arguments.out.exists():
        earlier.append(load(arguments.out))

    def keep(results: Results) -> Results:
        """With what was there before, and in the file."""
        whole = merged([*earlier, results])
        if arguments.out is not None:
            write_json(arguments.out, whole)
        return whole

    if arguments.show:
        own, whole = [], keep(earlier.pop())  # whose errors have been told
    else:
        check_environments([*(part["environment"] for part in earlier), environment()])
        operators = arguments.op or OPERATORS
        results = run(torch.device(device), operators, arguments.rounds, not arguments.no_compile, keep)
        own, whole = failures(results), keep(results)
    print(header(whole))
    print(table(whole))
    if arguments.out is not None:
        print(f"wrote {arguments.out}")
    if arguments.plot is not None:
        plot(whole, arguments.plot)
        print(f"wrote {arguments.plot}")
    for failure in own:
        print(f"failed: {', '.join(failure)}")
    return int(any(not function.startswith(PEERS) for _, function, _ in own))


def check(arguments: argparse.Namespace, device: str) -> None:
    """Raises ValueError where the arguments, or the machine, forbid what they ask for."""
    if device == "cuda" and not arguments.show:
        reason = next((line for line in missing() if line.startswith("CUDA")), None)
        if reason is not None:
            raise ValueError(f"--device cuda: {reason}")
    if arguments.rounds < 5:
        raise ValueError(f"--rounds must be at least 5, got {arguments.rounds}")
    if arguments.add and arguments.out is None:
        raise ValueError("--add needs --out, the file to add to")
    for option, path in (("--out", arguments.out), ("--plot", arguments.plot)):
        if path is not None:
            check_file(option, path)
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def run(
    device: torch.device,
    operators: Sequence[str],
    rounds: int,
    compiled: bool,
    keep: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Every case of the operators for the device's type; `keep` is given what is there after each."""
    results: Results = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "device": device.type,
        "rounds": rounds,
        "cases": [],
        "host_overhead_us": {},
    }
    for op in operators:
        cases = [case for case in CASES if case.device == device.type and case.op == op]
        for case in tqdm(cases, op, disable=None):
            start = time.perf_counter()
            results["cases"].append(run_case(case, device, rounds, compiled))
            keep(results)
            tqdm.write(f"{case.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
            gc.collect()
            torch.cuda.empty_cache()
        if op in OVERHEADS:
            name, build = OVERHEADS[op]
            results["host_overhead_us"][name] = {
                function: host_overhead(call, device) * 1e6 for function, call in build(device).items()
            }
            keep(results)
    return results


def run_case(case: Case, device: torch.device, rounds: int, compiled: bool) -> Results:
    """An error of one function costs the others nothing; it is told in place of what was measured."""
    if compiled:
        torch.compiler.reset()  # or the sizes of an earlier case make this one's dynamic
    functions: dict[str, Any] = {}
    errors: dict[str, str] = {}
    with noting(errors, "case"):
        sets = [case.build(device, compiled) for _ in range(DATA_SETS)]
        timings, failed = interleaved(sets, device, rounds)
        for name, timing in timings.items():
            with noting(failed, name):
                functions[name] = {
                    "median_ms": timing.median * 1e3,
                    "p10_ms": timing.low * 1e3,
                    "p90_ms": timing.high * 1e3,
                    "times_floor": timing.ratio,
                    "peak_bytes": peak_memory(sets[0][name], device),
                }
        functions |= {name: {"error": error} for name, error in failed.items()}
    return {
        "name": case.name,
        "op": case.op,
        "work": case.work,
        "moved_bytes": case.moved_bytes,
        "flops": case.flops,
        "functions": functions,
        **({"error": errors["case"]} if errors else {}),
    }
