"""The command line: `wsss-ops info | demo | train | evaluate | bench`, the same as `python -m wsss_ops`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from . import __version__, demo, info
from .bench import runner
from .training import evaluate, train


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 for what it is given and cannot use, which raises ValueError."""
    parser = argparse.ArgumentParser(prog="wsss-ops", description="Fused operators for weakly supervised segmentation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info_parser = commands.add_parser("info", help="what is installed, what is missing and how to get it")
    demo_parser = commands.add_parser("demo", help="check, measure and train on generated scenes, in a few minutes")
    train_parser = commands.add_parser("train", help="train a system on photographs or generated scenes")
    evaluate_parser = commands.add_parser("evaluate", help="IoU, precision and recall of a trained system")
    bench_parser = commands.add_parser("bench", help="time the operators against their references and floors")

    info_parser.set_defaults(run=lambda _: info.main())
    for command, module in (
        (demo_parser, demo),
        (train_parser, train),
        (evaluate_parser, evaluate),
        (bench_parser, runner),
    ):
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    parsed = parser.parse_args(arguments)
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads the output, as `head` does, has enough. At its end Python flushes once more: nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
