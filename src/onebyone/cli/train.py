"""Train a network, and keep its weights, its record and its report in a run's folder."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import (
    add_data,
    add_measuring,
    add_metric,
    add_model,
    add_run_folder,
    free_folder,
    load,
    positive,
    progress,
    run_settings,
    runtimes_of,
    say,
    show,
    stoppable,
)

EPILOG = """examples:
  onebyone train onebyone:classic --data digits --epochs 20 --out runs/classic
  onebyone train onebyone:nin-cifar10 --data cifar10 --epochs 60
  onebyone train onebyone:nin-cifar10 --data cifar10 --epochs 60 --out runs/nin --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone train``."""
    add_model(parser)
    add_data(parser)
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="(20)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="of the training")
    parser.add_argument("--rate", type=float, metavar="R", help="learning rate")
    add_metric(parser)
    add_measuring(parser)
    add_run_folder(parser)


def run(args: argparse.Namespace) -> None:
    """Train a network."""
    runtimes_of(args.runtime)  # a typing error should not wait for the data
    from onebyone.pipeline import TrainSettings, train_loaded
    from onebyone.randomness import seeded

    # New weights are drawn when the network is made: the seed decides them too.
    with seeded(args.seed):
        loaded = load(args.model, args.weights, args.model_option, needs_weights=False)
    from onebyone.data import load_data

    data = load_data(args.data, seed=args.seed, limit=args.limit)
    out = args.out or free_folder(loaded.source.name)
    with stoppable(out), progress("train") as update:
        settings = TrainSettings(
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.rate,
            **run_settings(args, out, update),
        )
        trained = train_loaded(loaded.model, loaded.source, data, settings)
    record = trained.record
    assert record.training is not None
    show(record, args, record.training.table())
    after = record.after
    if after is not None and after.metric is not None:
        say(args, f"Test {after.metric.name}: {after.metric}")
    say(args, f"Report: {out}/report.html")
