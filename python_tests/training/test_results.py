"""The tables of seeds, stages and maps in RESULTS.md are what the results files say."""

import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("mIoU", "precision", "recall")


def load(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text(), parse_float=Decimal)


def tables(section, head):
    """The tables of a section whose head begins so: the cells of their rows."""
    text = (ROOT / "wsss_ops/training/RESULTS.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    bodies = re.findall(rf"^\| {head} \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[[cell.strip(" *") for cell in row.strip("|").split("|")] for row in body.splitlines()] for body in bodies]


def rounded(value, places):
    return str(value.quantize(Decimal(10) ** -places, ROUND_HALF_UP))


def percent(values):
    """The mean of the values, as the tables write it."""
    values = list(values)
    return rounded(100 * sum(values) / len(values), 1)


def stage_row(label, stage, runs):
    """Figures at the stage's own threshold, then at the CAM's."""
    found = [run["stages"][stage] for run in runs]
    own, at_first = ([percent(one[key] for one in part) for key in FIGURES]
                     for part in (found, [one["at_first"] for one in found]))  # fmt: skip
    return [label, *own, *at_first]


def test_seeds_of_the_cam():
    seeds = load("cam-voc-animal-2026-11-20")["seeds"]
    expected = [
        [seed, *(rounded(run["validation"][key], 3) for key in FIGURES), str(run["threshold"]),
         rounded(run["development"]["mIoU"], 3)]
        for seed, run in seeds.items()
    ]  # fmt: skip
    assert tables("CAM", "seed") == [expected]


def test_stages_of_esol():
    runs = load("esol-voc-animal-2026-11-25")["runs"].values()
    assert tables("ESOL", "stage") == [[stage_row(name, name, runs) for name in ("cam", "expansion", "shrinkage")]]


def test_stages_of_ppl():
    runs = load("ppl-voc-animal-2026-11-25")["runs"]
    modes = {mode: [runs[f"{mode}{seed}"] for seed in range(3)] for mode in ("progressive", "explicit")}
    stages = (("progressive", "patches1"), ("progressive", "patches2"), ("explicit", "patches"))
    expected = [stage_row(f"{stage} ({mode})", stage, modes[mode]) for mode, stage in stages]
    assert tables("PPL", "stage") == [[stage_row("cam", "cam", modes["progressive"]), *expected]]


def test_maps_of_sfc_on_all_images_and_on_a_long_tail():
    runs = load("sfc-voc-animal-2026-11-25")["runs"]
    sfc, cam_long, sfc_long = ([runs[f"{name}{seed}"] for seed in range(3)] for name in ("sfc", "lt-cam", "lt-sfc"))
    parts = ("classifier", "refined", "prototype")

    def maps(runs):
        return {**{name: [run["parts"][name]["validation"] for run in runs] for name in parts},
                "combined": [run["validation"] for run in runs]}  # fmt: skip

    before = {"cam, before the stage": [run["stages"]["cam"] for run in sfc]}
    everywhere = [
        [name, *(percent(one[key] for one in found) for key in FIGURES)] for name, found in (before | maps(sfc)).items()
    ]
    before = {"cam, before the stage": [run["validation"] for run in cam_long]}
    tail = [
        [name, percent(one["mIoU"] for one in found),
         *(percent(one["groups"][group]["mIoU"] for one in found) for group in ("head", "middle", "tail"))]
        for name, found in (before | maps(sfc_long)).items()
    ]  # fmt: skip
    assert tables("SFC", "map") == [everywhere, tail]


@pytest.mark.parametrize(("place", "file"), [(0, "ocr-voc-animal-2026-11-25"), (1, "ocr-sfc-voc-animal-2026-11-25")])
def test_seeds_of_ocr_on_both_kinds_of_pseudo_labels(place, file):
    runs = load(file)["runs"]
    columns = ("mIoU", "oc_rate", "precision", "recall")
    expected = [
        [str(seed), *(percent([runs[f"ocr{seed}-{loss}"]["validation"][key]]) for loss in ("without", "w0.1")
                      for key in columns)]
        for seed in range(3)
    ]  # fmt: skip
    assert tables("OCR", "seed")[place] == expected
