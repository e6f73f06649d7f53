"""`wsss-ops train SYSTEM`: training, resumption and the evaluation at the end."""

import argparse
import dataclasses
import functools
import importlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from wsss_ops._files import read_json
from wsss_ops.training import checkpoints
from wsss_ops.training.arguments import add_common_arguments, natural, seconds
from wsss_ops.training.batches import TrainingBatches
from wsss_ops.training.cam import CamSystem, SettingsAfterCam, read_start
from wsss_ops.training.comparison import compare
from wsss_ops.training.data import Dataset, fingerprint, open_dataset
from wsss_ops.training.esol import EsolSystem
from wsss_ops.training.evaluation import part_table, stage_table, table
from wsss_ops.training.imbalance import LongTailed
from wsss_ops.training.loop import Training, seed_everything
from wsss_ops.training.ocr import OcrSystem
from wsss_ops.training.ppl import PplSystem
from wsss_ops.training.processes import Processes, join_processes
from wsss_ops.training.report import can_draw_curve, evaluate_and_report
from wsss_ops.training.settings import Settings, add_settings, read_settings
from wsss_ops.training.sfc import SfcSystem
from wsss_ops.training.system import Classifier, Segmenter, System

SYSTEMS: dict[str, type[Classifier] | type[Segmenter]] = {
    "cam": CamSystem,
    "esol": EsolSystem,
    "ocr": OcrSystem,
    "ppl": PplSystem,
    "sfc": SfcSystem,
}
OPS = ("fused", "reference", "both")


