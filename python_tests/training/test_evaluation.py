"""Evaluation: counts at every threshold against loops, figures, the choice of a threshold, and CAMs of whole images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training.systems import ToySystem, TwoParts, infer_cams
from training.voc_folder import make_voc

from wsss_ops.training.data import Dataset, Sample, open_dataset
from wsss_ops.training.evaluation import ThresholdCounts, curves, evaluate, part_table, table
from wsss_ops.training.inference import equal_sizes, infer_parts, stream_cams
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import System

CPU = torch.device("cpu")


def naive_confusion(scores: list[Tensor], masks: list[Tensor], threshold: Tensor, num_classes: int) -> Tensor:
    """Pixel by pixel: the background's constant score is listed first, so it wins ties."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for score, mask in zip(scores, masks, strict=True):
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                if mask[y, x] != 255:
                    column = [float(threshold), *score[:, y, x].tolist()]
                    confusion[column.index(max(column)), int(mask[y, x])] += 1
    return confusion


def test_counts_equal_a_loop_over_pixels_at_every_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.tensor([0, 0.2, 0.25, 0.5, 1])
    counts = ThresholdCounts(4, thresholds)
    scores, masks = [], []
    for height, width in ((7, 9), (5, 4)):
        # Multiples of 1/20 fall onto thresholds and onto each other.
        scores.append(torch.randint(0, 21, (3, height, width), generator=generator) / 20)
        masks.append(torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, (height, width), generator=generator)].byte())
        counts.add(scores[-1], masks[-1])
    for threshold, confusion in zip(thresholds, counts.confusion(), strict=True):
        assert torch.equal(confusion, naive_confusion(scores, masks, threshold, 4))


def test_figures_of_a_known_confusion() -> None:
    confusion = torch.tensor([[[6, 1, 0], [2, 3, 1], [0, 0, 0]]])  # rows predicted, columns true
    found = curves(confusion, (0, 1, 2))
    torch.testing.assert_close(found["iou"][0], torch.tensor([6 / 9, 3 / 7, 0], dtype=torch.float64))
    torch.testing.assert_close(found["mIoU"][0].item(), (6 / 9 + 3 / 7) / 3)
    assert found["precision"].item() == 3 / 6
    assert found["recall"].item() == 3 / 5
    assert found["class_precision"][0, 2].isnan()
    assert found["class_recall"][0, 2] == 0
    torch.testing.assert_close(curves(confusion, (0, 1))["mIoU"][0].item(), (6 / 9 + 3 / 7) / 2)


def test_a_class_without_pixels_is_left_out_of_the_mean() -> None:
    confusion = torch.zeros(1, 3, 3, dtype=torch.int64)
    confusion[0, 0, 0], confusion[0, 1, 1] = 4, 4
    assert curves(confusion, (0, 1, 2))["mIoU"].item() == 1


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


