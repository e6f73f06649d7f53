"""`wsss-ops demo`: what is installed, fused against reference, a small benchmark, systems on generated scenes."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import wsss_ops

from . import _backend, info, reference
from ._files import make_folder
from .bench import report, runner
from .training.train import train_on_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="new folder for pictures and figures (default: wsss_demo/ and the time)"
    )


def main(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    out: Path = arguments.out or Path("wsss_demo", time.strftime("%Y-%m-%d-%H%M%S"))
    if out.exists():
        raise ValueError(f"--out: {out} is there already; name a new folder")
    make_folder(out)
    device = torch.device("cuda" if torch.cuda.is_available() and not _backend.missing_cuda() else "cpu")

    heading("1. What is installed")
    info.main()

    heading("2. Fused operators against their PyTorch references")
    for name, check in CHECKS.items():
        forward, backward = check(device)
        print(f"{name:14} largest difference: output {forward:.1e}, gradient {backward:.1e}")

    heading("3. Time and memory (wsss-ops bench has more rounds, and torch.compile'd references)")
    # Whole training steps, CUDA graphs and the authors' form of the prototypes take too long.
    operators = [op for op in runner.OPERATORS if op not in ("ceilings", "esol", "graphs", "ppl", "prototype", "sfc")]
    results = runner.run(device, operators, rounds=5, compiled=False)
    print(report.table(results))

    heading("4. A CAM network, trained on generated scenes and evaluated")
    print(
        "A minute on two free cores, many times that on busy ones. An mIoU near 0.29 is what to expect: the scenes are"
    )
    print("made to show where CAMs fail (heads instead of bodies, rare classes, context).", flush=True)
    train_on_scenes("cam", out / "cam")

    heading("5. ESOL on that CAM: offsets that expand it, then offsets that shrink it to the object")
    train_on_scenes("esol", out / "esol", start=out / "cam")

    heading("6. PPL on that CAM: its last blocks look at patches of the map, too")
    train_on_scenes("ppl", out / "ppl", start=out / "cam")

    heading("7. SFC on that CAM: classifier and prototypes of its features learn from each other")
    train_on_scenes("sfc", out / "sfc", start=out / "cam")

    heading(f"Done in {time.monotonic() - started:.0f} s")
    if importlib.util.find_spec("matplotlib") is not None:
        report.plot(results, out / "bench.png")
        print(f"{out / 'bench.png'}: the benchmark as a plot")
        print(f"{out / 'cam' / 'curve.png'}: mIoU, precision and recall over all background thresholds")
    else:
        print("plots left out: they need matplotlib (pip install matplotlib)")
    print(f"{out / 'cam' / 'panels.png'}: scenes, ground truth, CAM and prediction")
    print(f"{out / 'esol' / 'displacements.png'}: where ESOL's sampler looks")
    print(f"{out / 'ppl' / 'panels.png'}: the CAM after patch learning")
    print(f"{out / 'sfc' / 'panels.png'}: the CAM of classifier and prototypes")
    print(f"{', '.join(str(out / name / 'metrics.json') for name in ('cam', 'esol', 'ppl', 'sfc'))}: the figures above")
    return 0


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def largest_difference(
    fused: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[float, float]:
    """Of the outputs, and of the gradients for one random output gradient."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for function in (fused, plain):
        source = x.clone(memory_format=torch.preserve_format).requires_grad_()
        outputs.append(function(source))
        torch.manual_seed(1)
        grad = torch.randn(outputs[-1].shape).to(x.device)
        gradients += torch.autograd.grad(outputs[-1], source, grad)
    forward, backward = (float((a - b).abs().max().detach()) for a, b in (outputs, gradients))
    return forward, backward


def check_split(device: torch.device) -> tuple[float, float]:
    x = torch.randn(2, 16, 37, 41, device=device)
    return largest_difference(
        lambda x: wsss_ops.patch_split(x, (4, 4), 2), lambda x: reference.patch_split(x, (4, 4), 2), x
    )


def check_merge(device: torch.device) -> tuple[float, float]:
    x = torch.randn(32, 16, 10, 12, device=device)
    return largest_difference(
        lambda x: wsss_ops.patch_merge(x, (4, 4), (37, 41)), lambda x: reference.patch_merge(x, (4, 4), (37, 41)), x
    )


def check_deform(device: torch.device) -> tuple[float, float]:
    offset = 2 * torch.randn(2, 18, 17, 19, device=device)
    weight = torch.randn(16, 24, 3, 3, device=device) / 15
    return largest_difference(
        lambda x: wsss_ops.deform_conv2d(x, offset, weight, padding=1),
        lambda x: reference.deform_conv2d(x, offset, weight, padding=1),
        torch.randn(2, 24, 17, 19, device=device),
    )


def check_clip(device: torch.device) -> tuple[float, float]:
    x = torch.randn(2, 24, 17, 19, device=device)
    return largest_difference(lambda x: wsss_ops.clip_features(x, 0.3), lambda x: reference.clip_features(x, 0.3), x)


def check_prototype(device: torch.device) -> tuple[float, float]:
    cam, tags = torch.rand(2, 5, 17, 19, device=device), torch.ones(2, 5, device=device)
    return largest_difference(
        lambda x: wsss_ops.prototype_cam(x, cam, tags),
        lambda x: reference.prototype_cam(x, cam, tags),
        torch.randn(2, 24, 17, 19, device=device),
    )


def check_ocr_loss(device: torch.device) -> tuple[float, float]:
    tags = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]], device=device)

    def plain(x: Tensor) -> Tensor:
        loss = reference.ocr_loss(x, tags, reduction="none")
        assert isinstance(loss, Tensor)  # and not with the count
        return loss

    x = torch.randn(2, 5, 17, 19, device=device)
    return largest_difference(lambda x: wsss_ops.ocr_loss(x, tags, reduction="none"), plain, x)


def check_msdw_loss(device: torch.device) -> tuple[float, float]:
    cam, half = torch.rand(2, 5, 17, 19, device=device), torch.rand(2, 5, 9, 10, device=device)
    tags, coefficients = torch.ones(2, 5, device=device), torch.rand(4, device=device)
    return largest_difference(
        lambda x: wsss_ops.msdw_loss(cam, x, half, tags, coefficients),
        lambda x: reference.msdw_loss(cam, x, half, tags, coefficients),
        torch.rand(2, 5, 17, 19, device=device),
    )


CHECKS = {
    "patch_split": check_split,
    "patch_merge": check_merge,
    "deform_conv2d": check_deform,
    "clip_features": check_clip,
    "ocr_loss": check_ocr_loss,
    "prototype_cam": check_prototype,
    "msdw_loss": check_msdw_loss,
}
