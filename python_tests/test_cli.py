"""The command line around the operators."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from wsss_ops import __version__, _backend, info
from wsss_ops.__main__ import main


def test_info_names_versions_backends_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"wsss_ops:      {__version__}" in printed
    assert f"torch:         {torch.__version__}" in printed
    assert f"cpu backend:   {_backend.cpu_module().level()} of" in printed
    if not torch.cuda.is_available():
        assert "missing:       CUDA tensors: " in printed


def test_missing_extras_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(info.EXTRAS, "no_such_package", ("an example", "pip install no_such_package"))
    assert "no_such_package (an example): pip install no_such_package" in info.missing()


def test_module_and_command_are_the_same() -> None:
    for command in ([sys.executable, "-m", "wsss_ops"], ["wsss-ops"]):
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == __version__


def test_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["brain"])
    assert error.value.code == 2
    assert "invalid choice: 'brain'" in capsys.readouterr().err
