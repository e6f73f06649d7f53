"""The command line around the operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wsss_ops import __version__, _backend, demo, info
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


def test_demo_refuses_a_folder_that_it_cannot_fill_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.info, "main", lambda: pytest.fail("it worked"))
    (tmp_path / "file").write_text("precious")
    for out, message in (
        (tmp_path, f"--out: {tmp_path} is there already"),
        (tmp_path / "file" / "x", f"--out: {tmp_path / 'file' / 'x'} cannot be made a folder: Not a directory"),
        (Path("/proc/nope"), "--out: /proc/nope cannot be made a folder: "),
    ):
        assert main(["demo", "--out", str(out)]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_output_that_nobody_reads_ends_a_command_quietly() -> None:
    command = subprocess.Popen([sys.executable, "-m", "wsss_ops", "info"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert command.stdout is not None
    command.stdout.close()
    assert command.communicate()[1] == ""
    assert command.returncode == 141