def test_evaluation_of_perfect_cams_is_perfect(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def annotated(
        system: System, dataset: Dataset, indices: Iterable[int], scales: tuple[float, ...], device: torch.device
    ) -> Iterator[tuple[Sample, tuple[Tensor, ...]]]:
        for index in indices:
            sample = dataset[index]
            yield sample, (torch.stack([(sample.mask == k + 1).float() for k in range(20)]),)

    monkeypatch.setattr("wsss_ops.training.evaluation.stream_parts", annotated)
    result = evaluate(ToySystem(20), open_dataset(voc, "dev"), open_dataset(voc, "val"), (1.0,), Processes())
    for split in ("development", "validation"):
        assert result[split]["mIoU"] == result[split]["precision"] == result[split]["recall"] == 1
    assert result["validation"]["curve"]["recall"][-1] == 0  # nothing exceeds a threshold of 1
    assert result["validation"]["curve"]["precision"][-1] is None
    assert result["validation"]["classes"]["train"]["IoU"] is None
    assert "mIoU 1.0000 over 4 classes" in table(result)


def test_threshold_is_chosen_on_the_development_split_alone(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {4: 0.3, 12: 0.7}  # by number of images: where half-right scores are cut off

    def shaped(
        system: System, dataset: Dataset, indices: Iterable[int], scales: tuple[float, ...], device: torch.device
    ) -> Iterator[tuple[Sample, tuple[Tensor, ...]]]:
        for index in indices:
            sample = dataset[index]
            right = torch.stack([(sample.mask == k + 1).float() for k in range(20)])
            yield sample, (right * 0.9 + (sample.mask == 0) * (best[len(dataset)] - 0.005),)

    monkeypatch.setattr("wsss_ops.training.evaluation.stream_parts", shaped)
    result = evaluate(ToySystem(20), open_dataset(voc, "dev"), open_dataset(voc, "val"), (1.0,), Processes())
    assert result["threshold"] == 0.3
    assert result["development"]["mIoU"] == 1
    assert result["validation"]["mIoU"] < 1


@pytest.mark.parametrize("flip", [True, False])
def test_cams_are_masked_normalised_and_not_shifted(flip: bool) -> None:
    """A network that shows brightness: its CAM must lie where the bright spot is, at every scale."""
    image = torch.zeros(1, 3, 50, 70, dtype=torch.uint8)
    image[:, :, 14:19, 22:27] = 255
    tags = torch.tensor([[True, False]])
    cams = infer_cams(ToySystem(), image, tags, (0.5, 1.0, 1.5, 2.0), flip)
    assert cams.shape == (1, 2, 50, 70)
    assert (cams[:, 1] == 0).all()
    assert 0.99 < cams.max() <= 1
    assert cams.min() >= 0
    weights = cams[0, 0] * (cams[0, 0] > 0.1)
    weights /= weights.sum()
    centre = [(weights.sum(1) * torch.arange(50)).sum(), (weights.sum(0) * torch.arange(70)).sum()]
    assert abs(centre[0] - 16) < 0.5
    assert abs(centre[1] - 24) < 0.5


def test_mirrored_image_gives_mirrored_cam() -> None:
    image = torch.randint(0, 256, (1, 3, 33, 41), dtype=torch.uint8)
    tags = torch.ones(1, 2, dtype=torch.bool)
    one = infer_cams(ToySystem(), image, tags, (1.0, 2.0))
    other = infer_cams(ToySystem(), image.flip(-1), tags, (1.0, 2.0))
    torch.testing.assert_close(one, other.flip(-1), rtol=1e-3, atol=1e-4)


def test_an_image_without_tags_has_no_cam() -> None:
    image = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    assert (infer_cams(ToySystem(), image, torch.zeros(1, 2, dtype=torch.bool), (1.0,)) == 0).all()


def test_parts_are_normalised_each_and_combined_by_their_weights() -> None:
    image = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    tags = torch.tensor([[True, False], [True, True]])
    system = TwoParts()
    bright, dark = infer_parts(system, image, tags, (1.0, 0.5))
    torch.testing.assert_close(bright, infer_cams(ToySystem(), image, tags, (1.0, 0.5)))
    assert (dark[0, 1] == 0).all()
    assert dark[1].amax((1, 2)) == pytest.approx([1, 1], abs=1e-3)
    torch.testing.assert_close(infer_cams(system, image, tags, (1.0, 0.5)), (bright + 3 * dark) / 4)


def test_parts_are_measured_beside_their_combination(voc: Path) -> None:
    data = open_dataset(voc, "dev"), open_dataset(voc, "val")
    result = evaluate(TwoParts(20), *data, (1.0,), Processes())
    assert list(result["parts"]) == ["bright", "dark"]
    alone = evaluate(ToySystem(20), *data, (1.0,), Processes())
    for key in ("threshold", "development", "validation"):
        assert result["parts"]["bright"][key] == alone[key]
    assert result["validation"] != alone["validation"]
    lines = part_table(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["validation", "bright", "dark", "combined"]
    assert lines[2].split()[2] == f"{alone['validation']['mIoU']:.4f}"
    assert part_table(alone) == ""


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_is_that_of_the_settings(precision: str, dtype: torch.dtype) -> None:
    """auto on a CPU: float32."""
    seen = []

    class Watched(ToySystem):
        def cam(self, images: Tensor) -> Tensor:
            seen.append(torch.nn.functional.conv2d(images, torch.ones(1, 3, 1, 1)).dtype)
            return super().cam(images)

    system = Watched(precision=precision)
    infer_cams(system, torch.zeros(1, 3, 20, 20, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.bool), (1.0,))
    assert seen == [dtype]


def test_equal_sizes_are_batched_in_order() -> None:
    sizes = [(4, 5), (4, 5), (4, 5), (5, 4), (4, 5)]
    data = [Sample(torch.zeros(3, *size), torch.zeros(size), torch.zeros(2), str(k)) for k, size in enumerate(sizes)]
    groups = [[sample.name for sample in group] for group in equal_sizes(data, range(5), 2)]
    assert groups == [["0", "1"], ["2"], ["3"], ["4"]]


def test_streaming_yields_every_image_once(voc: Path) -> None:
    data = open_dataset(voc, "val")
    names = [sample.name for sample, _ in stream_cams(ToySystem(20), data, range(len(data)), (1.0,), CPU)]
    assert names == data.ids
