"""Run folders: settings, resumable checkpoints and results, each written under its final name in one step."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsss_ops._files import make_folder, read_json, remove_leftovers, write_atomic, write_json

SETTINGS, CHECKPOINT, MODEL, METRICS = "settings.json", "checkpoint.pt", "model.pt", "metrics.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Saves tensors, numbers, texts and containers of them, atomically."""
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Loads what `save` saved, onto the CPU, without running any code from the file.

    Raises ValueError naming the file where it cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")  # of which torch says nothing
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged files, some with pages of advice
        cause = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{path} is not a readable PyTorch file of tensors: {cause}") from error


def restore(network: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Gives network the state that a file of a run, loaded from path, has of it.

    Raises ValueError naming the file where it does not fit.
    """
    try:
        network.load_state_dict(content["network"])
    except (KeyError, RuntimeError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} was written by an earlier version, which this one cannot read ({cause})") from error


def check_claim(out: Path, settings: dict[str, Any]) -> None:
    """Checks that the folder out, which need not exist, is free or that of a run with these settings.

    Raises ValueError where it is not, naming the settings that differ.
    """
    path = out / SETTINGS
    if path.exists():
        before, now = read_json(path), json.loads(json.dumps(settings))
        if before.get("system") != now.get("system"):
            raise ValueError(f"{out} holds a run of {before.get('system')}; choose another --out")
        differing = [
            f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differing:
            head = f"{out} holds a run with other settings; choose another --out:"
            raise ValueError("\n  ".join([head, *differing]))
        return
    strangers = [name for name in (CHECKPOINT, MODEL, METRICS) if (out / name).exists()]
    if strangers:
        raise ValueError(f"{out} holds {', '.join(strangers)} but no {SETTINGS}; choose another --out")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder out that of a run with these settings, unless it is already.

    Removes what ended processes left half written in it.
    Raises ValueError where it is another run's or cannot be written into.
    """
    check_claim(out, settings)
    make_folder(out)
    remove_leftovers(out)
    write_json(out / SETTINGS, settings)
