"""The CAM classifier: the baseline, and stage 0 of the systems built on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from wsss_ops.training import checkpoints
from wsss_ops.training.backbones import Backbone, build_backbone
from wsss_ops.training.batches import Batch
from wsss_ops.training.settings import Settings, option
from wsss_ops.training.system import Classifier, Stage

CAM = 0  # the stage


@dataclass(frozen=True, kw_only=True)
class SettingsAfterCam(Settings):
    """Settings of the systems whose first stage is the CAM."""

    start: str | None = option(
        str,
        None,
        "finished cam run, or its model.pt, to take the stage cam from, instead of training it for --epochs",
        path=True,
    )


class CamNetwork(nn.Module):
    """Backbone, a 3x3 convolution (`sampler`: ESOL's W1), ReLU and a 1x1 classifier without bias.

    num_classes counts the foreground classes. The classifier's map is the CAM; its mean over the map the logits.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, num_classes: int, width: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.sampler = nn.Conv2d(backbone.out_channels, width, 3, padding=1)
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.sampler.weight, nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W], normalised -> logits [N, num_classes] and CAM [N, num_classes, h, w]."""
        cam = self.classifier(self.sampler(self.backbone(images)).relu())
        return cam.mean((2, 3)), cam


class StagedCamNetwork(CamNetwork):
    """A CAM network that further stages build on: which one it is in, `stage`, CAM or later, is saved with it.

    Behind the CAM stage BatchNorm in the backbone keeps its statistics.
    """

    stage = CAM

    def train(self, mode: bool = True) -> "StagedCamNetwork":
        super().train(mode)
        if self.stage != CAM:
            self.backbone.eval()
        return self

    def get_extra_state(self) -> dict[str, int]:
        return {"stage": self.stage}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.stage = state["stage"]


class CamSystem(Classifier):
    """Image classification with the labels as the only supervision."""

    uses_ops = False
    network: CamNetwork

    def __init__(self, settings: Settings, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        self.settings = settings
        backbone = build_backbone(settings.backbone, settings.weights, settings.output_stride, pretrained=pretrained)
        backbone.tune(settings.tune_blocks)  # here too, so that a number out of range fails before a run begins
        self.network = CamNetwork(backbone, num_classes - 1)

    def stages(self) -> list[Stage]:
        return [Stage("cam", self.settings.epochs)]

    def enter(self, stage: int) -> list[dict[str, Any]]:
        head = [*self.network.sampler.parameters(), *self.network.classifier.parameters()]
        groups = [{"params": head, "lr": self.settings.lr}]
        if tuned := self.network.backbone.tune(self.settings.tune_blocks):
            groups.append({"params": tuned, "lr": self.settings.backbone_lr})
        return groups

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.network(batch.images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.tags)
        return loss, {"loss": loss.detach()}

    def cam(self, images: Tensor) -> Tensor:
        return self.network(images)[1]

    @property
    def stride(self) -> int:
        return self.network.backbone.stride


def read_start(settings: Settings, classes: Sequence[str]) -> dict[str, Tensor] | None:
    """The network of the finished CAM run that settings.start names; None where it names none.

    Raises ValueError where there is none, and where its classes, backbone, output stride or imbalance are not those
    asked for.
    """
    if not isinstance(settings, SettingsAfterCam) or settings.start is None:
        return None
    path = Path(settings.start)
    file = path / checkpoints.MODEL if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"start: {file} does not exist; a cam run writes it when its training is finished")
    try:
        content = checkpoints.load(file)
    except ValueError as error:
        raise ValueError(f"start: {error}") from error
    if content.get("system") != "cam":
        what = f"it is one of {content['system']!r}" if "system" in content else "name model.pt or the run folder"
        raise ValueError(f"start: {file} is no model of a cam run, {what}")
    if tuple(content["classes"]) != tuple(classes):
        raise ValueError(
            f"start: {file} knows the classes {', '.join(content['classes'])}; {settings.data_name} has others"
        )
    for name in ("backbone", "output_stride", "imbalance"):
        there, here = content["settings"].get(name, 1), getattr(settings, name)  # older files have no imbalance
        if there != here:
            raise ValueError(f"start: {file} has {name} {there!r}, this run {here!r}")
    network: dict[str, Tensor] = content["network"]
    return network
