"""What the example scripts have in common: options, and what rank 0 reports of a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer.training import extensions

import chainer_dist

if TYPE_CHECKING:
    from collections.abc import Sequence


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that all have.

    Args:
        description: The script's docstring.
        defaults: Of some of ``epochs``, ``batch_size`` and ``out``; which are its options then.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = {"epochs": "", "batch_size": "examples a rank; ", "out": "folder; "}
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=Path if name == "out" else positive,
            default=default,
            help=f"{texts[name]}default: {default}",
        )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--no-progress-bar", action="store_true")
    return parser


def positive(text: str) -> int:
    """Return a number of the command line that must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_reports(
    trainer: Any,
    comm: chainer_dist.CommunicatorBase,
    columns: Sequence[str],
    plotted: Sequence[str],
    args: argparse.Namespace,
) -> Any:
    """Let rank 0 log, print and plot what all ranks observe, and show a progress bar.

    Args:
        trainer: Of this rank.
        comm: Communicator.
        columns: What is printed after each epoch, besides the epoch.
        plotted: What is drawn as curves into ``plot.png``.
        args: The script's options.

    Returns:
        The log.
    """
    log = extensions.LogReport()
    trainer.extend(log)
    trainer.extend(extensions.PrintReport(["epoch", *columns]))
    trainer.extend(extensions.PlotReport(plotted, "epoch", filename="plot.png"))
    if not args.no_progress_bar:
        trainer.extend(extensions.ProgressBar(update_interval=20))
    chainer_dist.on_rank_zero(trainer, comm)  # distributed: one rank writes
    return log
