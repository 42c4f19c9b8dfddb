"""Count what a network costs, whole and layer by layer, and time it on this machine."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import (
    add_measuring,
    add_model,
    add_output,
    device_of,
    load,
    progress,
    runtimes_of,
    shape,
    show,
    write_record,
)  # fmt: skip
from onebyone.errors import OptionError

EPILOG = """examples:
  onebyone profile torchvision:resnet18
  onebyone profile timm:convnext_atto --threads 1 --runtime eager --runtime channels-last
  onebyone profile net.py:make --input-shape 1,3,64,64 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone profile``."""
    add_model(parser)
    parser.add_argument(
        "--input-shape", type=shape, metavar="N,C,H,W", help="shape of the input, batch first"
    )
    parser.add_argument("--no-time", action="store_true", help="count only")
    add_measuring(parser)
    add_output(parser, "folder for profile.json")


def run(args: argparse.Namespace) -> None:
    """Profile a network."""
    runtimes = runtimes_of(args.runtime)
    loaded = load(args.model, args.weights, args.model_option, needs_weights=False)
    if args.input_shape is not None:
        size = args.input_shape
    elif loaded.input_shape is not None:
        size = (args.batch, *loaded.input_shape)
    else:
        raise OptionError(f"The input shape of {args.model} is not known: give --input-shape.")
    from onebyone.profiling import profile

    with progress("profile") as update:
        update(0, 1, loaded.source.name)
        record = profile(
            loaded.model,
            input_shape=size,
            name=loaded.source.name,
            runtimes=runtimes,
            device=device_of(args.device),
            num_threads=args.threads,
            timed=not args.no_time,
        )
    show(record, args, record.table())
    write_record(record, args.out, "profile.json", args)
