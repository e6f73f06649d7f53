"""Command-line arguments that training and evaluation share; they decide no figure of a run."""

import argparse
import math


def natural(text: str) -> int:
    """The number that an option of argparse names. Raises ArgumentTypeError for what is no whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def seconds(text: str) -> float:
    """The time that an option of argparse names. Raises ArgumentTypeError for what is no number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --panels, --check and --device."""
    parser.add_argument("--panels", type=natural, default=8, help="images shown in panels.png (default: 8)")
    parser.add_argument(
        "--check",
        choices=("auto", "headers", "full"),
        default="auto",
        help="how closely to check the data beforehand (default: auto, full up to 5000 images)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
