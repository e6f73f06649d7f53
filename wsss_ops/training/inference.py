"""CAMs over image scales and flips."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_ops.training.batches import normalize
from wsss_ops.training.data import Dataset, Sample
from wsss_ops.training.system import Classifier


def rescale(pictures: Tensor, scale: float, stride: int) -> Tensor:
    """pictures float [N, 3, H, W], resized by scale to the nearest sides of stride * k + 1 pixels.

    On these the corners of map and image coincide, so the map is not shifted (see backbones.py).
    """
    size = [stride * max(1, round((side - 1) * scale / stride)) + 1 for side in pictures.shape[2:]]
    return F.interpolate(pictures, size, mode="bilinear", align_corners=True)


@torch.no_grad()
def infer_parts(
    system: Classifier, images: Tensor, tags: Tensor, scales: Sequence[float], flip: bool = True
) -> list[Tensor]:
    """images uint8 [N, 3, H, W], tags bool [N, C-1] -> per part of the system's CAM float32 [N, C-1, H, W] in 0..1,
    zero where not tagged.

    Per scale and flip: relu of the part, resized to the image. Their sum, masked by the tags, is divided by its maximum
    per map + 1e-5. The network must be in eval mode.
    """
    height, width = images.shape[2:]
    pictures = normalize(images)
    present = torch.cat([tags, tags]) if flip else tags
    totals = [torch.zeros(len(images), tags.shape[1], height, width, device=images.device) for _ in system.parts]
    for scale in scales:
        scaled = rescale(pictures, scale, system.stride)
        views = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
        with system.autocast(images.device):
            parts = system.cams(views.contiguous(memory_format=torch.channels_last), present)
        for total, cams in zip(totals, parts, strict=True):
            cams = cams.float().relu()
            if flip:
                cams = cams[: len(images)] + cams[len(images) :].flip(-1)
            total.add_(F.interpolate(cams, (height, width), mode="bilinear", align_corners=True))
    masked = (total * tags[:, :, None, None] for total in totals)
    return [total / (total.amax((2, 3), keepdim=True) + 1e-5) for total in masked]


def combine(system: Classifier, parts: Sequence[Tensor]) -> Tensor:
    """The CAM of the system: the mean of its parts with their weights."""
    weights = torch.tensor(list(system.parts.values()), device=parts[0].device)
    return torch.tensordot(weights / weights.sum(), torch.stack(list(parts)), 1)


def with_threshold(cams: Tensor, threshold: float) -> Tensor:
    """cams [C-1, H, W] -> scores [C, H, W] whose background is the threshold everywhere; the label is their argmax."""
    return torch.cat([torch.full_like(cams[:1], threshold), cams])


def images_at_once(device: torch.device) -> int:
    """Small maps leave a GPU idle; a CPU gains nothing from more than an image and its flip."""
    return 8 if device.type == "cuda" else 1


def equal_sizes(dataset: Dataset, indices: Sequence[int], batch_size: int) -> Iterator[list[Sample]]:
    """The samples in order, in lists of consecutive ones of equal size, at most batch_size each."""
    waiting: list[Sample] = []
    for index in indices:
        sample = dataset[index]
        if waiting and (len(waiting) == batch_size or sample.image.shape != waiting[0].image.shape):
            yield waiting
            waiting = []
        waiting.append(sample)
    if waiting:
        yield waiting


def stream_parts(
    system: Classifier, dataset: Dataset, indices: Sequence[int], scales: Sequence[float], device: torch.device
) -> Iterator[tuple[Sample, tuple[Tensor, ...]]]:
    """Yields each sample with its parts [C-1, H, W] on device. Memory is that of one batch, whatever the data set."""
    system.network.eval()
    for samples in equal_sizes(dataset, indices, images_at_once(device)):
        images, tags = (torch.stack([getattr(s, part) for s in samples]).to(device) for part in ("image", "tags"))
        found = infer_parts(system, images, tags, scales)
        yield from zip(samples, zip(*found, strict=True), strict=True)


def stream_cams(
    system: Classifier, dataset: Dataset, indices: Sequence[int], scales: Sequence[float], device: torch.device
) -> Iterator[tuple[Sample, Tensor]]:
    """Yields each sample with its CAMs [C-1, H, W] on device, made of the parts of `stream_parts`."""
    for sample, parts in stream_parts(system, dataset, indices, scales, device):
        yield sample, combine(system, parts)
