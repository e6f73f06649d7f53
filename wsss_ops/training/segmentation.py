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
from wsss_ops.training.inference import equal_sizes, images_at_once, rescale
from wsss_ops.training.pictures import PANELS, Outside, make_row, save_outside, save_panels, title_of
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Segmenter

OUTSIDE = "oc.png"


@torch.no_grad()
def infer_probabilities(system: Segmenter, images: Tensor, scales: Sequence[float]) -> Tensor:
    """images uint8 [N, 3, H, W] -> float32 [N, C, H, W]: softmax, averaged over scales and flips, at the image's size.

    The network must be in eval mode.
    """
    height, width = images.shape[2:]
    pictures = normalize(images)
    total: Tensor | None = None
    for scale in scales:
        scaled = rescale(pictures, scale, system.stride)
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
    for samples in equal_sizes(dataset, indices, images_at_once(device)):
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


def report(system: Segmenter, dataset: Dataset, indices: Sequence[int], result: dict[str, Any], processes: Processes,
           out: Path) -> list[str]:  # fmt: skip
    """Prints the comparison with the baseline, where the system has one, and writes panels.png and oc.png, in it the
    baseline's predictions too, of the images with these indices, if any.

    Returns the names of the files.
    """
    networks = {"prediction": system}
    if (found_baseline := system.baseline()) is not None:
        baseline, before = found_baseline
        print(compare(before, result))
        networks = {"before": baseline, "after": system}
    if not indices:
        return []
    found = []  # per network
    for network in networks.values():
        network.network.to(processes.device)
        stream = stream_probabilities(network, dataset, indices, system.settings.scales, processes.device)
        found.append([(sample, scores.cpu()) for sample, scores in stream])
    save_panels(out / PANELS, [make_row(*own, dataset.classes) for own in found[-1]], dataset.classes)
    pictures = []
    for answers in zip(*found, strict=True):
        sample = answers[0][0]
        labels = [scores.argmax(0) for _, scores in answers]
        predictions = [(label.byte(), out_of_candidate(label, sample)) for label in labels]
        pictures.append(Outside(sample.image, sample.mask, predictions, title_of(sample, dataset.classes)))
    save_outside(out / OUTSIDE, pictures, list(networks), dataset.classes)
    return [PANELS, OUTSIDE]
