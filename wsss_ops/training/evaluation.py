"""Segmentation figures of CAMs at every background threshold at once."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wsss_ops.training.data import VOID, Dataset
from wsss_ops.training.imbalance import group_table
from wsss_ops.training.inference import combine, stream_parts
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Classifier

THRESHOLDS = torch.arange(101) / 100


class ThresholdCounts:
    """Pixel counts from which the confusion matrix of every background threshold follows.

    A pixel is foreground, of its best class (first on ties), where that class's score exceeds the threshold. So one
    histogram of the best score per (predicted, true) class holds all thresholds; no score is kept.
    """

    def __init__(self, num_classes: int, thresholds: Tensor = THRESHOLDS) -> None:
        self.thresholds = thresholds.float()
        self.num_classes = num_classes
        # [number of thresholds below the score, best foreground class, true class]
        self.counts = torch.zeros(len(thresholds) + 1, num_classes - 1, num_classes, dtype=torch.int64)

    def add(self, scores: Tensor, mask: Tensor) -> None:
        """scores [C-1, H, W] of the foreground classes; mask uint8 [H, W] with 255 for pixels that do not count."""
        best, predicted = scores.float().max(0)
        mask = mask.to(best.device)
        known = mask != VOID
        below = torch.bucketize(best[known], self.thresholds.to(best.device))
        shape = self.counts.shape
        cell = (below * shape[1] + predicted[known]) * shape[2] + mask[known].long()
        self.counts += torch.bincount(cell, minlength=self.counts.numel()).view(shape).cpu()

    def confusion(self) -> Tensor:
        """int64 [T, C, C]: pixels by (threshold, predicted class, true class)."""
        per_class = self.counts.sum(0)
        background = self.counts.cumsum(0)[:-1]  # threshold j turns the bins up to j into background
        return torch.cat([background.sum(1, keepdim=True), per_class - background], 1)


def curves(confusion: Tensor, report_classes: Sequence[int]) -> dict[str, Tensor]:
    """Figures per threshold from confusion [T, C, C] (predicted, true).

    iou, class_precision, class_recall [T, C], NaN where a class has no such pixel. mIoU [T]: mean of iou over
    report_classes. precision, recall [T]: right foreground pixels (of the right class) among those predicted, and
    among those annotated foreground.
    """
    confusion = confusion.double()
    hit = confusion.diagonal(dim1=1, dim2=2)
    predicted, true = confusion.sum(2), confusion.sum(1)
    iou = hit / (predicted + true - hit)
    right = hit[:, 1:].sum(1)
    return {
        "iou": iou,
        "class_precision": hit / predicted,
        "class_recall": hit / true,
        "mIoU": iou[:, list(report_classes)].nanmean(1),
        "precision": right / predicted[:, 1:].sum(1),
        "recall": right / true[:, 1:].sum(1),
    }


COMBINED = "combined"


def count_pixels(system: Classifier, dataset: Dataset, scales: Sequence[float], processes: Processes,
                 title: str) -> dict[str, ThresholdCounts]:  # fmt: skip
    """Runs CAM inference over a data set, every image once, shared among the processes; all get the same counts.

    Returns those of the system's CAM under COMBINED and, where it has several parts, of each part under its name.
    """
    names = [COMBINED, *(system.parts if len(system.parts) > 1 else ())]
    counts = {name: ThresholdCounts(len(dataset.classes)) for name in names}
    indices = range(processes.rank, len(dataset), processes.count)
    stream = stream_parts(system, dataset, indices, scales, processes.device)
    for sample, parts in tqdm(stream, title, len(indices), disable=None if processes.is_main else True):
        for one, cams in zip(counts.values(), (combine(system, parts), *parts), strict=False):
            one.add(cams, sample.mask)
    for one in counts.values():
        one.counts = processes.sum(one.counts)
    return counts


def evaluate(system: Classifier, development: Dataset, validation: Dataset, scales: Sequence[float],
             processes: Processes) -> dict[str, Any]:  # fmt: skip
    """Chooses the background threshold by mIoU on the development split and measures there and on validation.

    Returns plain numbers and lists, ready for JSON; None stands for figures without pixels. Where the system's CAM has
    several parts, "parts" holds the same of each by itself, at its own threshold.
    """
    datasets = {"development": development, "validation": validation}
    counts = {
        split: count_pixels(system, dataset, scales, processes, f"CAMs of {split} images")
        for split, dataset in datasets.items()
    }
    measured = {
        name: _measure({split: found[name] for split, found in counts.items()}, datasets)
        for name in counts["validation"]
    }
    result: dict[str, Any] = {"scales": list(scales), "thresholds": [round(float(t), 4) for t in THRESHOLDS]}
    result |= measured.pop(COMBINED)
    return result | ({"parts": measured} if measured else {})


def _measure(counts: dict[str, ThresholdCounts], datasets: dict[str, Dataset]) -> dict[str, Any]:
    """The figures of one CAM on both splits, at the threshold that is best on the first."""
    chosen = None
    result: dict[str, Any] = {}
    for name, dataset in datasets.items():
        found = curves(counts[name].confusion(), dataset.report_classes)
        if chosen is None:
            chosen = int(found["mIoU"].nan_to_num(-1).argmax())
            result["threshold"] = round(float(THRESHOLDS[chosen]), 4)
        result[name] = {
            "images": len(dataset),
            **{key: plain(found[key][chosen]) for key in ("mIoU", "precision", "recall")},
            "report_classes": [dataset.classes[index] for index in dataset.report_classes],
            "classes": class_rows(found, chosen, dataset.classes),
            "curve": {key: [plain(value) for value in found[key]] for key in ("mIoU", "precision", "recall")},
        }
    return result


def class_rows(found: dict[str, Tensor], index: int, classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Per class name the figures of `curves` at one of its thresholds, ready for JSON."""
    sources = (("IoU", "iou"), ("precision", "class_precision"), ("recall", "class_recall"))
    return {
        label: {key: plain(found[source][index, number]) for key, source in sources}
        for number, label in enumerate(classes)
    }


