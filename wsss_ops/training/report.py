"""What an evaluation leaves: a table on the terminal, metrics.json, a curve and panels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_ops.info import environment
from wsss_ops.training import checkpoints, segmentation
from wsss_ops.training.batches import normalize
from wsss_ops.training.data import Dataset
from wsss_ops.training.evaluation import COMBINED, evaluate, part_table, stage_table, summarise_stages, table
from wsss_ops.training.imbalance import group_figures
from wsss_ops.training.inference import combine, stream_parts
from wsss_ops.training.pictures import Row, has_matplotlib, save_curve, save_displacements, save_panels
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import Segmenter, System

CURVE, PANELS, DISPLACEMENTS = "curve.png", "panels.png", "displacements.png"


def can_draw_curves(processes: Processes) -> bool:
    """Whether matplotlib is there; where not, says so, and how to get it. Ask before long work."""
    found = has_matplotlib()
    if not found:
        processes.print(f"{CURVE} will be left out: it needs matplotlib (pip install matplotlib)")
    return found


def evaluate_and_report(
    system: System, development: Dataset, validation: Dataset, scales: tuple[float, ...], processes: Processes,
    out: Path, *, panels: int, curve: bool, details: dict[str, Any], earlier: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates, prints the table and writes curve, panels and metrics.json (with details and environment) into out.

    earlier: the results of the stages before, to be compared with this one's.
    """
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
        if isinstance(system, Segmenter) and (baseline := system.baseline()) is not None:
            print(segmentation.compare(baseline[1], result))
        out.mkdir(parents=True, exist_ok=True)
        further: list[str] = []
        if curve and "curve" in result["validation"]:
            further.append(CURVE)
            drawn = result["validation"]["curve"]
            lines = {name: [float("nan") if v is None else v for v in values] for name, values in drawn.items()}
            save_curve(out / CURVE, result["thresholds"], lines, result["threshold"], "CAM on validation images")
        if panels > 0 and isinstance(system, Segmenter):
            chosen = _spread(validation, panels)
            further += segmentation.save_pictures(system, validation, chosen, scales, processes, out)
        elif panels > 0:
            thresholds = {COMBINED: result["threshold"]}
            thresholds |= {name: part["threshold"] for name, part in result.get("parts", {}).items()}
            for name, rows in panel_rows(system, validation, panels, scales, thresholds, processes).items():
                file = PANELS if name == COMBINED else f"panels-{name}.png"
                save_panels(out / file, rows, validation.classes)
                further.append(file)
            if arrows := displacement_pictures(system, validation, panels, processes):
                save_displacements(out / DISPLACEMENTS, arrows)
                further.append(DISPLACEMENTS)
        # Last, because its presence says that the run is finished.
        checkpoints.write_json(out / checkpoints.METRICS, result)
        print(f"written to {out}: {', '.join([checkpoints.METRICS, *further])}")
    processes.wait()
    return result


def panel_rows(system: System, dataset: Dataset, count: int, scales: tuple[float, ...], thresholds: dict[str, float],
               processes: Processes) -> dict[str, list[Row]]:  # fmt: skip
    """Photo, annotation, CAM and prediction of count images evenly spread over the data set.

    thresholds: of the system's CAM, under COMBINED, and after it of its parts, if it has several; a list for each.
    """
    rows: dict[str, list[Row]] = {name: [] for name in thresholds}
    for sample, parts in stream_parts(system, dataset, _spread(dataset, count), scales, processes.device):
        names = [dataset.classes[int(index) + 1] for index in sample.tags.nonzero()]
        title = f"{sample.name}: {', '.join(names)}"
        for (name, threshold), cams in zip(thresholds.items(), (combine(system, parts), *parts), strict=False):
            scores = torch.cat([torch.full_like(cams[:1], threshold), cams]).cpu()
            rows[name].append(Row(sample.image, sample.mask, scores[1:], scores.argmax(0).byte(), title))
    return rows


@torch.no_grad()
def displacement_pictures(
    system: System, dataset: Dataset, count: int, processes: Processes
) -> list[tuple[Tensor, Tensor, str]]:
    """Photo, displacements at scale 1 and title of the images that `panel_rows` shows; none without a sampler."""
    system.network.eval()
    pictures = []
    for index in _spread(dataset, count):
        sample = dataset[index]
        side = [system.stride * max(1, round((length - 1) / system.stride)) + 1 for length in sample.image.shape[1:]]
        image = F.interpolate(normalize(sample.image[None]), side, mode="bilinear", align_corners=True)
        field = system.displacements(image.to(processes.device))
        if field is None:
            return []
        pictures.append((sample.image, field[0].float().cpu(), sample.name))
    return pictures


def _spread(dataset: Dataset, count: int) -> list[int]:
    """Indices of count images evenly spread over the data set."""
    return [round((k + 0.5) * len(dataset) / count - 0.5) for k in range(min(count, len(dataset)))]
