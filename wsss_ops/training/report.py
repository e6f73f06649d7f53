"""What an evaluation leaves: a table on the terminal, metrics.json, a curve and panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss_ops._files import write_json
from wsss_ops.info import environment
from wsss_ops.training import checkpoints, segmentation
from wsss_ops.training.batches import normalize
from wsss_ops.training.data import Dataset
from wsss_ops.training.evaluation import COMBINED, evaluate, part_table, stage_table, summarise_stages, table
from wsss_ops.training.imbalance import group_figures
from wsss_ops.training.inference import combine, rescale, stream_parts, with_threshold
from wsss_ops.training.pictures import (
    PANELS,
    Row,
    has_matplotlib,
    make_row,
    save_curve,
    save_displacements,
    save_panels,
)
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Classifier, Segmenter, System

CURVE, DISPLACEMENTS = "curve.png", "displacements.png"


def can_draw_curve(system: System, processes: Processes) -> bool:
    """Whether the evaluation will have a curve, which a segmentation network's has not.

    Where it lacks matplotlib alone, says so, and how to get it. Ask before long work.
    """
    if isinstance(system, Segmenter):
        return False
    found = has_matplotlib()
    if not found:
        processes.print(f"{CURVE} will be left out: it needs matplotlib (pip install matplotlib)")
    return found


def evaluate_and_report(
    system: Classifier | Segmenter, development: Dataset, validation: Dataset, processes: Processes, out: Path, *,
    panels: int, curve: bool, details: dict[str, Any], earlier: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates at the scales of the settings, prints the table and writes pictures and metrics.json (with details and
    environment) into out; returns what that holds.

    earlier: the results of the stages before, to be compared with this one's.
    """
    scales = system.settings.scales
    if isinstance(system, Segmenter):
        figures = segmentation.evaluate(system, development, validation, scales, processes)
    else:
        figures = evaluate(system, development, validation, scales, processes)
    if system.class_images is not None:
        for found in (figures, *figures.get("parts", {}).values()):
            for split in (found["development"], found["validation"]):
                split["groups"] = group_figures(split["classes"], system.class_images)
    result = details | {"environment": environment()} | figures
    if earlier:
        result["stages"] = summarise_stages(earlier | {system.stages()[-1].name: result})
    if processes.is_main:
        print(table(result) + part_table(result) + stage_table(result))
        out.mkdir(parents=True, exist_ok=True)
        shown = _spread(validation, panels)
        if isinstance(system, Segmenter):
            drawn = segmentation.report(system, validation, shown, result, processes, out)
        else:
            drawn = [_save_curve(result, out)] if curve else []
            drawn += _save_pictures(system, validation, shown, result, processes, out)
        # Last, because its presence says that the run is finished.
        write_json(out / checkpoints.METRICS, result)
        print(f"written to {out}: {', '.join([checkpoints.METRICS, *drawn])}")
    processes.wait()
    return result


def _save_curve(result: dict[str, Any], out: Path) -> str:
    curves = result["validation"]["curve"]
    lines = {name: [float("nan") if v is None else v for v in values] for name, values in curves.items()}
    save_curve(out / CURVE, result["thresholds"], lines, result["threshold"], "CAM on validation images")
    return CURVE


def _save_pictures(system: Classifier, dataset: Dataset, indices: Sequence[int], result: dict[str, Any],
                   processes: Processes, out: Path) -> list[str]:  # fmt: skip
    """Panels of the CAM and of its parts, and displacements; returns the names of the files."""
    if not indices:
        return []
    files = []
    thresholds = {COMBINED: result["threshold"]}
    thresholds |= {name: part["threshold"] for name, part in result.get("parts", {}).items()}
    for name, rows in panel_rows(system, dataset, indices, thresholds, processes).items():
        files.append(PANELS if name == COMBINED else f"panels-{name}.png")
        save_panels(out / files[-1], rows, dataset.classes)
    if arrows := displacement_pictures(system, dataset, indices, processes):
        files.append(DISPLACEMENTS)
        save_displacements(out / DISPLACEMENTS, arrows)
    return files


def panel_rows(system: Classifier, dataset: Dataset, indices: Sequence[int], thresholds: dict[str, float],
               processes: Processes) -> dict[str, list[Row]]:  # fmt: skip
    """Photo, annotation, CAM and prediction of the images with these indices.

    thresholds: of the system's CAM, under COMBINED, and after it of its parts, if it has several; a list for each.
    """
    rows: dict[str, list[Row]] = {name: [] for name in thresholds}
    for sample, parts in stream_parts(system, dataset, indices, system.settings.scales, processes.device):
        for (name, threshold), cams in zip(thresholds.items(), (combine(system, parts), *parts), strict=False):
            rows[name].append(make_row(sample, with_threshold(cams, threshold), dataset.classes))
    return rows


@torch.no_grad()
def displacement_pictures(
    system: Classifier, dataset: Dataset, indices: Sequence[int], processes: Processes
) -> list[tuple[Tensor, Tensor, str]]:
    """Photo, displacements at scale 1 and title of the images with these indices; none without a sampler."""
    system.network.eval()
    pictures = []
    for index in indices:
        sample = dataset[index]
        image = rescale(normalize(sample.image[None]), 1.0, system.stride)
        field = system.displacements(image.to(processes.device))
        if field is None:
            return []
        pictures.append((sample.image, field[0].float().cpu(), sample.name))
    return pictures


def _spread(dataset: Dataset, count: int) -> list[int]:
    """Indices of count images evenly spread over the data set."""
    return [round((k + 0.5) * len(dataset) / count - 0.5) for k in range(min(count, len(dataset)))]
