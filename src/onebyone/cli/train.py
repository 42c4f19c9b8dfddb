"""Train a network, and write its weights, record and report to a run's folder."""

from __future__ import annotations

import argparse
from dataclasses import replace

from onebyone.cli.arguments import SOURCES, add_run
from onebyone.cli.loading import data_of, load_asked, run_settings
from onebyone.cli.option_files import RECIPE
from onebyone.cli.options import group
from onebyone.cli.output import free_folder, progress, say, show, stoppable
from onebyone.core.settings.runs import TrainRunSettings

EPILOG = """examples:
  onebyone train onebyone:classic --data digits --epochs 20 --out runs/classic
  onebyone train --recipe classic-digits --out runs/classic
  onebyone train onebyone:nin-cifar10 --data cifar10 --epochs 60
  onebyone train onebyone:nin-cifar10 --data cifar10 --epochs 60 --out runs/nin --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone train``."""
    add_run(parser, TrainRunSettings)
    # Only for the help: `main` has put the recipe's options in its place.
    group(parser, SOURCES).add_argument(
        RECIPE,
        metavar="NAME",
        help="instead of MODEL: a published training, or your own as FILE.toml; other options "
        "replace what it says",
    )


def run(args: argparse.Namespace) -> None:
    """Train a network."""
    settings = run_settings(args, TrainRunSettings)
    from onebyone.pipeline.train import train_loaded

    loaded = load_asked(args, needs_weights=False)
    data = data_of(args)
    out = args.out or free_folder(loaded.source.name)
    with stoppable(out), progress("train") as update:
        settings = replace(settings, out=out, progress=update)
        trained = train_loaded(loaded.model, loaded.source, data, settings)
    record = trained.record
    assert record.training is not None
    show(record, args, record.training.table())
    after = record.after
    if after is not None and after.metric is not None:
        say(args, f"Test {after.metric.name}: {after.metric}")
    say(args, f"Report: {out}/report.html")
