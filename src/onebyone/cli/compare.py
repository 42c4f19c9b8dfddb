"""Measure two networks on the same examples, and time them in interleaved rounds."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import (
    MODEL_HELP,
    add_data,
    add_measuring,
    add_metric,
    add_output,
    device_of,
    load,
    load_metric,
    progress,
    runtimes_of,
    show,
    write_record,
)  # fmt: skip
from onebyone.errors import OptionError

EPILOG = """examples:
  onebyone compare runs/classic runs/small --data digits
  onebyone compare torchvision:resnet18 torchvision:resnet34 --weights-a random \\
      --weights-b random --threads 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone compare``."""
    parser.add_argument("a", metavar="A", help=MODEL_HELP)
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--weights-a", metavar="FILE", help="weights of A, as for shrink")
    parser.add_argument("--weights-b", metavar="FILE", help="weights of B")
    add_data(parser, required=False)
    add_metric(parser)
    add_measuring(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data's split (0)")
    add_output(parser, "folder for comparison.json")


def run(args: argparse.Namespace) -> None:
    """Compare two networks."""
    runtimes = runtimes_of(args.runtime)
    metric = load_metric(args.metric)
    first = load(args.a, args.weights_a, [], needs_weights=True)
    second = load(args.b, args.weights_b, [], needs_weights=True)
    from onebyone.comparison import compare
    from onebyone.data import load_data

    data = None if args.data is None else load_data(args.data, seed=args.seed, limit=args.limit)
    size = first.input_shape or second.input_shape if data is None else data.input_shape
    if size is None:
        raise OptionError("The input shape of these networks is not known: give --data.")
    names = (first.source.name, second.source.name)
    with progress("compare") as update:
        record = compare(
            first.model,
            second.model,
            data=data,
            input_shape=(args.batch, *size),
            runtimes=runtimes,
            metric=metric,
            names=names if names[0] != names[1] else ("A", "B"),
            num_threads=args.threads,
            device=device_of(args.device),
            progress=update,
        )
    show(record, args, record.table())
    write_record(record, args.out, "comparison.json", args)
