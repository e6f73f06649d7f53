"""prototype_cam and class_prototypes as PyTorch operators on every backend: gradients, compiler, memory, bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from harness import another_stream, in_threads, no_waiting, relative_error, untouched
from prototype_cases import WAYS, Case, assert_matches, levels_of, run, tensors
from torch import Tensor

from wsss_ops import _backend, class_prototypes, prototype_cam, reference
from wsss_ops.bench.measure import peak_memory

SMALL = {
    "one tensor": Case(((5, 4, 3),), 3, (4, 3), valid=True, tagged=0.9),
    "detached": Case(((5, 4, 3),), 3, (4, 3), detach_prototypes=True, tagged=0.9),
    "resized": Case(((4, 3, 5),), 3, (4, 3), tagged=0.9),
    "levels": Case(((3, 6, 4), (2, 3, 2), (2, 2, 2)), 3, (3, 2), single=False, tagged=0.9),
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "detached"])
def test_gradcheck(device: torch.device, name: str, layout: str) -> None:
    """Through features and prototypes; no cosine is close to 0, where relu bends."""
    given = tensors(SMALL[name], device, torch.float64, layout)
    single = isinstance(given["features"], Tensor)
    levels = [(level.abs() + 0.1).requires_grad_() for level in levels_of(given)]

    def function(*levels: Tensor) -> Tensor:
        return prototype_cam(**{**given, "features": levels[0] if single else levels})

    assert torch.autograd.gradcheck(function, levels)


def test_gradcheck_class_prototypes(device: torch.device) -> None:
    features = torch.randn(2, 3, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assignment = torch.randint(-1, 3, (2, 4, 3), device=device)
    assert torch.autograd.gradcheck(lambda features: class_prototypes(features, assignment, 4), features)


def test_relu_stops_the_gradient(device: torch.device) -> None:
    """Pixels that point away from a prototype: some gradients of single results are zero, others not."""
    given = tensors(Case(((3, 4, 5),), 2, (4, 5), images=1, tagged=1.1), device, torch.float64)
    features = given.pop("features").requires_grad_()
    result = prototype_cam(features, **given)
    assert 0 < int((result > 0).sum()) < result.numel()
    for value in result.flatten():
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
        assert bool(gradient.any()) == bool(value > 0)


def test_second_derivative_is_refused(device: torch.device) -> None:
    for name in ("one tensor", "levels"):
        given = tensors(SMALL[name], device)
        levels = [level.requires_grad_() for level in levels_of(given)]
        gradients = torch.autograd.grad(prototype_cam(**given).sum(), levels, create_graph=True)
        with pytest.raises(RuntimeError, match="prototype_cam has no second derivative"):
            gradients[0].sum().backward()
    features, assignment = torch.ones(1, 2, 1, 1, device=device, requires_grad=True), torch.zeros(1, 1, 1).long()
    result = class_prototypes(features, assignment.to(device), 1)
    (gradient,) = torch.autograd.grad(result.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="class_prototypes has no second derivative"):
        gradient.sum().backward()


def test_features_changed_before_the_backward_pass(device: torch.device) -> None:
    given = tensors(WAYS["one tensor"], device)
    features = given.pop("features").requires_grad_() * 2
    result = prototype_cam(features, **given)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
def test_opcheck(device: torch.device, layout: str) -> None:
    given = tensors(SMALL["one tensor"], device, layout=layout)
    features, cam, tags, valid = given["features"], given["cam"], given["tags"], given["valid"]
    check, ops = torch.library.opcheck, torch.ops.wsss_ops
    check(ops.prototype_seeds.default, (cam, tags, valid, 0.3, 4, 3))
    seeds = ops.prototype_seeds(cam, tags, valid, 0.3, 4, 3)
    check(ops.class_prototypes.default, (features.detach().requires_grad_(), seeds, 3))
    prototypes, counts = ops.class_prototypes(features, seeds, 3)
    check(ops.class_prototypes_backward.default, (prototypes, seeds, counts, torch.float32, layout == "channels_last"))
    check(ops.prototype_cam.default, (features.detach().requires_grad_(), seeds, 3, False))
    cosines, *saved = ops.prototype_cam(features, seeds, 3, False)
    for detached in (False, True):
        check(ops.prototype_cam_backward.default, (cosines, features, seeds, cosines, *saved, detached))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
def test_opcheck_levels(device: torch.device, layout: str) -> None:
    levels = levels_of(tensors(SMALL["levels"], device, layout=layout))
    ops = torch.ops.wsss_ops
    torch.library.opcheck(ops.resize_levels.default, ([level.requires_grad_() for level in levels], 3, 2, True))
    levels = [level.detach() for level in levels]
    resized = ops.resize_levels(levels, 3, 2, True)
    torch.library.opcheck(ops.resize_levels_backward.default, (resized, levels, True))


def step(features: Tensor | Sequence[Tensor], cam: Tensor, tags: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A use within a training step: features from a layer, the result in a loss."""
    single = isinstance(features, Tensor)
    twice = features * 2 if single else [level * 2 for level in features]
    result = prototype_cam(twice, cam, tags, background_scale=scale)
    pixels = twice if single else twice[0]
    assignment = torch.zeros(pixels.shape[0], *pixels.shape[2:], dtype=torch.int64, device=cam.device)
    return result.mean(), class_prototypes(pixels, assignment, 2).mean()


