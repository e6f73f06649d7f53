"""Settings of a training run: one dataclass gives the command line, the record in the run folder and the defaults."""

import argparse
import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from wsss_ops.training.backbones import BACKBONES


def option(
    kind: Callable[[str], Any], default: Any, help: str, *, choices: tuple[Any, ...] | None = None,
    nargs: str | None = None, above: float | None = None, at_least: float | None = None, at_most: float | None = None,
    path: bool = False, recorded: Literal["always", "changed", "never"] = "always",
) -> Any:  # fmt: skip
    """A dataclass field that is also a command-line option.

    kind, default, help, choices and nargs are what argparse takes; above, at_least and at_most the range. path: it
    names a file or folder. recorded: whether it is part of a run's record; "changed": only where it is not the default,
    so that runs from before the setting are recognised.
    """
    bounds = {"above": above, "at least": at_least, "at most": at_most}
    metadata = {"type": kind, "help": help, "choices": choices, "nargs": nargs, "bounds": bounds, "path": path,
                "recorded": recorded}  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the figures of a run, common to all systems.

    A field that is given as None takes the default of the backbone.
    """

    data: str | None = option(str, None, "VOC-layout folder or zip; default: the generated scenes", path=True)
    imbalance: float = option(
        float, 1.0, "thin the training images to a long tail: how many times as many of the most frequent class as of "
        "the rarest; 1: all as they are", at_least=1, recorded="changed",
    )  # fmt: skip
    seed: int = option(int, 0, "seed of weights, data order and augmentation", at_least=0)
    backbone: str = option(str, None, "default: efficientnet_lite0, for generated scenes tiny", choices=BACKBONES)
    weights: str | None = option(str, None, "state dict file of the backbone")
    output_stride: int = option(int, None, "pixels per feature")
    epochs: int = option(int, None, "passes over the training images, of several stages the first one's", above=0)
    batch_size: int = option(int, 16, "images per step, over all processes", above=0)
    size: int = option(int, None, "side of the training crops in pixels")
    tune_blocks: int = option(int, None, "last blocks of the backbone that are trained, -1 for all")
    lr: float = option(float, None, "learning rate of the layers behind the backbone", above=0)
    backbone_lr: float = option(float, None, "learning rate of the backbone", at_least=0)
    weight_decay: float = option(float, 1e-4, "weight decay", at_least=0)
    precision: str = option(
        str, "auto", "arithmetic of training and inference; auto: bfloat16 on GPUs that have it, else float32",
        choices=("auto", "float32", "bfloat16"), recorded="changed",
    )  # fmt: skip
    scales: tuple[float, ...] = option(
        float, None, "image scales of CAM inference, each with its flip", nargs="+", above=0
    )

    @property
    def data_name(self) -> str:
        """What an error calls the data."""
        return self.data or "the generated scenes, as no --data is given,"

    def __post_init__(self) -> None:
        if self.backbone is None:
            object.__setattr__(self, "backbone", "tiny" if self.data is None else "efficientnet_lite0")
        for name, value in _DEFAULTS[self.backbone].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.size < self.output_stride:
            raise ValueError(f"size must be at least output_stride, {self.output_stride}, got {self.size}")

    def record(self) -> dict[str, Any]:
        """What the run folder keeps of the settings, by name; paths are absolute."""
        kept: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value, recorded = getattr(self, field.name), field.metadata["recorded"]
            if recorded == "always" or (recorded == "changed" and value != field.default):
                kept[field.name] = str(Path(value).resolve()) if value and field.metadata["path"] else value
        return kept


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt, "at least": operator.ge, "at most": operator.le,
}  # fmt: skip


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raises ValueError where a value, or one of several, is not finite or out of the field's bounds."""
    if value is None:
        return
    values = (value,) if field.metadata["nargs"] is None else value
    if not values:
        raise ValueError(f"{field.name} must be one or more numbers, got none")
    if field.metadata["type"] is float and not all(map(math.isfinite, values)):
        raise ValueError(f"{field.name} must be finite, got {value}")
    for words, bound in field.metadata["bounds"].items():
        if bound is not None and not all(_HOLDS[words](one, bound) for one in values):
            raise ValueError(f"{field.name} must be {words} {bound}, got {value}")


_PRETRAINED: dict[str, Any] = {
    "output_stride": 16, "epochs": 6, "size": 256, "tune_blocks": 6, "lr": 1e-3, "backbone_lr": 1e-4,
    "scales": (1.0, 1.5, 2.0, 2.5),
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": _PRETRAINED,
    "resnet18": _PRETRAINED | {"tune_blocks": 4},
    "resnet50": _PRETRAINED | {"tune_blocks": 9},
    "tiny": {"output_stride": 8, "epochs": 20, "size": 96, "tune_blocks": -1, "lr": 4e-3, "backbone_lr": 4e-3,
             "scales": (1.0,)},
}  # fmt: skip

S = TypeVar("S", bound=Settings)


def _default_text(field: dataclasses.Field[Any]) -> str:
    """What --help says of a field's default; many depend on the backbone."""
    if field.default is None and field.name not in _PRETRAINED:
        return ""
    if field.default is not None:
        return f" (default: {_value_text(field.default)})"
    texts = [f"{_value_text(values[field.name])} {backbone}" for backbone, values in _DEFAULTS.items()]
    return f" (default: {', '.join(texts)})"


def _value_text(value: Any) -> str:
    """As it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_settings(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Adds an option for every field of a settings class, those of its own first."""
    common = {field.name for field in dataclasses.fields(Settings)}
    own = parser.add_argument_group("settings of this system")
    shared = parser.add_argument_group("settings of all systems")
    for field in dataclasses.fields(settings):
        (shared if field.name in common else own).add_argument(
            f"--{field.name.replace('_', '-')}", type=field.metadata["type"], nargs=field.metadata["nargs"],
            default=field.default, choices=field.metadata["choices"],
            help=field.metadata["help"] + _default_text(field),
        )  # fmt: skip


def read_settings(args: argparse.Namespace, settings: type[S]) -> S:
    """Makes the settings from parsed arguments. Raises ValueError for values out of range."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return settings(**values)
