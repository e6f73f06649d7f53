"""What README.md shows of which results, and what it says about them.

A figure within the prose is looked up where a results file holds it. Results on a GPU need no entry: performance.py
shows all cases of the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wsss_ops.bench.markdown import FLOOR, OURS, Columns, digits, floor_name, ratio
from wsss_ops.bench.results_file import Results, load, succeeded

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Section:
    operator: str
    op: str  # as the cases name it
    file: str
    columns: Columns
    prose: Callable[[Results], str]


def deform(results: Results) -> str:
    return """\
`forward` is one matrix product; `offsets` is forward and backward where only the offset learns, two products; `all` is
forward and backward with every gradient, three. The floor is these products alone, by the faster of PyTorch's two
means. torchvision (0.27.1) computes every gradient whatever is asked for, so the difference between its rows `offsets`
and `all` is this machine's noise.

On a CPU no columns are stored: samples are multiplied tile by tile in the caches, by a product of our own that is about
as fast as oneDNN's there and twice as fast as MKL's. On CUDA samples are laid out in columns, in chunks of at most
96 MiB (`wsss_ops.set_workspace_limit`), which PyTorch multiplies; most forwards with up to 256 outputs and one
weight group need none: samples go through shared memory to the tensor cores, float32 as pairs of TF32."""


def ocr(results: Results) -> str:
    earlier = "ocr-cpu-2026-11-20.json"
    small, large = (
        digits(ratio(case, "reference"))
        for case in succeeded(load(RESULTS / earlier))["cases"]
        if case["name"] in ("O1c C21 NCHW", "O2c C81 NCHW")
    )
    largest = max(case["functions"][floor_name(case)]["peak_bytes"] for case in results["cases"])
    return f"""\
The floor moves three times the logits' bytes, for O3c those of the resized logits, which wsss_ops never stores. It is
no floor where times fall below 1: its copy into {digits(largest / 1e6)} MB pays for memory that is new to the process.
Ratios move from run to run:
[an earlier one](bench/results/{earlier}) gave {small} to the reference for O1c C21 NCHW, {large} for O2c C81 NCHW."""


def prototype(results: Results) -> str:
    return """\
`bmm` is the fastest form in plain PyTorch that we know, two batched products; `broadcast` is that of SFC's authors,
which multiplies features by classes before it sums, and is left out where its tensors would be too large. The floor
copies what has to be moved: five times the features' bytes; of several levels those of the resized map, and what it
reads of the levels, twice, beside their gradient."""


def patch(results: Results) -> str:
    ours, reference = (digits(results["host_overhead_us"]["patch_split"][name]) for name in (OURS, "reference"))
    return f"""\
The floor is `x.clone()`; `its kernel alone` writes into a preallocated output. A call on a few numbers takes {ours}
us, the reference's {reference} us: on small tensors the reference is as good."""


SECTIONS = [
    Section(
        "`deform_conv2d`",
        "deform",
        "deform-cpu-2026-11-20.json",
        Columns(
            ms=[FLOOR, OURS, "torchvision", "reference"],
            ratio=["torchvision", "reference"],
            megabytes=[OURS, "torchvision", "reference"],
        ),
        deform,
    ),
    Section(
        "`ocr_loss`",
        "ocr",
        "ocr-cpu-2026-11-25.json",
        Columns(
            ms=[FLOOR, OURS, "reference", "reference compiled"],
            ratio=["reference", "reference compiled"],
            megabytes=[OURS, "reference", "reference compiled"],
        ),
        ocr,
    ),
    Section(
        "`prototype_cam`",
        "prototype",
        "prototype-cpu-2026-11-25.json",
        Columns(
            ms=[FLOOR, OURS, "bmm", "broadcast"],
            ratio=["bmm", "broadcast"],
            megabytes=[OURS, "bmm", "broadcast"],
        ),
        prototype,
    ),
    Section(
        "`patch_split` and `patch_merge`",
        "patch",
        "cpu-2026-11-20.json",
        Columns(
            ms=[FLOOR, OURS],
            times_floor=[OURS, "its kernel alone", "reference", "reference compiled"],
            ratio=["reference", "reference compiled"],
        ),
        patch,
    ),
]