@pytest.mark.parametrize(
    ("name", "layout", "autocast"),
    [
        ("one tensor", "nchw", False),
        ("one tensor", "channels_last", False),
        ("levels", "nchw", False),
        ("levels", "channels_last", True),
    ],
)
def test_compile(device: torch.device, name: str, layout: str, autocast: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for images, scale in [(2, 0.5), (1, 0.25)]:  # the second makes sizes dynamic
        case = Case(WAYS[name].levels, 4, WAYS[name].cam_size, images=images, single=name == "one tensor")
        given = tensors(case, device, layout=layout)
        levels = [level.requires_grad_() for level in levels_of(given)]
        arguments = (given["features"], given["cam"], given["tags"], scale)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            got, expected = compiled(*arguments), step(*arguments)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            assert relative_error(one, other) < 1e-5
        gradients = [torch.autograd.grad(sum(outputs), levels) for outputs in (got, expected)]
        for one, other in zip(*gradients, strict=True):
            assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("shape", "cam_size"), [((0, 5, 4, 3), (4, 3)), ((2, 5, 0, 3), (0, 3)), ((2, 0, 4, 3), (4, 3))]
)
def test_empty(device: torch.device, shape: tuple[int, ...], cam_size: tuple[int, int]) -> None:
    given = {
        "features": torch.ones(shape, device=device),
        "cam": torch.ones(shape[0], 3, *cam_size, device=device),
        "tags": torch.ones(shape[0], 3, device=device),
    }
    for features in (given["features"], [given["features"]]):
        result, gradient = run(prototype_cam, {**given, "features": features})
        assert result.shape == (shape[0], 3, *cam_size)
        assert not result.any()
        assert gradient.shape == shape
    source = given["features"].requires_grad_()
    prototypes = class_prototypes(source, torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=device), 3)
    assert prototypes.shape == (shape[0], 3, shape[1])
    assert torch.autograd.grad(prototypes.sum(), source)[0].shape == shape


def test_only_what_is_asked_for(device: torch.device) -> None:
    """Levels that need no gradient, and a cam that would."""
    given = tensors(WAYS["levels"], device)
    first, *others = given["features"]
    result = prototype_cam(**{**given, "features": [first.requires_grad_(), *others]})
    (gradient,) = torch.autograd.grad(result.sum(), first)
    assert gradient.shape == first.shape
    given["cam"].requires_grad_()
    assert not prototype_cam(**{**given, "features": [first.detach(), *others]}).requires_grad


def test_holds_little() -> None:
    """Forward and backward, beside the gradient: a tenth of what the reference holds at once, at 21 classes."""
    given = tensors(Case(((256, 16, 16),), 21, (16, 16)), torch.device("cpu"))
    features = given.pop("features").requires_grad_()

    def held(function: Callable[..., Tensor]) -> int:
        def train() -> Tensor:
            return torch.autograd.grad(function(features, **given).sum(), features)[0]

        return peak_memory(train, torch.device("cpu"))

    assert held(prototype_cam) <= held(reference.prototype_cam) / 10


def test_images_more_than_2_31_elements_apart(device: torch.device) -> None:
    """Offsets that do not fit 32 bits, in memory that is reserved but hardly touched."""
    storage = untouched(2**31 + 2**10, torch.float16, device)
    given = tensors(Case(((3, 4, 4),), 3, (4, 4)), device, torch.float16)
    for strides in [(2**31 + 16, 16, 4, 1), (2**31 + 16, 1, 12, 3), (64, 2**30 + 8, 4, 1)]:
        features = storage.as_strided((2, 3, 4, 4), strides)
        features.copy_(given["features"])
        for each in (features, [features]):
            assert_matches(prototype_cam, {**given, "features": each})


def test_more_seeds_than_kernels_count(device: torch.device) -> None:
    seeds = torch.zeros(1, dtype=torch.int16, device=device).expand(1, 2**15 + 1, 2**15)
    cam, tags = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 3, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"more than 2\^30 pixels"):
        _backend.call("prototype_seeds", device, cam, tags, None, 0.3, seeds)


def test_negated_views(device: torch.device) -> None:
    """DLPack does not carry PyTorch's lazy negation: it must be resolved before."""
    given = tensors(WAYS["one tensor"], device)
    negated = {
        name: torch.complex(given[name], -given[name]).conj().imag if name in ("features", "cam") else value
        for name, value in given.items()
    }
    assert negated["features"].is_neg()
    assert torch.equal(prototype_cam(**negated), prototype_cam(**given))


