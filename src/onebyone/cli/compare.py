"""Measure networks on the same examples, and time them in interleaved rounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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
    say,
    show,
)
from onebyone.errors import OptionError, OutputError

if TYPE_CHECKING:
    from onebyone.models import Loaded

RECORD = "compare.json"
PAGE = "report.html"

EPILOG = """examples:
  onebyone compare runs/classic runs/small --data digits
  onebyone compare runs/a runs/b runs/c --data cifar10 --runtime eager --runtime onnxruntime
  onebyone compare torchvision:resnet18 torchvision:resnet34 --weights random --threads 1
  onebyone compare net.py:old net.py:new --data data.py:noisy --metric scores.py:psnr --out c

Every network is scored on the same examples and compared with the first one, A: hits and misses by
the exact McNemar test, other metrics by a paired bootstrap, or by Student's paired t below 30
examples. In every runtime all networks are timed in each of the interleaved rounds. With --out the
folder gets report.html and compare.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone compare``."""
    parser.add_argument("a", metavar="A", help=MODEL_HELP)
    parser.add_argument("others", metavar="B", nargs="+", help="others, to compare with A")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        action="append",
        default=[],
        help="as for shrink: once for all, or once for each network in their order, - for none",
    )
    parser.add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of all factories, such as num_classes=10; may be repeated",
    )
    add_data(parser, required=False)
    add_metric(parser)
    add_measuring(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data's split (0)")
    add_output(parser, "folder for report.html and compare.json")


def run(args: argparse.Namespace) -> None:
    """Compare networks."""
    from onebyone.records import check_folder

    runtimes = runtimes_of(args.runtime)
    metric = load_metric(args.metric)
    folder = None if args.out is None else check_folder(Path(args.out), RECORD, "comparison")
    networks = _load_all([args.a, *args.others], args.weights, args.model_option)
    from onebyone.comparison import compare
    from onebyone.data import load_data

    data = None if args.data is None else load_data(args.data, seed=args.seed, limit=args.limit)
    known = [network.input_shape for network in networks if network.input_shape is not None]
    size = data.input_shape if data is not None else known[0] if known else None
    if size is None:
        raise OptionError("The input shape of these networks is not known: give --data.")
    with progress("compare") as update:
        record = compare(
            *(network.model for network in networks),
            data=data,
            input_shape=(args.batch, *size),
            runtimes=runtimes,
            metric=metric,
            names=_names(networks),
            sources=[network.source for network in networks],
            num_threads=args.threads,
            device=device_of(args.device),
            command=args.command_line,
            progress=update,
        )
    if folder is not None:
        from onebyone.records import write_text
        from onebyone.report.compared import render_compared

        page = render_compared(record)
        _make(folder)
        record.save(folder / RECORD)
        write_text(folder / PAGE, page)
    show(record, args, *record.tables())
    if folder is not None:
        say(args, f"Report: {folder / PAGE}")


def _load_all(specs: list[str], weights: list[str], options: list[str]) -> list[Loaded]:
    """Load the networks, each with its weights.

    Raises:
        OptionError: If there are weights for another number of networks.
    """
    if len(weights) not in (0, 1, len(specs)):
        raise OptionError(
            f"--weights must be given once for all networks, or {len(specs)} times, once for each "
            f"(- for none), got {len(weights)}."
        )
    from onebyone.runs import is_run

    each = weights if len(weights) == len(specs) else (weights or ["-"]) * len(specs)
    networks = []
    for spec, file in zip(specs, each, strict=True):
        # One file for all is meant for those that need one.
        own = file == "-" or (len(weights) == 1 and is_run(spec))
        networks.append(
            load(spec, None if own else file, [] if is_run(spec) else options, needs_weights=True)
        )
    return networks


def _names(networks: list[Loaded]) -> list[str]:
    """Return the networks' names, with their folders or libraries where names alone are equal."""
    names = [network.source.name for network in networks]
    specs = [network.source.spec or network.source.name for network in networks]
    return [
        spec if names.count(name) > 1 else name for name, spec in zip(names, specs, strict=True)
    ]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {folder}: {error.strerror}.") from error
