"""Long-tailed training sets, thinned out of a data set, and figures of frequent and rare classes apart.

Benchmarks of long-tailed recognition give their classes numbers of images that fall exponentially from the most
frequent to the rarest. Here images show several classes at once, so that profile is an upper bound, see `kept_images`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from wsss_ops.training.data import Dataset, Sample

FIGURES = {"mIoU": "IoU", "precision": "precision", "recall": "recall"}  # of a group: the column of its classes' rows


def quotas(images: Sequence[int], ratio: float) -> list[int]:
    """How many images of each class a long tail allows, from how many there are.

    The class of rank r among K, by number of images, gets max(images) * ratio ** (-r / (K - 1)), rounded; at least one
    and at most all that it has.
    """
    quota, steps = [0] * len(images), max(1, len(images) - 1)
    for rank, number in enumerate(_ranked(images)):
        wanted = max(1, round(max(images) * ratio ** (-rank / steps)))
        quota[number] = min(images[number], wanted)
    return quota


def kept_images(tags: Tensor, report_classes: Sequence[int], ratio: float) -> list[int]:
    """The indices, ascending, of the images that make a long tail of the reported classes.

    tags: bool [M, C-1]. report_classes: indices in which 0 is the background, as in `Dataset`. The same arguments give
    the same images, whatever the seed of a run.

    Images are taken in a fixed shuffled order, those of the rarest class first, so that an image is decided with its
    rarest class, and dropped where any of its classes has its quota already. So no class exceeds its quota, and one
    falls short only where each further image of it shows a class that is full: mostly a rare one, now and then a more
    frequent one that came along with the rare. Images without a reported class are kept.
    """
    present = tags.numpy()[:, [index - 1 for index in report_classes if index > 0]]
    images = present.sum(0).tolist()
    quota, count = np.array(quotas(images, ratio), int), np.zeros(len(images), int)
    rank = np.argsort(_ranked(images))
    rarest = np.where(present, rank, -1).max(1, initial=-1)
    shuffled = np.random.RandomState(0).permutation(len(present))  # whose numbers are the same in every NumPy
    kept = []
    for index in shuffled[np.argsort(-rarest[shuffled], kind="stable")]:
        if (count < quota)[present[index]].all():
            count += present[index]
            kept.append(int(index))
    return sorted(kept)


def _ranked(images: Sequence[int]) -> list[int]:
    """The classes from the one of most images to that of fewest, the first of equals first."""
    return sorted(range(len(images)), key=lambda number: -images[number])


class LongTailed:
    """The images of a data set that `kept_images` keeps."""

    def __init__(self, dataset: Dataset, ratio: float) -> None:
        self.dataset = dataset
        self.indices = kept_images(dataset.tags, dataset.report_classes, ratio)
        self.classes, self.report_classes = dataset.classes, dataset.report_classes
        self.tags = dataset.tags[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]

    @property
    def class_images(self) -> dict[str, int]:
        """Images per reported class without the background, the most frequent class first."""
        numbers = [index for index in self.report_classes if index > 0]
        images = self.tags.sum(0)[[index - 1 for index in numbers]].tolist()
        return {self.classes[numbers[place]]: images[place] for place in _ranked(images)}

    def summary(self) -> str:
        """What was kept, in a line."""
        return f"long-tailed: {len(self)} of {len(self.dataset)} images; {_listed(self.class_images)}"


def group_figures(
    rows: Mapping[str, Mapping[str, float | None]], class_images: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Figures of head, middle and tail: the means over a group's classes of their rows (see `class_rows`).

    class_images: training images per class. The groups are thirds of the classes by these; of classes that are left
    over the first goes to the head, the second to the tail. A figure that a class lacks (None, such as the precision of
    one that is never predicted) is left out of the mean.
    """
    names = list(class_images)
    ranked = [names[number] for number in _ranked(list(class_images.values()))]
    third, left_over = divmod(len(ranked), 3)
    head, tail = third + (left_over > 0), len(ranked) - third - (left_over > 1)
    groups = {"head": ranked[:head], "middle": ranked[head:tail], "tail": ranked[tail:]}
    return {
        group: {
            "classes": members,
            "training_images": [class_images[name] for name in members],
            **{figure: _mean([rows[name][column] for name in members]) for figure, column in FIGURES.items()},
        }
        for group, members in groups.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None


def group_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """The groups as text, in the columns of the table of classes, each with its classes and their training images."""
    lines = []
    for name, group in groups.items():
        cells = ["-" if group[key] is None else f"{group[key]:.3f}" for key in FIGURES]
        members = _listed(dict(zip(group["classes"], group["training_images"], strict=True)))
        lines.append(f"{name:<16}{cells[0]:>8}{cells[1]:>11}{cells[2]:>8}  {members}")
    return "\n".join(lines)


def _listed(class_images: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {images}" for name, images in class_images.items())
