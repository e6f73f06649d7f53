"""Pseudo-labels: the CAMs of training images cut at a background threshold, kept as a folder of palette PNGs."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from wsss_ops._files import write_atomic, write_json
from wsss_ops.training.data import Dataset, Sample, fingerprint
from wsss_ops.training.inference import stream_cams, with_threshold
from wsss_ops.training.pictures import palette
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Classifier

FOLDER, RECORD = "pseudo_labels", "labels.json"


class PseudoLabelled:
    """A data set whose masks are the pseudo-labels in a folder, read one by one."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self.classes, self.tags, self.report_classes = dataset.classes, dataset.tags, dataset.report_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return sample._replace(mask=read_label(self.folder, sample))


def read_label(folder: Path, sample: Sample) -> Tensor:
    """The pseudo-label of an image, uint8 [H, W]. Raises ValueError naming a file that is missing or does not fit."""
    file = folder / f"{sample.name}.png"
    try:
        with Image.open(file) as picture:
            label = torch.from_numpy(np.array(picture))
    except OSError as error:
        raise ValueError(f"pseudo-label {file} cannot be read: {error}") from error
    if label.shape != sample.mask.shape:
        raise ValueError(f"pseudo-label {file} is {list(label.shape)} pixels, its image {list(sample.mask.shape)}")
    return label


def make_pseudo_labels(
    system: Classifier, dataset: Dataset, scales: tuple[float, ...], threshold: float, folder: Path,
    processes: Processes, about: dict[str, Any],
) -> None:  # fmt: skip
    """Labels every image with its class of highest CAM, or background where none exceeds threshold.

    Shared among the processes. Files that are there from before a kill are kept. The record, with about, comes last:
    its presence says that all labels are there.
    """
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    mine = range(processes.rank, len(dataset), processes.count)
    todo = [index for index in mine if not (folder / f"{dataset.name(index)}.png").exists()]
    processes.print(f"making pseudo-labels of {len(dataset)} images in {folder}")
    stream = stream_cams(system, dataset, todo, scales, processes.device)
    bar = tqdm(stream, "pseudo-labels", len(mine), initial=len(mine) - len(todo),
               disable=None if processes.is_main else True)  # fmt: skip
    for sample, cams in bar:
        picture = Image.fromarray(with_threshold(cams, threshold).argmax(0).byte().cpu().numpy(), "P")
        picture.putpalette(palette().tobytes())
        write_atomic(folder / f"{sample.name}.png", functools.partial(picture.save, format="PNG"))
    processes.wait()
    if processes.is_main:
        record = about | {"threshold": threshold, "scales": list(scales), "training_images": fingerprint(dataset)}
        write_json(folder / RECORD, record)
    processes.wait()
