"""SFC: a CAM network whose classifier learns to agree with prototypes of its own features, rare classes most.

Zhao et al., SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation, AAAI 2024 (arXiv 2401.11719).
README.md here says what is the paper's and what is our reading.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_ops import ImageBank
from wsss_ops.training.backbones import Backbone
from wsss_ops.training.batches import Batch
from wsss_ops.training.cam import CAM, CamSystem, SettingsAfterCam, StagedCamNetwork
from wsss_ops.training.data import Dataset, with_background
from wsss_ops.training.processes import Processes
from wsss_ops.training.settings import Settings, option
from wsss_ops.training.system import Stage

LEVEL_CHANNELS = (128, 128, 256, 256)  # of the maps that prototypes are taken from, finest first
AFFINITY_CHANNELS = 192


@dataclass(frozen=True, kw_only=True)
class SfcSettings(SettingsAfterCam):
    """Settings of SFC: those of the CAM stage, and of the calibration."""

    sfc_epochs: int = option(int, 1, "passes over the training images in the stage sfc", above=0)
    sfc_rate: float = option(
        float, 0.3, "learning rates in the stage sfc, as multiples of --lr and --backbone-lr", above=0
    )
    bank: int = option(
        int,
        4,
        "images of the bank, of classes drawn alike, that join each batch; model files hold them; 0: none",
        at_least=0,
    )
    prototype_weight: float = option(
        float, 1.6, "weight of the loss between classifier CAM and prototype CAM", at_least=0
    )
    scale_weight: float = option(
        float, 0.8, "weight of the loss between the classifier CAMs of two image sizes", at_least=0
    )
    background_scale: float = option(
        float, 0.3, "what the background is multiplied by before seeds are taken", at_least=0
    )
    prototype_share: float = option(
        float, 0.15, "weight of the prototype CAM beside the refined one in inference", at_least=0
    )


class Maps(NamedTuple):
    """What the network makes of images in the stage sfc; h x w is the size of the CAM."""

    logits: Tensor  # [N, num_classes]
    cam: Tensor  # [N, num_classes, h, w], the classifier's
    levels: list[Tensor]  # [N, D_l, h_l, w_l] each, finest first
    embedded: Tensor  # [N, AFFINITY_CHANNELS, h, w], what `affinity` takes


class SfcNetwork(StagedCamNetwork):
    """The CAM network with 1x1 layers on the backbone's levels (`sides`), for prototypes, and on image and features
    (`embedding`), for affinities. Neither sends gradient into the backbone. `bank` and `coefficients` are what training
    adds to batches and weighs classes with.
    """

    def __init__(self, backbone: Backbone, num_classes: int, width: int = 256) -> None:
        super().__init__(backbone, num_classes, width)
        channels = backbone.level_channels
        widths = LEVEL_CHANNELS[-len(channels) :]
        self.sides = nn.ModuleList(nn.Conv2d(*pair, 1, bias=False) for pair in zip(channels, widths, strict=True))
        self.embedding = nn.Conv2d(3 + backbone.out_channels, AFFINITY_CHANNELS, 1, bias=False)
        self.bank = ImageBank(num_classes)
        self.coefficients: Tensor
        self.register_buffer("coefficients", torch.ones(num_classes))

    def maps(self, images: Tensor) -> Maps:
        """images [N, 3, H, W], normalised."""
        levels = self.backbone.levels(images)
        cam = self.classifier(self.sampler(levels[-1]).relu())
        sides = [side(level.detach()) for side, level in zip(self.sides, levels, strict=True)]
        small = F.interpolate(images, cam.shape[2:], mode="bilinear", align_corners=True)
        embedded = self.embedding(torch.cat([small.to(levels[-1].dtype), levels[-1].detach()], 1))
        return Maps(cam.mean((2, 3)), cam, sides, embedded)


def affinity(embedded: Tensor) -> Tensor:
    """[N, D, h, w] -> [N, h * w, h * w]: relu of the cosine of every two pixels, each column divided by its sum."""
    pixels = F.normalize(embedded.flatten(2).float(), dim=1, eps=1e-5)
    cosines = (pixels.transpose(1, 2) @ pixels).relu()
    return cosines / (cosines.sum(1, keepdim=True) + 1e-5)


def propagate(cam: Tensor, weights: Tensor, times: int = 2) -> Tensor:
    """The pixel correlation module: cam [N, C, h, w], each pixel now the mean of those like it, weighted so."""
    pixels = cam.flatten(2)
    for _ in range(times):
        pixels = pixels @ weights
    return pixels.view_as(cam)


def halve(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=True)


class SfcSystem(CamSystem):
    """Shared feature calibration: classifier CAM and prototype CAM learn from each other, rare classes most."""

    Settings: ClassVar[type[Settings]] = SfcSettings
    uses_ops = True
    network: SfcNetwork

    def __init__(self, settings: SfcSettings, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        super().__init__(settings, num_classes, ops, pretrained=pretrained)
        self.ops = ops
        self.network = SfcNetwork(self.network.backbone, num_classes - 1)

    def stages(self) -> list[Stage]:
        return [Stage("cam", self.settings.epochs), Stage("sfc", self.settings.sfc_epochs)]

    def prepare(self, dataset: Dataset, processes: Processes) -> None:
        counts = dataset.tags.sum(0)
        seen = counts > 0  # the others have no part in the loss
        if seen.any():
            drawn = self.settings.bank * processes.count * (len(dataset) // self.settings.batch_size)
            coefficients = self.ops.distribution_coefficients(counts[seen], drawn / int(seen.sum()))
            self.network.coefficients[seen] = coefficients.to(self.network.coefficients.device)

    def enter(self, stage: int) -> list[dict[str, Any]]:
        network, settings = self.network, self.settings
        network.stage = stage
        groups = super().enter(stage)
        if stage == CAM:
            return groups
        later = [*network.sides.parameters(), *network.embedding.parameters()]
        groups = [group | {"lr": settings.sfc_rate * group["lr"]} for group in groups]
        return [*groups, {"params": later, "lr": settings.lr}]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.network.stage == CAM:
            return super().loss(batch)
        settings = self.settings
        images, tags, valid = self.with_bank(batch)
        maps, small = self.network.maps(images), self.network.maps(halve(images))
        classification = sum(F.binary_cross_entropy_with_logits(one.logits.float(), tags) for one in (maps, small)) / 2
        present = with_background(tags)
        cam, inside = self.normalise(maps.cam, present, valid)
        cam_small, _ = self.normalise(small.cam, present, valid)
        consistency = self.ops.msdw_loss(
            propagate(cam, affinity(maps.embedded)),
            self.prototype_cam(maps.levels, cam, present, inside),
            propagate(cam_small, affinity(small.embedded)),
            present,
            self.network.coefficients,
            prototype_weight=settings.prototype_weight,
            scale_weight=settings.scale_weight,
        )
        loss = classification + consistency
        figures = {"loss": loss, "cls": classification, "msdw": consistency}
        return loss, {name: value.detach() for name, value in figures.items()}

    def with_bank(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images, tags and valid of a batch, and behind them those that the bank adds; the bank then has seen it."""
        own, bank = (batch.images, batch.tags, batch.valid), self.network.bank
        if self.settings.bank == 0:
            return own
        joined = own
        if len(bank) > 0:
            drawn = (part.to(batch.images.device) for part in bank.sample(self.settings.bank))
            images, tags, valid = (torch.cat(pair) for pair in zip(own, drawn, strict=True))
            joined = images.contiguous(memory_format=torch.channels_last), tags, valid
        bank.update(*own)
        return joined

    def normalise(self, cam: Tensor, present: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The classifier's cam [N, C-1, h, w] with relu, divided by its maxima, behind a background of 1 - its largest
        class, masked by present [N, C] and by valid, which comes with it in the cam's size: [N, C, h, w]."""
        cam = self.ops.normalize_cam(cam.float())
        cam = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1) * present[:, :, None, None]
        if valid is None:
            return cam, None
        inside = F.interpolate(valid[:, None].float(), cam.shape[2:], mode="nearest")
        return cam * inside, inside[:, 0].bool()

    def prototype_cam(self, levels: list[Tensor], cam: Tensor, present: Tensor, inside: Tensor | None) -> Tensor:
        cosines: Tensor = self.ops.prototype_cam(
            levels, cam, present, valid=inside, background_scale=self.settings.background_scale
        )
        return cosines.float()

    @property
    def parts(self) -> dict[str, float]:
        if self.network.stage == CAM:
            return super().parts
        return {"classifier": 0.0, "refined": 1.0, "prototype": self.settings.prototype_share}

    def cams(self, images: Tensor, tags: Tensor) -> list[Tensor]:
        if self.network.stage == CAM:
            return super().cams(images, tags)
        maps, present = self.network.maps(images), with_background(tags)
        cam, _ = self.normalise(maps.cam, present, None)
        refined = propagate(maps.cam.float().relu(), affinity(maps.embedded))
        return [maps.cam, refined, self.prototype_cam(maps.levels, cam, present, None)[:, 1:]]
