"""Show where in images a network sees their classes: exact class maps, or Grad-CAM."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from onebyone.cli.arguments import DATA_HELP, add_model, add_output, add_task
from onebyone.cli.loading import load_asked, load_task
from onebyone.cli.output import check_output, free_folder, progress, say, show
from onebyone.cli.values import shape, whole
from onebyone.core.errors import OptionError

EPILOG = """examples:
  onebyone explain runs/small cat.jpg
  onebyone explain runs/small *.png --top 5 --layer block2.conv
  onebyone explain torchvision:resnet18 --weights w.safetensors cat.jpg dog.jpg --json
  onebyone explain net.py:make --mean 0.5 --std 0.5 --size 64 cat.jpg --out cats

Maps are exact if the network averages maps of its classes or of its features; otherwise they are
Grad-CAM's. Pictures are resized and normalized like the network's data. A run, torchvision and timm
know how; for other networks give --data, or --mean and --std.
The folder gets explain.html, explain.json, and the pictures as PNG files.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone explain``."""
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a picture file")
    parser.add_argument(
        "--top", type=whole("top"), default=3, metavar="N", help="classes for each image (3)"
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="show this layer's maps too; for a run of shrink, before and after its rewrite",
    )
    parser.add_argument(
        "--original-weights",
        metavar="FILE",
        help="weights of a run's original, where they were too large to be kept in the run",
    )
    parser.add_argument("--data", metavar="DATA", help=f"what it was trained on: {DATA_HELP}")
    parser.add_argument(
        "--mean", type=_numbers, metavar="M,…", help="mean of each channel, for pixels in 0…1"
    )
    parser.add_argument(
        "--std", type=_numbers, metavar="S,…", help="standard deviation of each channel"
    )
    parser.add_argument("--size", type=_size, metavar="HxW", help="height and width in pixels")
    add_task(parser)
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line")
    add_output(parser, "folder for the page and the pictures (runs/explain-NAME)")


def run(args: argparse.Namespace) -> None:
    """Explain images."""
    check_output(args.out)
    loaded = load_asked(args, needs_weights=True)
    from onebyone.explaining import explain
    from onebyone.explaining.images import PAGE

    out = args.out or free_folder(f"explain-{loaded.source.name}")
    with progress("explain") as update:
        explained = explain(
            loaded,
            args.images,
            out=out,
            top=args.top,
            layer=args.layer,
            original=args.original,
            original_weights=args.original_weights,
            data=args.data,
            mean=args.mean,
            std=args.std,
            size=args.size,
            classes=None if args.classes is None else _lines(args.classes),
            task=load_task(args.task),
            command=args.command_line,
            progress=update,
        )
    record = explained.record
    tables = (record.table(), record.layer_table())
    show(record, args, *(table for table in tables if table is not None))
    say(args, f"Page: {out}/{PAGE}")


def _lines(path: str) -> list[str]:
    """Return the lines of a text file.

    Raises:
        OptionError: If it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--classes must name a text file, got {path!r}: {error}.") from error


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    try:
        values = tuple(float(number) for number in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"must be a number or one for each channel, such as 0.5,0.5,0.5; got {text!r}"
        )
    return values


def _size(text: str) -> tuple[int, int]:
    """Read ``64`` or ``48x64``."""
    sizes = shape(text).sizes
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"must be such as 64 or 48x64 pixels, got {text!r}")
    return sizes[0], sizes[-1]