def test_threads(device: torch.device) -> None:
    """Calls from several Python threads at once do not disturb each other."""
    given = tensors(WAYS["levels"], device)
    expected = run(prototype_cam, given)

    def work() -> None:
        for _ in range(3):
            assert all(map(torch.equal, run(prototype_cam, given), expected))

    in_threads(work)


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_current_stream_and_graphs(case: Case) -> None:
    """Launches go to PyTorch's current stream, and can be captured; nothing waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: streams and graphs exist nowhere else")
    given = tensors(case, torch.device("cuda"))
    levels = levels_of(given)
    expected = run(prototype_cam, given)
    values = levels[0].clone()
    with another_stream():
        levels[0].zero_()
        torch.cuda._sleep(50_000_000)
        levels[0].copy_(values)
        for level in levels:
            level.requires_grad_()
        with no_waiting():
            gradients = torch.autograd.grad(prototype_cam(**given).sum(), levels)
    assert all(map(torch.equal, gradients, expected[1:]))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(prototype_cam(**given).sum(), levels)
    captured[0].zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected[1:]))


def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for case in WAYS.values():
        assert_matches(prototype_cam, tensors(case, torch.device("cuda:1")))
    assert torch.cuda.current_device() == 0


Bad = tuple[Callable[[Tensor, Tensor, Tensor], object], type[Exception], str]
BAD: dict[str, Bad] = {
    "no tensor": (lambda f, c, t: prototype_cam(1.0, c, t), TypeError, r"features must be a torch.Tensor, got float"),
    "no level": (lambda f, c, t: prototype_cam([], c, t), ValueError, r"at least one level, got an empty sequence"),
    "rank": (lambda f, c, t: prototype_cam(f[0], c, t), ValueError, r"features must have the 4 dimensions"),
    "level": (lambda f, c, t: prototype_cam([f, 2], c, t), TypeError, r"features\[1\] must be a torch.Tensor, got int"),
    "level dtype": (
        lambda f, c, t: prototype_cam([f, f.double()], c, t),
        TypeError,
        r"features\[1\] must have features\[0\]'s dtype float32, got float64",
    ),
    "images": (lambda f, c, t: prototype_cam(f[:1], c, t), ValueError, r"as many images as cam, 2, got 1"),
    "device": (lambda f, c, t: prototype_cam(f.to("meta"), c, t), ValueError, r"features must be on cam's device"),
    "cam rank": (lambda f, c, t: prototype_cam(f, c[0], t), ValueError, r"cam must have the 4 dimensions"),
    "cam dtype": (lambda f, c, t: prototype_cam(f, c.long(), t), TypeError, r"cam must be one of .*got int64"),
    "no classes": (lambda f, c, t: prototype_cam(f, c[:, :0], t[:, :0]), ValueError, r"cam's number of classes"),
    "no pixels": (
        lambda f, c, t: prototype_cam(f, c[:, :, :0], t, size=(4, 5)),
        ValueError,
        r"cam must have pixels to be resized, got shape \[2, 3, 0, 5\]",
    ),
    "tags": (lambda f, c, t: prototype_cam(f, c, t[:, :2]), ValueError, r"tags must have shape \[2, 3\], got \[2, 2\]"),
    "valid": (lambda f, c, t: prototype_cam(f, c, t, valid=c), ValueError, r"valid must have the 3 dimensions"),
    "valid dtype": (lambda f, c, t: prototype_cam(f, c, t, valid=c[:, 0]), TypeError, r"valid must be one of bool"),
    "valid shape": (
        lambda f, c, t: prototype_cam(f, c, t, valid=c[:, 0, :2] > 0, size=(2, 5)),
        ValueError,
        r"valid must have shape \[2, 4, 5\], got \[2, 2, 5\]",
    ),
    "size": (lambda f, c, t: prototype_cam(f, c, t, size=(0, 4)), ValueError, r"size\[0\] must be at least 1, got 0"),
    "scale": (
        lambda f, c, t: prototype_cam(f, c, t, background_scale="1"),
        TypeError,
        r"background_scale must be a number, got '1'",
    ),
    "detach": (
        lambda f, c, t: prototype_cam(f, c, t, detach_prototypes=1),
        TypeError,
        r"detach_prototypes must be a bool, got 1",
    ),
    "assignment dtype": (
        lambda f, c, t: class_prototypes(f, c[:, 0], 3),
        TypeError,
        r"assignment must be one of int64, got float32",
    ),
    "assignment shape": (
        lambda f, c, t: class_prototypes(f, c[:, 0, :2].long(), 3),
        ValueError,
        r"assignment must have shape \[2, 4, 5\], got \[2, 2, 5\]",
    ),
    "num_classes": (
        lambda f, c, t: class_prototypes(f, c[:, 0].long(), 0),
        ValueError,
        r"num_classes must be at least 1, got 0",
    ),
    "many classes": (
        lambda f, c, t: class_prototypes(f, c[:, 0].long(), 16385),
        ValueError,
        r"num_classes must be from 1 to 16384, got 16385",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    function, error, message = BAD[case]
    features, cam = torch.ones(2, 6, 4, 5, device=device), torch.ones(2, 3, 4, 5, device=device)
    with pytest.raises(error, match=message):
        function(features, cam, torch.ones(2, 3, device=device))
