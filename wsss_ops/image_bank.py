"""The last image seen of each class, so that rare classes can join every batch of SFC.

Zhao et al., SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation, AAAI 2024 (arXiv 2401.11719),
the method's Image Bank Re-sampling. That only classes seen so far are drawn, and none twice as long as there are
enough, is our reading: the published code draws among all slots, empty ones included, with replacement.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import FLOATS, INTEGERS, check_device, check_dtype, check_int, check_shape, check_tensor
from ._layout import tagged


class Stored(NamedTuple):
    """Images as `ImageBank.sample` gives them, or one of them, on the CPU."""

    images: Tensor  # [k, 3, H, W]
    tags: Tensor  # [k, num_classes]
    valid: Tensor  # bool [k, H, W]


class ImageBank(nn.Module):
    """A slot for each foreground class with the last image that had it, its tags and its valid mask.

    Slots stay on the CPU wherever the module goes, and are saved with its state_dict. An image of several classes is
    kept once.

    Args:
        num_classes: how many foreground classes there are.

    Raises:
        TypeError: if num_classes is no int.
        ValueError: if num_classes is below 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, 1)
        self._slots: dict[int, Stored] = {}

    def __len__(self) -> int:
        """How many classes have been seen."""
        return len(self._slots)

    def update(self, images: Tensor, tags: Tensor, valid: Tensor) -> None:
        """Puts each image of a batch into the slots of its classes; later ones replace earlier ones.

        Args:
            images: [N, 3, H, W], all of the size of those before, since a sample is one tensor.
            tags: [N, num_classes], the foreground classes of each image: any number but 0 means present.
            valid: bool [N, H, W], false on the padding of a crop.

        Raises:
            TypeError: if a tensor is of another dtype, or images not of that of the images before.
            ValueError: if shapes do not fit each other or the images before, or devices differ.
        """
        check_tensor("images", images, "N, 3, H, W", FLOATS + INTEGERS)
        check_tensor("tags", tags, "N, num_classes", FLOATS + INTEGERS)
        check_shape("tags", tags, (images.shape[0], self.num_classes))
        check_tensor("valid", valid, "N, H, W", (torch.bool,))
        check_shape("valid", valid, (images.shape[0], *images.shape[2:]))
        for name, tensor in (("tags", tags), ("valid", valid)):
            check_device(name, tensor, "images", images)
        check_shape("images", images, (images.shape[0], 3, *images.shape[2:]))
        if self._slots:
            before = next(iter(self._slots.values())).images
            if images.shape[1:] != before.shape:
                raise ValueError(
                    f"images must be of the size of those before, {list(before.shape)}, got {list(images.shape)}"
                )
            check_dtype("images", images, "the bank", before)
        last = {c: i for i, c in tagged(tags).nonzero().tolist()}
        kept = {
            i: Stored(*(part[i].detach().to("cpu", copy=True) for part in (images, tags, valid)))
            for i in set(last.values())
        }
        self._slots.update((c, kept[i]) for c, i in last.items())

    def sample(self, k: int, generator: torch.Generator | None = None) -> Stored:
        """k images of classes drawn uniformly among those seen, with replacement only where k exceeds their number.

        Args:
            k: how many, at least 1.
            generator: of a CPU; None for PyTorch's own.

        Raises:
            TypeError: if k is no int, or generator no torch.Generator.
            ValueError: if k is below 1, or no class has been seen.
        """
        check_int("k", k, 1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if not self._slots:
            raise ValueError("the bank is empty: update it with images before drawing from it")
        classes = sorted(self._slots)
        if k <= len(classes):
            drawn = torch.randperm(len(classes), generator=generator)[:k]
        else:
            drawn = torch.randint(len(classes), (k,), generator=generator)
        chosen = [self._slots[classes[i]] for i in drawn.tolist()]
        return Stored(*(torch.stack(parts) for parts in zip(*chosen, strict=True)))

    def get_extra_state(self) -> dict[str, Any]:
        """Plain containers of tensors, each image once."""
        kept = list({id(slot): slot for slot in self._slots.values()}.values())
        places = {id(slot): i for i, slot in enumerate(kept)}
        slots = {c: places[id(slot)] for c, slot in self._slots.items()}
        return {"num_classes": self.num_classes, "images": [tuple(slot) for slot in kept], "slots": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_extra_state` gave; ValueError if that bank had another number of classes."""
        if state["num_classes"] != self.num_classes:
            raise ValueError(
                f"num_classes of the state must be {self.num_classes}, as this bank's, got {state['num_classes']}"
            )
        kept = [Stored(*(part.to("cpu", copy=True) for part in parts)) for parts in state["images"]]
        self._slots = {c: kept[i] for c, i in state["slots"].items()}
