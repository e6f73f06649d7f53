"""What a training system is: a network, its stages, its loss, and the maps that inference reads from it."""

from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from wsss_ops.training.batches import Batch
from wsss_ops.training.data import Dataset
from wsss_ops.training.processes import Processes
from wsss_ops.training.settings import Settings


class Stage(NamedTuple):
    """A part of training with its own trainable parameters, optimiser and learning-rate schedule."""

    name: str
    epochs: int


class System(ABC):
    """What all systems have; each is a `Classifier`, of which `cam.py` is the model to copy, or a `Segmenter`.

    settings: an instance of the class's Settings. num_classes counts the background. ops: `wsss_ops` or
    `wsss_ops.reference`; uses_ops says whether it makes a difference. State beside parameters goes into buffers or
    extra state of network, which checkpoints save.
    """

    Settings: ClassVar[type[Settings]] = Settings
    uses_ops: ClassVar[bool] = True
    uses_masks: ClassVar[bool] = False  # whether `loss` takes the masks of batches
    network: nn.Module
    settings: Any
    class_images: dict[str, int] | None = None  # training images per reported class, where they are long-tailed

    @abstractmethod
    def __init__(self, settings: Any, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        """Builds the network."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in order."""

    @abstractmethod
    def enter(self, stage: int) -> list[dict[str, Any]]:
        """Prepares a stage (which parameters learn) and returns its optimiser groups, each with its lr."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's share of a batch, and figures to show (scalars, detached)."""

    def training_images(self, dataset: Dataset, out: Path) -> Dataset:
        """What the run in the folder out trains on: the images given or, for some systems, these with other masks.

        Raises ValueError where that cannot be had; makes nothing yet.
        """
        return dataset

    def prepare(self, dataset: Dataset, processes: Processes) -> None:  # noqa: B027, most take nothing
        """Takes from the training images, before training and before each resumption, what the loss needs of them."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels per cell of the map."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """The arithmetic that settings.precision asks for."""
        precision = self.settings.precision
        enabled = precision == "bfloat16" or (
            precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


class Classifier(System):
    """Base of the systems that learn from tags and show where the tagged classes are, in a CAM.

    The CAM is made of one map or of several, `parts`.
    """

    @abstractmethod
    def cam(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] normalised, H and W of stride * k + 1 pixels -> scores [N, C-1, h, w] before relu."""

    def displacements(self, images: Tensor) -> Tensor | None:
        """For pictures: where a sampler looks, from each CAM cell, in pixels (y, x): [N, 2, h, w]; None without one."""
        return None

    @property
    def parts(self) -> dict[str, float]:
        """The maps that `cams` gives, by name, and the weight of each in the CAM that inference makes of them."""
        return {"cam": 1.0}

    def cams(self, images: Tensor, tags: Tensor) -> list[Tensor]:
        """One map per part: images as for `cam`, tags bool [N, C-1] -> [N, C-1, h, w] before relu, each."""
        return [self.cam(images)]


class Segmenter(System):
    """Base of the systems that learn from pseudo-labels and label every pixel by themselves, without tags.

    Their figures and pictures are those of segmentation.py.
    """

    uses_masks: ClassVar[bool] = True

    @abstractmethod
    def training_images(self, dataset: Dataset, out: Path) -> Dataset:
        """The images with pseudo-labels in place of their masks; where the baseline does not fit is an error, too."""

    @abstractmethod
    def prepare(self, dataset: Dataset, processes: Processes) -> None:
        """Makes the pseudo-labels that are not there yet, too."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """images as for `Classifier.cam` -> logits [N, C, h, w], background first."""

    @abstractmethod
    def baseline(self) -> "tuple[Segmenter, dict[str, Any]] | None":
        """A trained system to compare with and the content of its metrics.json, if one was named."""
