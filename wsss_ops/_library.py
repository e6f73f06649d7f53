"""Registers the compiled operations with PyTorch's dispatcher.

An operation is a `torch.library` op with a CPU and CUDA implementation, a fake one (shapes and strides alone, for
torch.compile) and its own autograd formula. The functions of the package call the op directly: an autograd.Function
around it costs 9 to 12 us a call more and adds nothing that the op's formula does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("wsss_ops", "DEF")
# Kernels read the strides they were traced with, so a compiler may not choose others.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload:
    """Defines and returns `wsss_ops::<schema>`; backward and setup_context as for torch.library.register_autograd."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"wsss_ops::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"wsss_ops::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    # The overload itself: calling the packet above it costs another microsecond.
    overload: torch._ops.OpOverload = getattr(torch.ops.wsss_ops, name).default
    return overload


def no_second_derivative(function: str) -> Callable[..., Any]:
    """The formula of an op that is itself the gradient of a function of the package."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{function} has no second derivative: call backward without create_graph=True")

    return backward


def is_autocast_on(device: torch.device) -> bool:
    """Whether a function has to choose the dtype of its op: autocast does not see it."""
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