def table(result: dict[str, Any]) -> str:
    """The validation figures as text: reported classes, then the others that have pixels; groups where there are."""
    figures = result["validation"]
    reported = figures["report_classes"]
    others = [name for name, row in figures["classes"].items() if name not in reported and row["recall"] is not None]
    lines = [f"{'class':<16}{'IoU':>8}{'precision':>11}{'recall':>8}"]
    for name in reported + others:
        row = figures["classes"][name]
        cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("IoU", "precision", "recall")]
        mark = "" if name in reported else "  (not in the mean)"
        lines.append(f"{name:<16}{cells[0]:>8}{cells[1]:>11}{cells[2]:>8}{mark}")
    means = ["-" if figures[key] is None else f"{figures[key]:.4f}" for key in ("mIoU", "precision", "recall")]
    lines.append(
        f"mIoU {means[0]} over {len(reported)} classes; foreground pixels: precision {means[1]}, recall {means[2]}"
    )
    there = f"{result['development']['images']} development images"
    if "threshold" in result:
        lines.append(
            f"{figures['images']} validation images, background threshold {result['threshold']:.2f} chosen on {there} "
            f"(mIoU there {result['development']['mIoU'] or 0:.4f})"
        )
    else:
        rates = [f"{result[split]['oc_rate']:.2%}" for split in ("validation", "development")]
        lines.append(
            f"{figures['images']} validation images, {rates[0]} of their pixels out of candidate; on {there} {rates[1]}"
        )
    if "groups" in figures:
        lines.append(group_table(figures["groups"]))
    return "\n".join(lines)


def summarise_stages(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Validation figures of each stage at its own threshold and, "at_first", at that of the first stage."""
    first = next(iter(results.values()))
    index = first["thresholds"].index(first["threshold"])
    summary = {}
    for name, result in results.items():
        figures = result["validation"]
        summary[name] = {key: figures[key] for key in ("mIoU", "precision", "recall")} | {
            "threshold": result["threshold"],
            "at_first": {key: values[index] for key, values in figures["curve"].items()},
        }
    return summary


def part_table(result: dict[str, Any]) -> str:
    """The parts of the CAM beside it, as text that begins with a new line; empty where there is but one."""
    if "parts" not in result:
        return ""
    groups = list(result["validation"].get("groups", ()))
    head = f"{'validation':<12}{'threshold':>10}{'mIoU':>8}{'precision':>11}{'recall':>8}"
    lines = ["", head + "".join(f"{f'{group} mIoU':>13}" for group in groups)]
    for name, row in (result["parts"] | {COMBINED: result}).items():
        figures = row["validation"]
        cells = _means(figures) + "".join(_cell(figures["groups"][group]["mIoU"], 13) for group in groups)
        lines.append(f"{name:<12}{row['threshold']:>10.2f}{cells}")
    return "\n".join(lines)


def stage_table(result: dict[str, Any]) -> str:
    """The stages side by side, as text that begins with a new line; empty where there is but one."""
    if "stages" not in result:
        return ""
    first = next(iter(result["stages"].values()))["threshold"]
    lines = ["", f"{'validation':<12}{'threshold':>10}{'mIoU':>8}{'precision':>11}{'recall':>8}   at {first:.2f}:"]
    for name, row in result["stages"].items():
        lines.append(f"{name:<12}{row['threshold']:>10.2f}{_means(row)}   {_means(row['at_first'])}")
    return "\n".join(lines)


def _means(figures: dict[str, Any]) -> str:
    return _cell(figures["mIoU"], 8) + _cell(figures["precision"], 11) + _cell(figures["recall"], 8)


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.4f}"


def plain(value: Tensor) -> float | None:
    """A number ready for JSON, None for NaN."""
    return None if math.isnan(value) else round(float(value), 6)
