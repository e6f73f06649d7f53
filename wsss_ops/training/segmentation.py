"""Figures and pictures of segmentation networks, which label pixels without tags: mIoU and out-of-candidate pixels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from wsss_ops.training.batches import normalize
from wsss_ops.training.data import VOID, Dataset, Sample, with_background
from wsss_ops.training.evaluation import class_rows, curves, plain
from wsss_ops.training.inference import equal_sizes
from wsss_ops.training.pictures import Outside, Row, save_outside, save_panels
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Segmenter

PANELS, OUTSIDE = "panels.png", "oc.png"


@torch.no_grad()
def infer_probabilities(system: Segmenter, images: Tensor, scales: Sequence[float]) -> Tensor:
    """images uint8 [N, 3, H, W] -> float32 [N, C, H, W]: softmax, averaged over scales and flips, at the image's size.

    The network must be in eval mode.
    """
    height, width = images.shape[2:]
    stride, pictures = system.stride, normalize(images)
    total: Tensor | None = None
    for scale in scales:
        size = [stride * max(1, round((side - 1) * scale / stride)) + 1 for side in (height, width)]
        scaled = F.interpolate(pictures, size, mode="bilinear", align_corners=True)
        views = torch.cat([scaled, scaled.flip(-1)]).contiguous(memory_format=torch.channels_last)
        with system.autocast(images.device):
            logits = system.logits(views)
        resized = F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=True)
        straight, mirrored = resized.softmax(1).chunk(2)
        both = straight + mirrored.flip(-1)
        total = both if total is None else total + both
    assert total is not None
    return total / (2 * len(scales))


def stream_probabilities(
    system: Segmenter, dataset: Dataset, indices: Sequence[int], scales: Sequence[float], device: torch.device
) -> Iterator[tuple[Sample, Tensor]]:
    """Yields each sample with its class probabilities [C, H, W] on device."""
    system.network.eval()
    for samples in equal_sizes(dataset, indices, 8 if device.type == "cuda" else 1):
        images = torch.stack([sample.image for sample in samples]).to(device)
        yield from zip(samples, infer_probabilities(system, images, scales), strict=True)


def out_of_candidate(predicted: Tensor, sample: Sample) -> Tensor:
    """bool [H, W]: whether the predicted class of a pixel, int64 [H, W] on the CPU, is none of its image's tags."""
    return ~with_background(sample.tags)[predicted]


def evaluate(system: Segmenter, development: Dataset, validation: Dataset, scales: Sequence[float],
             processes: Processes) -> dict[str, Any]:  # fmt: skip
    """Figures on both splits: IoU, precision and recall per class, mIoU, and the OC rate, the share of all pixels
    whose predicted class is not among the image's tags.

    Returns plain numbers and lists, ready for JSON; None stands for figures without pixels.
    """
    result: dict[str, Any] = {"scales": list(scales)}
    for name, dataset in (("development", development), ("validation", validation)):
        classes = len(dataset.classes)
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        outside = torch.zeros(2, dtype=torch.int64)  # OC pixels, all pixels
        indices = range(processes.rank, len(dataset), processes.count)
        stream = stream_probabilities(system, dataset, indices, scales, processes.device)
        title = f"segmentation of {name} images"
        for sample, scores in tqdm(stream, title, len(indices), disable=None if processes.is_main else True):
            predicted, mask = scores.argmax(0).cpu(), sample.mask
            known = mask != VOID
            cells = predicted[known] * classes + mask[known].long()
            confusion += torch.bincount(cells, minlength=classes**2).view(classes, classes)
            outside += torch.tensor([int(out_of_candidate(predicted, sample).sum()), mask.numel()])
        found = curves(processes.sum(confusion)[None], dataset.report_classes)
        outside = processes.sum(outside)
        result[name] = {
            "images": len(dataset),
            **{key: plain(found[key][0]) for key in ("mIoU", "precision", "recall")},
            "oc_rate": plain(outside[0].double() / outside[1]),
            "report_classes": [dataset.classes[index] for index in dataset.report_classes],
            "classes": class_rows(found, 0, dataset.classes),
        }
    return result


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Validation figures of two runs side by side, as text that begins with a new line."""
    lines = ["", f"{'validation':<12}{'mIoU':>8}{'OC pixels':>11}{'precision':>11}{'recall':>8}"]
    for name, result in (("baseline", before), ("this run", after)):
        own = result["validation"]
        columns = (("mIoU", 8, ".4f"), ("oc_rate", 11, ".2%"), ("precision", 11, ".4f"), ("recall", 8, ".4f"))
        cells = (f"{'-' if own[key] is None else format(own[key], form):>{width}}" for key, width, form in columns)
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


def save_pictures(system: Segmenter, dataset: Dataset, indices: Sequence[int], scales: Sequence[float],
                  processes: Processes, out: Path) -> list[str]:  # fmt: skip
    """Writes panels.png and oc.png, in it the baseline's predictions too where the system has one; returns names."""
    stream = stream_probabilities(system, dataset, indices, scales, processes.device)
    found = [(sample, scores.cpu()) for sample, scores in stream]
    titles = [
        f"{sample.name}: {', '.join(dataset.classes[int(index) + 1] for index in sample.tags.nonzero())}"
        for sample, _ in found
    ]
    rows = [
        Row(sample.image, sample.mask, scores[1:], scores.argmax(0).byte(), title)
        for (sample, scores), title in zip(found, titles, strict=True)
    ]
    save_panels(out / PANELS, rows, dataset.classes)
    networks, labels = ["prediction"], [[scores.argmax(0)] for _, scores in found]
    if (found_baseline := system.baseline()) is not None:
        baseline, _ = found_baseline
        baseline.network.to(processes.device)
        before = stream_probabilities(baseline, dataset, indices, scales, processes.device)
        networks, labels = ["before", "after"], [
            [scores.argmax(0).cpu(), *own] for (_, scores), own in zip(before, labels, strict=True)
        ]  # fmt: skip
    pictures = [
        Outside(sample.image, sample.mask, [(p.byte(), out_of_candidate(p, sample)) for p in predicted], title)
        for (sample, _), predicted, title in zip(found, labels, titles, strict=True)
    ]
    save_outside(out / OUTSIDE, pictures, networks, dataset.classes)
    return [PANELS, OUTSIDE]
