"""Write a network for other runtimes, and check each file there.

A file is kept only if it gives the network's outputs in the runtime that it is for. The batch is
free, and so are height and width where the network takes other sizes. Beside each file lies a
loader that needs the file's runtime alone, and preprocessing.json says how pictures become inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from onebyone.cli.arguments import add_json, add_model, load, progress, say, shape, show
from onebyone.errors import OneByOneError, OptionError

if TYPE_CHECKING:
    from onebyone.data import Data
    from onebyone.exporting import Preprocessing
    from onebyone.models import Loaded
    from onebyone.records import RunRecord

EPILOG = """examples:
  onebyone export runs/small --format onnx --format pt2 --out exports/small
  onebyone export torchvision:resnet18 --weights r18.safetensors --format openvino --out r18
  onebyone export net.py:make --input-shape 1,3,64,64 --format safetensors --out exports/net
"""
# What a check runs on: a run's own data where it is at hand, and few of it.
EXAMPLES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone export``."""
    add_model(parser)
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        action="append",
        help="safetensors, onnx (default), pt2, openvino or executorch; may be repeated",
    )
    parser.add_argument(
        "--data", metavar="DATA", help="real inputs to check on (a run's own data, else random)"
    )
    parser.add_argument(
        "--input-shape",
        type=shape,
        metavar="N,C,H,W",
        help="shape of an input, batch first; the file's batch is free",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the files")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Export a network."""
    loaded = load(args.model, args.weights, args.model_option, needs_weights=True)
    from onebyone.data import load_data
    from onebyone.exporting import export
    from onebyone.records import RunRecord
    from onebyone.runs import RECORD, is_run

    record = RunRecord.load(Path(args.model) / RECORD) if is_run(args.model) else None
    data = None
    if args.data is not None:
        data = load_data(args.data, limit=EXAMPLES)
    elif record is not None:
        data = _own_data(record)
    size = args.input_shape[1:] if args.input_shape else loaded.input_shape
    if size is None and data is None:
        raise OptionError(f"The input shape of {args.model} is not known: give --input-shape.")
    with progress("export"):
        made = export(
            loaded.model,
            args.out,
            formats=args.format or ["onnx"],
            data=data,
            input_shape=None if size is None else (1, *size),
            preprocessing=None if data is not None else _preprocessing(loaded, args.model, size),
            plan=None if record is None else record.plan,
            name=loaded.source.name,
        )
    show(made, args, made.table())
    say(args, f"Wrote {args.out}")


def _preprocessing(
    loaded: Loaded, folder: str, size: tuple[int, ...] | None
) -> Preprocessing | None:
    """Return what is known, from a run's record or the network's library, of its pictures."""
    from onebyone.explaining.preparation import find_preparation
    from onebyone.exporting import Preprocessing

    try:
        known = find_preparation(loaded.model, loaded.source, folder=folder, input_shape=size)
    except OptionError:
        return None
    found = known.preparation
    return Preprocessing(
        input_shape=(found.channels, found.height, found.width) if size is None else size,
        mean=found.mean,
        std=found.std,
        crop=found.crop,
        classes=known.classes,
    )


def _own_data(record: RunRecord) -> Data | None:
    """Return a few examples of what a run was made with, or ``None`` if they are not at hand."""
    from onebyone.data import load_data

    command = record.command
    if "--data" not in command[:-1]:
        return None
    try:
        return load_data(command[command.index("--data") + 1], limit=EXAMPLES)
    except OneByOneError:
        return None
