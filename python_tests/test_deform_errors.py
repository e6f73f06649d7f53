"""What deform_conv2d refuses: each error names the argument and what was got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wsss_ops import deform_conv2d, set_workspace_limit

# input [2, 4, 6, 5], kernel 3x3, 2 groups, 2 offset groups; Ho = 6, Wo = 5.
SHAPES = {"input": (2, 4, 6, 5), "offset": (2, 36, 6, 5), "weight": (6, 2, 3, 3), "bias": (6,), "mask": (2, 18, 6, 5)}


def ones(*shape: int) -> Callable[[Tensor], Tensor]:
    """Something of another shape in a tensor's place."""
    return lambda x: x.new_ones(shape)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input not a tensor": ({"input": [1.0]}, TypeError, r"input must be a torch.Tensor, got list"),
    "input rank": ({"input": ones(4, 6, 5)}, ValueError, r"input must have the 4 dimensions .*\[4, 6, 5\]"),
    "input int": ({"input": lambda x: x.int()}, TypeError, r"input must be one of float64.*got int32"),
    "input complex": ({"input": lambda x: x.to(torch.complex64)}, TypeError, r"input must be one of .*complex64"),
    "input sparse": ({"input": lambda x: x.to_sparse()}, TypeError, r"input must be a dense tensor"),
    "input channels": ({"input": ones(2, 5, 6, 5)}, ValueError, r"weight .*input's 5 channels.*got \[6, 2, 3, 3\]"),
    "input without channels": ({"input": ones(2, 0, 6, 5)}, ValueError, r"input's 0 channels"),
    "input batch": (
        {"input": ones(3, 4, 6, 5)},
        ValueError,
        r"offset must have shape \[3, 36, 6, 5\], got \[2, 36, 6, 5\]",
    ),
    "input size": (
        {"input": ones(2, 4, 7, 5)},
        ValueError,
        r"offset must have shape \[2, 36, 7, 5\], got \[2, 36, 6, 5\]",
    ),
    "input too small": ({"input": ones(2, 4, 6, 0)}, ValueError, r"output's size would be \(6, 0\).*input .*\(6, 0\)"),
    "offset not a tensor": ({"offset": 0}, TypeError, r"offset must be a torch.Tensor, got int"),
    "offset rank": ({"offset": ones(2, 36, 30)}, ValueError, r"offset must have the 4 dimensions .*\[2, 36, 30\]"),
    "offset int": ({"offset": lambda x: x.long()}, TypeError, r"offset must be one of .*got int64"),
    "offset channels": ({"offset": ones(2, 35, 6, 5)}, ValueError, r"offset .*multiple of 2 \* 3 \* 3 .*got 35"),
    "offset without channels": ({"offset": ones(2, 0, 6, 5)}, ValueError, r"offset .*2 \* 3 \* 3 .*got 0"),
    "offset groups": ({"offset": ones(2, 54, 6, 5)}, ValueError, r"offset is for 3 offset groups .*4 channels"),
    "offset size": (
        {"offset": ones(2, 36, 5, 5)},
        ValueError,
        r"offset must have shape \[2, 36, 6, 5\], got \[2, 36, 5, 5\]",
    ),
    "offset device": ({"offset": lambda x: x.to("meta")}, ValueError, r"offset must be on .*(cpu|cuda).*got meta"),
    "weight not a tensor": ({"weight": None}, TypeError, r"weight must be a torch.Tensor, got NoneType"),
    "weight rank": ({"weight": ones(6, 2, 9)}, ValueError, r"weight must have the 4 dimensions .*\[6, 2, 9\]"),
    "weight int": ({"weight": lambda x: x.int()}, TypeError, r"weight must be one of .*got int32"),
    "weight dtype": (
        {"weight": lambda x: x.double()},
        TypeError,
        r"weight must have input's dtype float32, got float64",
    ),
    "weight half": ({"weight": lambda x: x.half()}, TypeError, r"weight must have input's dtype float32, got float16"),
    "weight inputs": ({"weight": ones(6, 3, 3, 3)}, ValueError, r"weight .*4 channels .*got \[6, 3, 3, 3\]"),
    "weight outputs": ({"weight": ones(5, 2, 3, 3)}, ValueError, r"weight .*2 \(groups\).* got shape \[5, 2, 3, 3\]"),
    "weight empty": ({"weight": ones(0, 2, 3, 3)}, ValueError, r"weight must not be empty, got shape \[0, 2, 3, 3\]"),
    "weight without inputs": ({"weight": ones(6, 0, 3, 3)}, ValueError, r"weight .*got shape \[6, 0, 3, 3\]"),
    "weight device": ({"weight": lambda x: x.to("meta")}, ValueError, r"weight must be on .*(cpu|cuda).*got meta"),
    "bias not a tensor": ({"bias": 1.0}, TypeError, r"bias must be a torch.Tensor, got float"),
    "bias rank": ({"bias": ones(6, 1)}, ValueError, r"bias must have the 1 dimensions .*\[6, 1\]"),
    "bias size": ({"bias": ones(5)}, ValueError, r"bias must have shape \[6\], got \[5\]"),
    "bias dtype": ({"bias": lambda x: x.double()}, TypeError, r"bias must have input's dtype float32, got float64"),
    "bias device": ({"bias": lambda x: x.to("meta")}, ValueError, r"bias must be on .*(cpu|cuda).*got meta"),
    "mask not a tensor": ({"mask": 1}, TypeError, r"mask must be a torch.Tensor, got int"),
    "mask rank": ({"mask": ones(18, 6, 5)}, ValueError, r"mask must have the 4 dimensions .*\[18, 6, 5\]"),
    "mask bool": ({"mask": lambda x: x.bool()}, TypeError, r"mask must be one of .*got bool"),
    "mask channels": (
        {"mask": ones(2, 9, 6, 5)},
        ValueError,
        r"mask must have shape \[2, 18, 6, 5\], got \[2, 9, 6, 5\]",
    ),
    "mask size": (
        {"mask": ones(2, 18, 5, 5)},
        ValueError,
        r"mask must have shape \[2, 18, 6, 5\], got \[2, 18, 5, 5\]",
    ),
    "mask batch": (
        {"mask": ones(1, 18, 6, 5)},
        ValueError,
        r"mask must have shape \[2, 18, 6, 5\], got \[1, 18, 6, 5\]",
    ),
    "mask device": ({"mask": lambda x: x.to("meta")}, ValueError, r"mask must be on .*(cpu|cuda).*got meta"),
    "stride zero": ({"stride": 0}, ValueError, r"stride.* must be at least 1, got 0"),
    "stride zero along x": ({"stride": (1, 0)}, ValueError, r"stride.*1.* must be at least 1, got 0"),
    "stride float": ({"stride": 1.0}, TypeError, r"stride must be .*int.*got 1.0"),
    "stride triple": ({"stride": (1, 1, 1)}, TypeError, r"stride must be .*pair.*got \(1, 1, 1\)"),
    "padding negative": ({"padding": -1}, ValueError, r"padding.* must be at least 0, got -1"),
    "padding text": ({"padding": "same"}, TypeError, r"padding must be .*got 'same'"),
    "dilation zero": ({"dilation": (0, 1)}, ValueError, r"dilation.*0.* must be at least 1, got 0"),
    "dilation bool": ({"dilation": True}, TypeError, r"dilation must be .*int.*got True"),
    "dilation too wide": ({"dilation": 4}, ValueError, r"output's size would be \(0, -1\).*\(6, 5\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    changes, error, message = BAD[case]
    arguments: dict[str, Any] = {name: torch.ones(shape, device=device) for name, shape in SHAPES.items()}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        deform_conv2d(**{"padding": 1, **arguments})


def test_offsets_left_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; meta tensors stand for another device above")
    arguments = {name: torch.ones(shape, device="cuda") for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r"offset must be on input's device cuda:0, got cpu"):
        deform_conv2d(**{**arguments, "offset": arguments["offset"].cpu()}, padding=1)


@pytest.mark.parametrize(("nbytes", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_workspace_limit(nbytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"nbytes must be .*got {nbytes}"):
        set_workspace_limit(nbytes)
