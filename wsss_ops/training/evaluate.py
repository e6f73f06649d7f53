"""`wsss-ops evaluate`: the figures of a trained model."""

import argparse
import dataclasses
from pathlib import Path

from wsss_ops._files import make_folder
from wsss_ops.training import checkpoints
from wsss_ops.training.arguments import add_common_arguments
from wsss_ops.training.data import open_dataset
from wsss_ops.training.processes import join_processes
from wsss_ops.training.report import can_draw_curve, evaluate_and_report
from wsss_ops.training.system import Classifier, Segmenter
from wsss_ops.training.train import SYSTEMS, load_ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="model.pt, or the run folder that holds it")
    parser.add_argument("--data", help="VOC-layout folder or zip; default: what the model was trained on")
    parser.add_argument("--scales", type=float, nargs="+", help="image scales; default: those of its training run")
    parser.add_argument("--baseline", help="for runs of ocr: another one to compare figures and pictures with")
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.json and pictures")
    parser.add_argument(
        "--ops", choices=("fused", "reference"), default="fused", help="which operators (default: fused)"
    )
    add_common_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the parsed command; returns the exit status. Raises ValueError for what it is given and cannot use."""
    if (args.out / checkpoints.SETTINGS).exists():
        raise ValueError(f"{args.out} is the folder of a training run, whose figures stay; choose another --out")
    with join_processes(args.device) as processes:
        system, classes = load_system(args.checkpoint, args.ops)
        if args.scales is not None:
            system.settings = dataclasses.replace(system.settings, scales=tuple(args.scales))
        if args.baseline is not None:
            if not isinstance(system, Segmenter):
                raise ValueError(f"--baseline is for runs of ocr, {args.checkpoint} is none")
            system.settings = dataclasses.replace(system.settings, baseline=args.baseline)
            system.baseline()  # an error before the evaluation where it does not fit
        path = args.data or system.settings.data
        data = {split: open_dataset(path, split, check=args.check) for split in ("dev", "val")}
        if tuple(classes) != data["val"].classes:
            raise ValueError(f"the model knows the classes {', '.join(classes)}; {path} has others")
        system.network.to(processes.device)
        make_folder(args.out)
        evaluate_and_report(
            system, data["dev"], data["val"], processes, args.out, panels=args.panels,
            curve=can_draw_curve(system, processes), details={"checkpoint": str(args.checkpoint)},
        )  # fmt: skip
    return 0


def load_system(path: Path, ops: str = "fused") -> tuple[Classifier | Segmenter, tuple[str, ...]]:
    """Loads a trained model from its file or run folder; returns it with its classes, background first.

    Raises ValueError where there is none or it cannot be read.
    """
    file = path / checkpoints.MODEL if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a run writes it when its training is finished")
    content = checkpoints.load(file)
    if content.get("system") not in SYSTEMS:
        raise ValueError(f"{file} is no model of {', '.join(SYSTEMS)}")
    kind = SYSTEMS[content["system"]]
    settings = kind.Settings(**content["settings"])
    system = kind(settings, len(content["classes"]), load_ops(ops), pretrained=False)
    checkpoints.restore(system.network, content, file)
    system.class_images = content.get("class_images")  # which older files lack
    return system, tuple(content["classes"])
