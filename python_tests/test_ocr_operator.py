"""ocr_loss as a PyTorch operator on every backend: gradients, dispatcher, compiler, memory, streams and bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import another_stream, in_threads, no_waiting, relative_error, untouched
from ocr_cases import WAYS, Case, assert_matches, run, tensors
from torch import Tensor

from wsss_ops import annotation_correlation, ocr_loss, out_of_candidate_rate, reference
from wsss_ops.bench.measure import peak_memory


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_gradcheck(device: torch.device, case: Case, reduction: str, layout: str) -> None:
    """Steps are far smaller than the distance from other classes and groups, which ambiguous pixels lack."""
    small = Case((1, 5 if case.shape[1] < 24 else 26, 2, 3), case.size and (4, 5), prior=True, threshold=0.2)
    given = tensors(small, device, torch.float64, layout)
    logits = given.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: ocr_loss(logits, reduction=reduction, **given), logits)


def test_second_derivative_is_refused(device: torch.device) -> None:
    given = tensors(WAYS["few"], device)
    logits = given.pop("logits").requires_grad_()
    (gradient,) = torch.autograd.grad(ocr_loss(logits, **given), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="ocr_loss has no second derivative"):
        gradient.sum().backward()


def test_logits_changed_before_the_backward_pass(device: torch.device) -> None:
    given = tensors(WAYS["few"], device)
    scores = given.pop("logits").requires_grad_() * 2
    loss = ocr_loss(scores, **given)
    scores.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("name", "layout"), [("few", "channels_last"), ("many", "transposed"), ("resized", "nchw")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device: torch.device, name: str, layout: str, reduction: str) -> None:
    case = WAYS[name]
    given = tensors(case, device, layout=layout)
    logits, tags, prior, ignore = given["logits"], given["tags"], given["prior"], given["ignore"]
    sizes = (*case.out_size, False)
    ops = torch.ops.wsss_ops
    arguments = (logits.requires_grad_(), tags, prior, ignore, 0.2, 0.0, 1.0, *sizes, reduction)
    torch.library.opcheck(ops.ocr_loss.default, arguments)
    if reduction == "mean":
        loss, *saved = ops.ocr_loss(*arguments)
        arguments = (loss.detach(), logits.detach(), tags, prior, *saved, 0.2, 0.0, 1.0, False, reduction)
        torch.library.opcheck(ops.ocr_loss_backward.default, arguments)
        torch.library.opcheck(ops.ocr_count.default, (logits.detach(), tags, ignore, *sizes))


def step(
    logits: Tensor, tags: Tensor, prior: Tensor, size: tuple[int, int] | None, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A use within a training step: scores from a layer, loss with count, and the rate."""
    scores = logits * 2 + 1
    options = {"prior": prior, "threshold": 0.1, "margin": margin, "size": size}
    loss, count = ocr_loss(scores, tags, **options, reduction="sum", return_count=True)
    return loss / count, count, out_of_candidate_rate(scores, tags, size=size)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_count_belongs_to_the_caller(device: torch.device, reduction: str) -> None:
    """What sums it over processes does so in place, and tells autograd nothing of it."""
    given = tensors(Case((2, 5, 6, 7)), device)
    logits = given["logits"].requires_grad_()
    gradients = []
    for factor in (1, 10):
        loss, count = ocr_loss(**given, reduction=reduction, return_count=True)
        count.data.mul_(factor)
        gradients += torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(*gradients)


