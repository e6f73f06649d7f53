"""OCR: a segmentation network on pseudo-labels, whose out-of-candidate pixels a ranking loss pushes back.

Cheng et al., Out-of-Candidate Rectification for Weakly Supervised Semantic Segmentation, CVPR 2023 (arXiv 2211.12268).
README.md here says what is the paper's and what is our reading.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_ops._files import read_json
from wsss_ops.training import checkpoints
from wsss_ops.training.backbones import Backbone, build_backbone
from wsss_ops.training.batches import Batch
from wsss_ops.training.data import VOID, Dataset, fingerprint, with_background
from wsss_ops.training.processes import Processes
from wsss_ops.training.pseudo_labels import FOLDER, RECORD, PseudoLabelled, make_pseudo_labels
from wsss_ops.training.settings import Settings, option
from wsss_ops.training.system import Classifier, Segmenter, Stage


@dataclass(frozen=True, kw_only=True)
class OcrSettings(Settings):
    """Settings of the segmentation network and its OCR loss."""

    cams: str | None = option(
        str, None, "finished run of a CAM system, whose CAMs of the training images become pseudo-labels; or a run of "
        "this system, whose pseudo-labels are used again", path=True,
    )  # fmt: skip
    cam_threshold: float | None = option(
        float,
        None,
        "background threshold of the pseudo-labels; default: that of the CAM run's evaluation",
        at_least=0,
        at_most=1,
    )
    ocr_weight: float = option(
        float, 0.1, "weight of the OCR loss beside cross-entropy (the paper's lambda); 0: none", at_least=0
    )
    ocr_threshold: float = option(
        float, 0.0, "a candidate is ranked above the other classes if its correlation with the predicted class is at "
        "least this share of the largest; 0: all candidates", at_least=0, at_most=1,
    )  # fmt: skip
    ocr_margin: float = option(float, 0.0, "by how much candidates are to exceed the other classes' logits")
    ocr_scale: float = option(float, 1.0, "what logits are multiplied by in the ranking", above=0)
    prior: str = option(
        str, "tags", "correlation of classes: that of the training labels, or none", choices=("tags", "none")
    )
    baseline: str | None = option(
        str, None, "finished run of this system, for example without OCR, to compare figures and pictures with",
        recorded="never",
    )  # fmt: skip
    scales: tuple[float, ...] = option(
        float, (1.0,), "image scales of inference, each with its flip", nargs="+", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cams is None:
            raise ValueError("cams must name a finished run of a CAM system, got none")


class SegmentationNetwork(nn.Module):
    """Backbone, a 3x3 convolution, ReLU and a 1x1 classifier of all classes. `prior` [C, C] is that of the loss."""

    def __init__(self, backbone: Backbone, num_classes: int, width: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Conv2d(backbone.out_channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_classes, 1)
        )
        self.prior: Tensor
        self.register_buffer("prior", torch.ones(num_classes, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W], normalised -> logits [N, num_classes, h, w]."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class OcrSystem(Segmenter):
    """Segmentation from pseudo-labels, with out-of-candidate rectification."""

    Settings: ClassVar[type[Settings]] = OcrSettings
    network: SegmentationNetwork

    def __init__(self, settings: OcrSettings, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        self.settings, self.ops = settings, ops
        backbone = build_backbone(settings.backbone, settings.weights, settings.output_stride, pretrained=pretrained)
        backbone.tune(settings.tune_blocks)
        self.network = SegmentationNetwork(backbone, num_classes)

    def stages(self) -> list[Stage]:
        return [Stage("segmentation", self.settings.epochs)]

    def enter(self, stage: int) -> list[dict[str, Any]]:
        groups = [{"params": list(self.network.head.parameters()), "lr": self.settings.lr}]
        if tuned := self.network.backbone.tune(self.settings.tune_blocks):
            groups.append({"params": tuned, "lr": self.settings.backbone_lr})
        return groups

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.masks is not None
        settings, logits = self.settings, self.network(batch.images)
        # The pixels between the centres of the map's first and last cells, see backbones.py.
        size = [self.stride * (cells - 1) + 1 for cells in logits.shape[2:]]
        masks, valid = (part[:, : size[0], : size[1]] for part in (batch.masks, batch.valid))
        resized = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        loss = F.cross_entropy(resized, masks.long(), ignore_index=VOID)
        figures = {"cross-entropy": loss.detach()}
        if settings.ocr_weight > 0:
            ranking = self.ops.ocr_loss(
                logits, with_background(batch.tags), prior=self.network.prior if settings.prior == "tags" else None,
                threshold=settings.ocr_threshold, margin=settings.ocr_margin, scale=settings.ocr_scale,
                ignore=~valid, size=size, align_corners=True,
            )  # fmt: skip
            loss = loss + settings.ocr_weight * ranking
            figures["OCR"] = ranking.detach()
        return loss, {"loss": loss.detach()} | figures

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    @property
    def stride(self) -> int:
        return self.network.backbone.stride

    def training_images(self, dataset: Dataset, out: Path) -> Dataset:
        if (found := self.baseline()) is not None and len(found[0].network.prior) != len(dataset.classes):
            raise ValueError(f"baseline: {self.settings.baseline} knows other classes than the data have")
        given = Path(self.settings.cams) / FOLDER
        if not (given / RECORD).exists():
            self._source(dataset)  # before anything is made
            return PseudoLabelled(dataset, out / FOLDER)
        record, threshold = read_json(given / RECORD), self.settings.cam_threshold
        if record["training_images"] != fingerprint(dataset):
            there, here = record["training_images"], self.settings.data_name
            raise ValueError(f"cams: the pseudo-labels of {given} are of {there}, not of {here}")
        if threshold not in (None, record["threshold"]):
            raise ValueError(f"cam_threshold: the labels of {given} were cut at {record['threshold']}, got {threshold}")
        return PseudoLabelled(dataset, given)

    def prepare(self, dataset: Dataset, processes: Processes) -> None:
        assert isinstance(dataset, PseudoLabelled)
        self.network.prior.copy_(self.ops.annotation_correlation(with_background(dataset.tags)))
        if not (dataset.folder / RECORD).exists():
            system, threshold = self._source(dataset)
            system.network.to(processes.device)
            about = {"cams": str(Path(self.settings.cams).resolve())}
            scales = system.settings.scales
            make_pseudo_labels(system, dataset.dataset, scales, threshold, dataset.folder, processes, about)

    def baseline(self) -> "tuple[OcrSystem, dict[str, Any]] | None":
        if self.settings.baseline is None:
            return None
        path = Path(self.settings.baseline)
        system, _ = _load("baseline", path)
        if not isinstance(system, OcrSystem) or not (path / checkpoints.METRICS).exists():
            raise ValueError(f"baseline: {path} is no finished and evaluated run of this system")
        return system, read_json(path / checkpoints.METRICS)

    def _source(self, dataset: Dataset) -> tuple[Classifier, float]:
        """The CAM system and the threshold of the pseudo-labels.

        Raises ValueError for what is missing or does not fit.
        """
        path, threshold = Path(self.settings.cams), self.settings.cam_threshold
        system, classes = _load("cams", path)
        if isinstance(system, Segmenter):
            raise ValueError(f"cams: {path} is a run of a segmentation network that has no pseudo-labels")
        if classes != tuple(dataset.classes):
            raise ValueError(
                f"cams: {path} knows the classes {', '.join(classes)}; {self.settings.data_name} has others"
            )
        if threshold is None:
            metrics = path / checkpoints.METRICS
            if not metrics.exists():
                raise ValueError(f"cam_threshold must be given, because {path} holds no {checkpoints.METRICS} with one")
            threshold = read_json(metrics)["threshold"]
        return system, threshold


def _load(option: str, path: Path) -> tuple[Classifier | Segmenter, tuple[str, ...]]:
    """`load_system`, whose errors name the option."""
    from wsss_ops.training.evaluate import load_system  # which imports the table of systems, with this one in it

    try:
        return load_system(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
