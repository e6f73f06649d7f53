"""Argument checks that the operators share: each raises naming the argument and what was got."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_CLASSES = 2**14  # whose numbers fit 16 bits, and a list of them in 32 the shared memory of every GPU
_LARGEST_FLOAT = sys.float_info.max


def check_tensor(name: str, value: object, dims: str, dtypes: Sequence[torch.dtype]) -> None:
    """`dims` names the dimensions, as in "N, D, H, W"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != dims.count(",") + 1:
        rank = dims.count(",") + 1
        raise ValueError(f"{name} must have the {rank} dimensions [{dims}], got shape {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(_short, dtypes))}, got {_short(value.dtype)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on a cpu or cuda device, got {value.device}")


def check_int(name: str, value: Any, minimum: int) -> int:
    if type(value) is int and value >= minimum:  # a microsecond faster than abstract classes
        return value
    # Compilers that trace with dynamic shapes pass symbols.
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    whole = cast(int, value) if isinstance(value, torch.SymInt) else int(value)
    if whole < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {whole}")
    return whole


def check_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list, Sequence)) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of ints, got {value!r}")
    return check_int(f"{name}[0]", value[0], minimum), check_int(f"{name}[1]", value[1], minimum)


def check_two(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """A pair of ints, or one for both."""
    if type(value) is int and value >= minimum:
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return check_pair(name, value, minimum)
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    both = check_int(name, value, minimum)
    return both, both


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        value = float(value)  # NumPy's
    if not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:  # an int can be larger than any float
        raise ValueError(f"{name} must be finite as a float, got {value}")
    return cast(float, value)


def check_positive(name: str, value: Any) -> float:
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return number


def check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def check_classes(name: str, number: int) -> None:
    """`name` says whose number of classes it is."""
    if not 1 <= number <= MOST_CLASSES:
        raise ValueError(f"{name} must be from 1 to {MOST_CLASSES}, got {number}")


def check_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {_short(other.dtype)}, got {_short(value.dtype)}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
