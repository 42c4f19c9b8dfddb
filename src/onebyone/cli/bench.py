"""Time a network in all runtimes that are installed, interleaved, and compare their outputs."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import FILE_HELP, add_input, add_measuring, add_model, add_output
from onebyone.cli.loading import device_of, input_of, load_asked
from onebyone.cli.output import check_output, progress, show, write_record
from onebyone.cli.values import whole

EPILOG = """examples:
  onebyone bench torchvision:resnet18
  onebyone bench timm:mobilenetv2_100 --batch 32 --threads 2 --keep-memory
  onebyone bench net.onnx --threads 1
  onebyone bench runs/small --threads 1 --runtime eager --runtime packed --runtime onnxruntime
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone bench``."""
    add_model(parser, help_text=FILE_HELP)
    add_input(parser)
    add_measuring(parser, default="all that are installed")
    parser.add_argument(
        "--rounds", type=whole("rounds"), default=30, metavar="N", help="interleaved rounds (30)"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="make the C library keep freed memory, so that large outputs reuse it",
    )
    add_output(parser, "folder for bench.json")


def run(args: argparse.Namespace) -> None:
    """Time a network in several runtimes."""
    check_output(args.out)
    loaded = load_asked(args, needs_weights=False, as_file=True)
    given = input_of(args, loaded, batch=args.batch)
    from onebyone.profiling.bench import bench

    with progress("bench") as update:
        record = bench(
            loaded.model,
            **given,
            runtimes=args.runtimes,
            rounds=args.rounds,
            num_threads=args.num_threads,
            device=device_of(args.device),
            keep_freed_memory=args.keep_memory,
            name=loaded.source.name,
            progress=update,
        )
    show(record, args, record.table())
    write_record(record, args.out, "bench.json", args)
