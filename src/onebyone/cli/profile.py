"""Count a network's costs, in total and layer by layer, and time it on this machine."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import add_input, add_measuring, add_model, add_output
from onebyone.cli.loading import device_of, input_of, load_asked, runtimes_of
from onebyone.cli.output import check_output, progress, show, write_record

EPILOG = """examples:
  onebyone profile torchvision:resnet18
  onebyone profile timm:convnext_atto --threads 1 --runtime eager --runtime channels-last
  onebyone profile net.py:make --input-shape 1,3,64,64 --json
  onebyone profile net.onnx
  onebyone profile net.py:make --example net.py:two_pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone profile``."""
    add_model(parser)
    add_input(parser)
    parser.add_argument("--no-time", action="store_true", help="count only")
    add_measuring(parser)
    add_output(parser, "folder for profile.json")


def run(args: argparse.Namespace) -> None:
    """Profile a network."""
    check_output(args.out)
    runtimes = runtimes_of(args.runtimes)
    loaded = load_asked(args, needs_weights=False)
    given = input_of(args, loaded, batch=args.batch)
    from onebyone.profiling import profile

    with progress("profile") as update:
        update(0, 1, loaded.source.name)
        record = profile(
            loaded.model,
            **given,
            name=loaded.source.name,
            runtimes=runtimes,
            device=device_of(args.device),
            num_threads=args.num_threads,
            timed=not args.no_time,
        )
    show(record, args, record.table())
    write_record(record, args.out, "profile.json", args)
