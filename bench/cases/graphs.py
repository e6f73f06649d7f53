"""Calls of the operators replayed from a CUDA graph, against the same calls one by one: a graph must lose nothing.

Layers in bfloat16 and the first size of each other operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..measure import Function
from . import deform, ocr, patch, prototype
from .case import Case


def captured(function: Function) -> Function:
    """The replay of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in calls that are not captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Function = graph.replay
    return replay


def graph_case(case: Case) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        call = case.build(on, False)["wsss_ops"]
        return {"floor: call by call": call, "wsss_ops": captured(call)}

    return Case(f"{case.name} in a graph", "graphs", case.work, "cuda", build)


CASES = [
    graph_case(case)
    for case in (
        *(case for case in deform.CASES if " bf16 " in case.name),
        *(next(case for case in file.CASES if case.device == "cuda") for file in (ocr, patch, prototype)),
    )
]
