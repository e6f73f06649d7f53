"""PPL: a CAM network whose last blocks also look at the patches of a map, and so find weaker parts of objects.

Li et al., Progressive Patch Learning for Weakly Supervised Semantic Segmentation, TMM 2022 (arXiv 2209.07828).
README.md here says what is the paper's and what is our reading.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wsss_ops.training.backbones import Backbone
from wsss_ops.training.cam import CAM, CamSystem, SettingsAfterCam, StagedCamNetwork
from wsss_ops.training.settings import Settings, option
from wsss_ops.training.system import Stage


@dataclass(frozen=True, kw_only=True)
class PplSettings(SettingsAfterCam):
    """Settings of PPL: those of the CAM stage, and of patch learning."""

    mode: str = option(
        str, "progressive", "progressive: a stage for each position, one after another; explicit: one stage with all "
        "positions, whose gradients end where the maps are split", choices=("progressive", "explicit"),
    )  # fmt: skip
    positions: tuple[int, ...] = option(
        int, None, "where maps are split: how many of the backbone's last blocks run on patches; the 3x3 layer "
        "behind them always does, with 0 that alone (default: 6 2, tiny 3 2)", nargs="+", at_least=0,
    )  # fmt: skip
    grids: tuple[int, ...] = option(
        int, (2, 4), "patches per row and per column of a map, for each position", nargs="+", above=0
    )
    stage_epochs: int = option(
        int, None, "passes over the training images in each stage of patch learning (default: 1, tiny 2)", above=0
    )
    stage_rate: float = option(
        float, 0.3, "learning rates in the stages of patch learning, as multiples of --lr and --backbone-lr", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        tiny = self.backbone == "tiny"
        for name, default in (("positions", (3, 2) if tiny else (6, 2)), ("stage_epochs", 2 if tiny else 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if len(self.grids) != len(self.positions):
            raise ValueError(f"grids must be as many numbers as positions has, {len(self.positions)}, got {self.grids}")
        cells = math.ceil(self.size / self.output_stride)
        if max(self.grids) > cells:
            raise ValueError(f"grids must be at most {cells}, the cells of a crop's side, got {self.grids}")


class PplNetwork(StagedCamNetwork):
    """The CAM network with branches on patches; `stage` says which of them are in use.

    A branch splits the map in front of the backbone's last blocks and runs these and the 3x3 layer (`sampler`) on every
    patch. `patch_classifier` takes the place of `classifier` in the later stages: it reads the whole map's channels and
    each branch's.
    """

    def __init__(self, backbone: Backbone, num_classes: int, ops: ModuleType, settings: PplSettings,
                 width: int = 256) -> None:  # fmt: skip
        super().__init__(backbone, num_classes, width)
        self.blocks = [*backbone.blocks, self.sampler, nn.ReLU()]  # a list, as the backbone's: it registers nothing
        explicit = settings.mode == "explicit"
        branches = [
            ops.PatchLearning(nn.Sequential(*self.blocks), len(backbone.blocks) - last, (side, side), detach=explicit)
            for last, side in zip(settings.positions, settings.grids, strict=True)
        ]
        self.branches = [branches] if explicit else [[branch] for branch in branches]  # per stage behind the CAM
        maps = 1 + len(self.branches[0])
        self.patch_classifier = nn.Conv2d(maps * width, num_classes, 1, bias=False)
        self.merge = ops.patch_merge

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W], normalised -> logits [N, num_classes] and CAM [N, num_classes, h, w]."""
        if self.stage == CAM:
            return super().forward(images)
        x, parts = self.backbone.prepare(images), []
        for position, block in enumerate(self.blocks):
            for branch in self.branches[self.stage - 1]:
                if branch.position == position:
                    parts.append((branch.patches(x), branch.grid))
            x = block(x)
        merged = [self.merge(patches, grid, x.shape[2:]) for patches, grid in parts]
        cam = self.patch_classifier(torch.cat([x, *merged], 1))
        return cam.mean((2, 3)), cam

    @torch.no_grad()
    def start_patches(self) -> None:
        """Lets `patch_classifier` start as `classifier` on the mean of whole map and branches."""
        maps = self.patch_classifier.in_channels // self.classifier.in_channels
        self.patch_classifier.weight.copy_(self.classifier.weight.repeat(1, maps, 1, 1) / maps)


class PplSystem(CamSystem):
    """Progressive patch learning: a CAM that learns from patches of its maps, too."""

    Settings: ClassVar[type[Settings]] = PplSettings
    uses_ops = True
    network: PplNetwork

    def __init__(self, settings: PplSettings, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        super().__init__(settings, num_classes, ops, pretrained=pretrained)
        backbone = self.network.backbone
        if max(settings.positions) > len(backbone.blocks):
            raise ValueError(
                f"positions must be at most {len(backbone.blocks)}, the blocks of {settings.backbone}, "
                f"got {settings.positions}"
            )
        self.network = PplNetwork(backbone, num_classes - 1, ops, settings)

    def stages(self) -> list[Stage]:
        count = len(self.network.branches)
        names = ["patches"] if count == 1 else [f"patches{number}" for number in range(1, count + 1)]
        return [Stage("cam", self.settings.epochs), *(Stage(name, self.settings.stage_epochs) for name in names)]

    def enter(self, stage: int) -> list[dict[str, Any]]:
        network, settings = self.network, self.settings
        if network.stage == CAM and stage != CAM:  # on resumption in a later stage its classifier has learnt already
            network.start_patches()
        network.stage = stage
        network.classifier.requires_grad_(stage == CAM)
        network.patch_classifier.requires_grad_(stage != CAM)
        groups = super().enter(stage)
        if stage == CAM:
            return groups
        groups[0]["params"] = [*network.sampler.parameters(), *network.patch_classifier.parameters()]
        return [group | {"lr": settings.stage_rate * group["lr"]} for group in groups]