def test_scores_alone_have_a_gradient(device: torch.device) -> None:
    given = tensors(Case((2, 5, 6, 7), prior=True), device)
    loss = ocr_loss(given["logits"], given["tags"].float().requires_grad_(), prior=given["prior"].requires_grad_())
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("layout", "size", "autocast"),
    [("nchw", None, False), ("nchw", (12, 10), False), ("channels_last", None, False), ("channels_last", None, True)],
)
def test_compile(device: torch.device, layout: str, size: tuple[int, int] | None, autocast: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for shape, margin in [((2, 5, 9, 7), 0.5), ((1, 5, 12, 5), 0.75)]:  # the second makes sizes dynamic
        given = tensors(Case(shape, prior=True), device, layout=layout)
        arguments = (given["logits"].requires_grad_(), given["tags"], given["prior"], size, margin)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            got, expected = compiled(*arguments), step(*arguments)
        assert got[0].dtype == torch.float32
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 1e-5
        (got_gradient,) = torch.autograd.grad(got[0], arguments[0])
        (gradient,) = torch.autograd.grad(expected[0], arguments[0])
        assert relative_error(got_gradient, gradient) < 1e-5


def test_autocast_leaves_the_dtype_alone(device: torch.device) -> None:
    given = tensors(WAYS["few"], device)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(ocr_loss, given)
        prior = annotation_correlation(given["tags"])
    assert torch.equal(got["loss"], run(ocr_loss, given)["loss"])
    assert got["gradient"].dtype == torch.float32
    assert torch.equal(prior, annotation_correlation(given["tags"]))


@pytest.mark.parametrize(("shape", "size"), [((0, 5, 6, 7), None), ((0, 5, 6, 7), (9, 8)), ((2, 5, 0, 7), None)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty(
    device: torch.device, shape: tuple[int, int, int, int], size: tuple[int, int] | None, reduction: str
) -> None:
    given = {"logits": torch.ones(shape, device=device), "tags": torch.ones(shape[:2], device=device), "size": size}
    got = run(ocr_loss, given, reduction=reduction)
    assert got["loss"].shape == ((shape[0], *(size or shape[2:])) if reduction == "none" else ())
    assert not got["loss"].any()
    assert got["count"] == 0
    assert got["gradient"].shape == shape
    assert out_of_candidate_rate(**given) == 0


def test_resized_form_stores_little() -> None:
    """At most a tenth of what the reference holds at once, forward and backward."""
    given = tensors(Case((1, 21, 16, 16), (128, 128)), torch.device("cpu"))

    def held(function: Callable[..., Tensor]) -> int:
        return peak_memory(lambda: run(function, given, return_count=True), torch.device("cpu"))

    assert held(ocr_loss) <= held(reference.ocr_loss) / 10


@pytest.mark.parametrize("size", [None, (5, 7)])
def test_more_than_2_31_elements_apart(device: torch.device, size: tuple[int, int] | None) -> None:
    """Images, classes and rows whose offsets do not fit 32 bits, in memory that is reserved but hardly touched."""
    storage = untouched(2**32 + 2**10, torch.bfloat16, device)
    given = tensors(Case((2, 3, 2, 4), size), device, torch.bfloat16)
    for stride in [(2**32 - 70, 8, 4, 1), (64, 2**31 + 16, 8, 1), (24, 8, 2**32 - 70, 1), (24, 1, 12, 2**30 + 3)]:
        logits = storage.as_strided((2, 3, 2, 4), stride)
        logits.copy_(given["logits"])
        assert_matches(ocr_loss, {**given, "logits": logits}, reduction="none")


def test_negated_views(device: torch.device) -> None:
    """DLPack does not carry PyTorch's lazy negation: it must be resolved before."""
    given = tensors(WAYS["few"], device)
    negated = torch.complex(given["logits"], -given["logits"]).conj().imag
    assert negated.is_neg()
    assert torch.equal(ocr_loss(**{**given, "logits": negated}), ocr_loss(**given))


def test_threads(device: torch.device) -> None:
    """Calls from several Python threads at once do not disturb each other."""
    given = tensors(WAYS["many"], device)
    expected = run(ocr_loss, given)

    def work() -> None:
        for _ in range(5):
            got = run(ocr_loss, given)
            assert all(torch.equal(got[name], value) for name, value in expected.items())

    in_threads(work)


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_current_stream_and_graphs(case: Case) -> None:
    """Launches go to PyTorch's current stream, and can be captured; nothing waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: streams and graphs exist nowhere else")
    given = tensors(case, torch.device("cuda"))
    expected = run(ocr_loss, given)
    values = given["logits"].clone()
    with another_stream():
        given["logits"].zero_()
        torch.cuda._sleep(50_000_000)
        given["logits"].copy_(values)
        logits = given["logits"].requires_grad_()
        with no_waiting():
            loss = ocr_loss(**given)
            (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, expected["gradient"])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(ocr_loss(**given), logits)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected["gradient"])


def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for case in WAYS.values():
        assert_matches(ocr_loss, tensors(case, torch.device("cuda:1")))
    assert torch.cuda.current_device() == 0


def test_annotation_correlation(device: torch.device) -> None:
    tags = torch.tensor([[1, 1, 0, 0], [1, 0, 2, 0], [1, 1, -1, 0]], device=device)
    expected = [[1, 2 / 3, 2 / 3, 0], [1, 1, 1 / 2, 0], [1, 1 / 2, 1, 0], [0, 0, 0, 0]]
    prior = annotation_correlation(tags)
    assert prior.dtype == torch.float32
    assert torch.allclose(prior, torch.tensor(expected, device=device))
    many = torch.rand(50, 30, device=device) < 0.2
    assert torch.allclose(annotation_correlation(many), reference.annotation_correlation(many))
    assert not annotation_correlation(many[:0]).any()


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


Bad = tuple[Callable[[Tensor, Tensor], object], type[Exception], str]
BAD: dict[str, Bad] = {
    "logits no tensor": (lambda x, t: ocr_loss([1.0], t), TypeError, r"logits must be a torch.Tensor, got list"),
    "logits rank": (lambda x, t: ocr_loss(x[0], t), ValueError, r"logits must have the 4 dimensions .*\[3, 4, 5\]"),
    "logits dtype": (lambda x, t: ocr_loss(x.long(), t), TypeError, r"logits must be one of .*got int64"),
    "no classes": (
        lambda x, t: ocr_loss(x[:, :0], t[:, :0]),
        ValueError,
        r"logits' number of classes must be from 1 to 16384, got 0",
    ),
    "tags rank": (lambda x, t: ocr_loss(x, t[0]), ValueError, r"tags must have the 2 dimensions"),
    "tags shape": (lambda x, t: ocr_loss(x, t[:, :2]), ValueError, r"tags must have shape \[2, 3\], got \[2, 2\]"),
    "tags complex": (lambda x, t: ocr_loss(x, t.to(torch.complex64)), TypeError, r"tags must be one of .*complex64"),
    "tags device": (lambda x, t: ocr_loss(x, on_meta(t)), ValueError, r"tags must be on logits's device .*, got meta"),
    "prior shape": (lambda x, t: ocr_loss(x, t, prior=t), ValueError, r"prior must have shape \[3, 3\], got \[2, 3\]"),
    "prior device": (
        lambda x, t: ocr_loss(x, t, prior=on_meta(torch.eye(3))),
        ValueError,
        r"prior must be on logits's",
    ),
    "threshold": (lambda x, t: ocr_loss(x, t, threshold=1.5), ValueError, r"threshold must be from 0 to 1, got 1.5"),
    "threshold NaN": (lambda x, t: ocr_loss(x, t, threshold=float("nan")), ValueError, r"threshold must be finite"),
    "margin": (
        lambda x, t: ocr_loss(x, t, margin=float("inf")),
        ValueError,
        r"margin must be finite .*got inf",
    ),
    "margin tensor": (lambda x, t: ocr_loss(x, t, margin=x.sum()), TypeError, r"margin must be a number, got tensor"),
    "scale": (lambda x, t: ocr_loss(x, t, scale=0), ValueError, r"scale must be above 0, got 0"),
    "scale bool": (lambda x, t: ocr_loss(x, t, scale=True), TypeError, r"scale must be a number, got True"),
    "ignore dtype": (
        lambda x, t: ocr_loss(x, t, ignore=x[:, 0]),
        TypeError,
        r"ignore must be one of bool, got float32",
    ),
    "ignore shape": (
        lambda x, t: ocr_loss(x, t, ignore=x[:, 0] > 0, size=(2, 2)),
        ValueError,
        r"shape \[2, 2, 2\], got",
    ),
    "size": (lambda x, t: ocr_loss(x, t, size=4), TypeError, r"size must be a pair of ints, got 4"),
    "size zero": (lambda x, t: ocr_loss(x, t, size=(0, 4)), ValueError, r"size\[0\] must be at least 1, got 0"),
    "size of nothing": (lambda x, t: ocr_loss(x[:, :, :0], t, size=(4, 4)), ValueError, r"logits must have pixels"),
    "return_count": (lambda x, t: ocr_loss(x, t, return_count=1), TypeError, r"return_count must be a bool, got 1"),
    "align_corners": (lambda x, t: ocr_loss(x, t, align_corners=1), TypeError, r"align_corners must be a bool, got 1"),
    "reduction": (lambda x, t: ocr_loss(x, t, reduction="avg"), ValueError, r'"sum" or "none", got \'avg\''),
    "rate logits": (lambda x, t: out_of_candidate_rate(x[0], t), ValueError, r"logits must have the 4 dimensions"),
    "rate ignore": (lambda x, t: out_of_candidate_rate(x, t, ignore=x > 0), ValueError, r"ignore must have the 3"),
    "correlation": (lambda x, t: annotation_correlation(x), ValueError, r"tags must have the 2 dimensions \[M, C\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(torch.ones(2, 3, 4, 5, device=device), torch.ones(2, 3, device=device))