def load_ops(name: str) -> ModuleType:
    """The operators by the name given to --ops; "both" trains with the fused ones."""
    return importlib.import_module("wsss_ops.reference" if name == "reference" else "wsss_ops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the systems and their options."""
    systems = parser.add_subparsers(dest="system", required=True, metavar="SYSTEM")
    for name, system in SYSTEMS.items():
        options = systems.add_parser(name, help=(system.__doc__ or "").splitlines()[0])
        options.add_argument("--out", type=Path, required=True, help="run folder; the same command again resumes")
        add_settings(options, system.Settings)
        options.add_argument(
            "--ops", choices=OPS, default="fused", help="which operators; both compares them first (default: fused)"
        )
        options.add_argument("--no-evaluation", action="store_true", help="leave the evaluation at the end out")
        add_common_arguments(options)
        options.add_argument("--workers", type=natural, help="processes that read images (default: by CPU cores)")
        options.add_argument("--save-every", type=seconds, default=15, help="seconds between checkpoints (default: 15)")


def main(args: argparse.Namespace) -> int:
    """Runs the parsed command; returns the exit status. Raises ValueError for what it is given and cannot use."""
    try:
        settings = read_settings(args, SYSTEMS[args.system].Settings)
        with join_processes(args.device) as processes:
            run(
                args.system, settings, args.out, processes, ops=args.ops, evaluation=not args.no_evaluation,
                panels=args.panels, check=args.check, workers=args.workers, save_every=args.save_every,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes the run in {args.out}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run(
    name: str, settings: Settings, out: Path, processes: Processes, *, ops: str = "fused", evaluation: bool = True,
    panels: int = 8, check: str = "auto", workers: int | None = None, save_every: float = 15,
) -> dict[str, Any] | None:  # fmt: skip
    """Trains a system into the folder out, or resumes there, and evaluates it; returns the content of metrics.json.

    A finished run prints its figures and does nothing. Raises ValueError for data that are not in order and where out
    holds a run with other settings or cannot be written into.
    """
    data = {split: open_dataset(settings.data, split, check=check) for split in ("train", "dev", "val")}
    if settings.imbalance > 1:
        data["train"] = LongTailed(data["train"], settings.imbalance)
    record = settings.record() | {
        "system": name,
        "ops": "reference" if ops == "reference" else "fused",
        "training_images": fingerprint(data["train"]),
    }
    checkpoints.check_claim(out, record)
    if (out / checkpoints.METRICS).exists():
        result: dict[str, Any] = read_json(out / checkpoints.METRICS)
        processes.print(f"{out} is finished:\n{table(result)}{part_table(result)}{stage_table(result)}")
        return result
    classes = data["train"].classes
    start = read_start(settings, classes)
    system = _build(name, settings, len(classes), ops)
    if isinstance(data["train"], LongTailed):
        processes.print(data["train"].summary())
        system.class_images = data["train"].class_images
    images = system.training_images(data["train"], out)
    batches = TrainingBatches(
        images, size=settings.size, batch_size=settings.batch_size, seed=settings.seed, masks=system.uses_masks,
        workers=_default_workers(processes) if workers is None else workers, processes=processes,
    )  # fmt: skip
    curve = evaluation and can_draw_curve(system, processes)
    if processes.is_main:
        checkpoints.claim(out, record)
    processes.wait()
    system.prepare(images, processes)
    if ops == "both" and system.uses_ops and not (out / checkpoints.CHECKPOINT).exists():
        pair = {kind: _build(name, settings, len(classes), kind) for kind in ("reference", "fused")}
        processes.print(_compare_operators(pair, images, batches, processes))
    about = {
        "system": name, "settings": dataclasses.asdict(settings), "classes": classes,
        "class_images": system.class_images,
    }  # fmt: skip
    training = Training(system, batches, processes, out, save_every=save_every, about=about, start=start)
    training.run()
    processes.print(f"trained in {training.seconds:.0f} s; model in {out / checkpoints.MODEL}")
    if not evaluation:
        return None
    began = time.monotonic()
    details = {"run": record, "training_seconds": round(training.seconds, 1)}
    report = functools.partial(
        evaluate_and_report, system, data["dev"], data["val"], processes, panels=panels, curve=curve, details=details
    )
    earlier = _earlier_stages(training, record, report)
    result = report(out, earlier=earlier)
    processes.print(f"evaluated in {time.monotonic() - began:.0f} s")
    return result


def _compare_operators(
    pair: Mapping[str, System], images: Dataset, batches: TrainingBatches, processes: Processes
) -> str:
    """Five steps per stage with each of two equal systems, as a table."""
    for system in pair.values():
        system.prepare(images, processes)
    return compare(pair, list(itertools.islice(batches.epoch(0), 5)), processes)


def _earlier_stages(
    training: Training, record: dict[str, Any], report: Callable[[Path], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What metrics.json holds of each stage but the last, each in a folder of its own.

    Stages that have been evaluated, before a kill or by the run that this one started from, are not evaluated again.
    """
    system, processes, out = training.system, training.processes, training.out
    found: dict[str, dict[str, Any]] = {}
    for index, stage in enumerate(training.stages[:-1]):
        file, folder = out / f"{stage.name}.pt", out / stage.name
        if index == 0 and training.start is not None and (given := _start_figures(system.settings, record)):
            processes.print(f"stage {stage.name}: figures of {system.settings.start}")
            found[stage.name] = given
        elif (folder / checkpoints.METRICS).exists():
            found[stage.name] = read_json(folder / checkpoints.METRICS)
        else:
            checkpoints.restore(system.network, checkpoints.load(file), file)
            processes.print(f"stage {stage.name}:")
            found[stage.name] = report(folder)
    if found:
        file = out / checkpoints.MODEL
        checkpoints.restore(system.network, checkpoints.load(file), file)
        processes.print(f"stage {training.stages[-1].name}:")
    return found


def _start_figures(settings: SettingsAfterCam, run: dict[str, Any]) -> dict[str, Any] | None:
    """metrics.json of the run that this one started from, if that measured the same images at the same scales."""
    assert settings.start is not None
    path = Path(settings.start) / checkpoints.METRICS
    if not path.exists():
        return None
    result: dict[str, Any] = read_json(path)
    names = ("data", "training_images", "precision")
    there, here = ([of.get(name) for name in names] for of in (result["run"], run))
    return result if [*there, result["scales"]] == [*here, list(settings.scales)] else None


def _build(name: str, settings: Settings, num_classes: int, ops: str) -> Classifier | Segmenter:
    seed_everything(settings.seed)
    return SYSTEMS[name](settings, num_classes, load_ops(ops))


def _default_workers(processes: Processes) -> int:
    cores = len(os.sched_getaffinity(0)) // processes.count
    return 8 if cores >= 16 else cores // 2


def train_on_scenes(name: str, out: Path, *, start: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Trains a system on the generated scenes with its defaults, "cam" about a minute on two cores.

    start: the finished CAM run that a later system takes its first stage from. Returns the content of the metrics.json
    that it leaves in out with the pictures.
    """
    values: dict[str, Any] = {"seed": seed} | ({} if start is None else {"start": str(start)})
    with join_processes() as processes:
        result = run(name, SYSTEMS[name].Settings(**values), out, processes)
    assert result is not None
    return result
