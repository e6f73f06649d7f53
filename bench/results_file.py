"""The file that `wsss-ops bench --out` writes: loading it, joining several, and what is taken of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsss_ops._files import read_json

Results = dict[str, Any]  # the content
TYPES = {"environment": dict, "device": str, "rounds": int, "cases": list, "host_overhead_us": dict}


def load(path: Path) -> Results:
    """Raises ValueError naming path where it holds no results."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as results ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in TYPES.items()):
        raise ValueError(f"{path} is not what wsss-ops bench --out writes")
    return content


def check_environments(environments: Sequence[dict[str, str]]) -> None:
    """Raises ValueError where results of these environments make no table, because they differ."""
    keys = {key: None for environment in environments for key in environment}
    values = {key: [environment.get(key, "unknown") for environment in environments] for key in keys}
    differences = [
        f"{key}: {' and '.join(dict.fromkeys(found))}" for key, found in values.items() if len(set(found)) > 1
    ]
    if differences:
        raise ValueError(
            f"these results are of different machines or versions, which make no table ({'; '.join(differences)})"
        )


def merged(parts: Sequence[Results]) -> Results:
    """Results of several runs as one; where two have a case, the later one's.

    Raises ValueError where they are of different machines or versions.
    """
    check_environments([part["environment"] for part in parts])
    cases: dict[str, Any] = {}
    overheads: dict[str, Any] = {}
    for part in parts:
        cases |= {case["name"]: case for case in part["cases"]}
        overheads |= part["host_overhead_us"]
    return {**parts[-1], "cases": list(cases.values()), "host_overhead_us": overheads}


def failures(results: Results) -> list[tuple[str, str, str]]:
    """Case, function and error of each that raised one; no function where it was all of the case."""
    failed = [(case["name"], "", case["error"]) for case in results["cases"] if "error" in case]
    return failed + [
        (case["name"], name, figures["error"])
        for case in results["cases"]
        for name, figures in case["functions"].items()
        if "error" in figures
    ]


def succeeded(results: Results) -> Results:
    """Results without what failed: functions, and cases whose floor did."""
    cases = []
    for case in results["cases"]:
        functions = {name: figures for name, figures in case["functions"].items() if "error" not in figures}
        if functions and next(iter(case["functions"])) in functions:
            cases.append({**case, "functions": functions})
    return {**results, "cases": cases}
