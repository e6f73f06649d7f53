"""The matrix products of a convolution whose input has been laid out in columns.

R rows (output pixels), g groups, K numbers of a group's row of columns, O output channels of a group:

    forward           columns [R, g, K], weight [g, O, K]  ->  [R, g, O]
    columns_gradient  gradient [R, g, O], weight [g, O, K] ->  [R, g, K]
    weight_gradient   gradient [R, g, O], columns [R, g, K] -> [g, O, K]

PyTorch computes them, in the precision that its settings ask for. On a CPU it has two ways to, a matrix product and a 1x1
convolution, by different libraries of which neither is always the faster (for one size we measured 12 and 5 ms). So the
first call of a shape times both on its own first rows and keeps the faster one for the life of the process. Under
torch.use_deterministic_algorithms(True) nothing is timed, as the two round differently, and the convolution is taken
where it is made for the element type.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[..., Tensor]

_PROBE_ROWS = 512
_PROBES = 3
_chosen: dict[tuple[Any, ...], str] = {}


def _mm_forward(columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.shape[0] > 1:
        product = torch.bmm(columns.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        return product if bias is None else product.add_(bias)
    matrix = weight[0].t()
    return columns.flatten(1).mm(matrix) if bias is None else torch.addmm(bias, columns.flatten(1), matrix)


def _mm_columns_gradient(gradient: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    if weight.shape[0] > 1:
        torch.bmm(gradient.transpose(0, 1), weight, out=columns.transpose(0, 1))
    else:
        torch.mm(gradient.flatten(1), weight[0], out=columns.flatten(1))
    return columns


def _mm_weight_gradient(gradient: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[0] > 1:
        return torch.bmm(gradient.permute(1, 2, 0), columns.transpose(0, 1))
    return torch.mm(gradient.flatten(1).t(), columns.flatten(1)).unsqueeze(0)


def _as_map(rows: Tensor) -> Tensor:
    """[R, g, K] as a channels_last map [1, g * K, R, 1]."""
    return rows.reshape(1, rows.shape[0], 1, -1).permute(0, 3, 1, 2)


def _conv_forward(columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = weight.view(-1, weight.shape[2], 1, 1)
    return F.conv2d(_as_map(columns), kernel, bias, groups=weight.shape[0])[0, :, :, 0].t()


def _conv_backward(gradient: Tensor, columns: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    kernel = weight.view(-1, weight.shape[2], 1, 1)
    return torch.ops.aten.convolution_backward.default(
        _as_map(gradient),
        _as_map(columns),
        kernel,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        wanted,
    )


def _conv_columns_gradient(gradient: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    # Of `columns` only the shape is read.
    product: Tensor = _conv_backward(gradient, columns, weight, [True, False, False])[0]
    return product[0, :, :, 0].t().contiguous().view_as(columns)


def _conv_weight_gradient(gradient: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    # Of `weight` only the shape is read.
    product: Tensor = _conv_backward(gradient, columns, weight, [False, True, False])[1]
    return product.reshape(weight.shape)


_MM = {"forward": _mm_forward, "columns_gradient": _mm_columns_gradient, "weight_gradient": _mm_weight_gradient}
_CONV = {
    "forward": _conv_forward,
    "columns_gradient": _conv_columns_gradient,
    "weight_gradient": _conv_weight_gradient,
}


def product(kind: str, rows: Tensor, weight: Tensor, columns: Tensor) -> Product:
    """The way to compute `kind` ("forward", "columns_gradient" or "weight_gradient") for operands like these.

    rows is the gradient, or for "forward" the columns. columns_gradient takes (gradient, weight, columns) and may or may
    not write into columns; forward takes (columns, weight, bias) and returns [R, g * O]; weight_gradient takes
    (gradient, columns, weight), of which it reads the weight's shape.
    """
    if rows.device.type != "cpu" or rows.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return _MM[kind]
    if torch.are_deterministic_algorithms_enabled():
        return _CONV[kind]
    few = min(rows.shape[0], _PROBE_ROWS)
    key = (kind, few, weight.shape, weight.dtype, torch.get_num_threads(), torch.backends.mkldnn.enabled)
    if key not in _chosen:
        rows, columns = rows[:few], columns[:few]
        arguments = {
            "forward": (columns, weight, None),
            "columns_gradient": (rows, weight, columns),
            "weight_gradient": (rows, columns, weight),
        }[kind]
        times = {name: _time(table[kind], arguments) for name, table in (("conv", _CONV), ("mm", _MM))}
        _chosen[key] = min(times, key=times.__getitem__)
    return (_CONV if _chosen[key] == "conv" else _MM)[kind]


def _time(function: Product, arguments: tuple[Any, ...]) -> float:
    """The shortest of a few runs after a first one, in seconds."""
    seconds = []
    for _ in range(_PROBES + 1):
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
