"""Write a network for other runtimes, and check each file there.

A file is kept only if it gives the network's outputs in its runtime. The batch size is free, and so
are height and width if the network accepts other sizes. Each file comes with a loader that needs
only the file's runtime, and preprocessing.json says how pictures become inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebyone.cli.arguments import add_input, add_json, add_model
from onebyone.cli.loading import input_of, input_size, load, load_asked
from onebyone.cli.output import check_output, progress, say, show
from onebyone.core.data_names import DATA_NAMES
from onebyone.core.errors import OneByOneError, OptionError

if TYPE_CHECKING:
    from torch.nn import Module

    from onebyone.core.records import InputSpec, RunRecord
    from onebyone.data import Data
    from onebyone.networks.zoo import Loaded
    from onebyone.pipeline.exporting import Preprocessing
    from onebyone.quantizing import Quantized

EPILOG = """examples:
  onebyone export runs/small --format onnx --format pt2 --out exports/small
  onebyone export torchvision:resnet18 --weights r18.safetensors --format openvino --out r18
  onebyone export runs/small --precision int8 --data digits --format openvino --out exports/int8
  onebyone export net.py:make --input-shape 1,3,64,64 --format safetensors --out exports/net
  onebyone export net.py:make --example net.py:two_pictures --out exports/net
"""
# The number of examples of a check.
EXAMPLES = 64
CALIBRATION_EXAMPLES = 256


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
        "--precision",
        choices=("float32", "int8"),
        help="precision of the file (a run's own, else float32). int8 is for onnx, openvino "
        "and executorch, and is calibrated on training data without labels; a run in int8 has "
        "its integers already",
    )
    parser.add_argument(
        "--data", metavar="DATA", help="real inputs to check on (a run's own data, else random)"
    )
    add_input(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the files")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Export a network."""
    check_output(args.out)
    loaded = load_asked(args, needs_weights=True)
    from onebyone.core.records import RunRecord
    from onebyone.data import load_data
    from onebyone.pipeline.exporting import export
    from onebyone.pipeline.run_folder import RECORD, is_run
    from onebyone.quantizing import Quantized

    record = RunRecord.load(Path(args.model) / RECORD) if is_run(args.model) else None
    network = loaded.model if record is None else _of_run(args, loaded, record)
    precision = args.precision or "float32"
    examples = CALIBRATION_EXAMPLES if precision == "int8" else EXAMPLES
    data = None
    if args.data is not None:
        data = load_data(args.data, limit=examples, image_size=_image_size(record, args.data))
    elif record is not None:
        data = _own_data(record, examples)
    given, preprocessing = _given(args, loaded, data)
    with progress("export"):
        made = export(
            network,
            args.out,
            formats=args.format or ["onnx"],
            data=data,
            **given,
            preprocessing=preprocessing,
            plan=None if record is None else record.plan,
            name=loaded.source.name,
            precision="float32" if isinstance(network, Quantized) else precision,
        )
    show(made, args, made.table())
    say(args, f"Wrote {args.out}")


def _given(
    args: argparse.Namespace, loaded: Loaded, data: Data | None
) -> tuple[dict[str, Any], Preprocessing | None]:
    """Return what is exported for beside data, as a keyword, and how pictures become inputs."""
    from onebyone.core.records import InputSpec

    inputs = loaded.inputs
    if args.example is not None or (inputs is not None and not inputs.is_single):
        if args.example is not None and args.data is not None:
            raise OptionError("Give either --data or --example, got both.")
        return ({} if data is not None and args.example is None else input_of(args, loaded)), None
    if args.input_shape is not None or (inputs is None and data is None):
        inputs = InputSpec.of_shape(input_size(args, loaded))
    known = None if data is not None else _preprocessing(loaded, args.model, inputs)
    shape = None if inputs is None else inputs.with_batch(1).single("export").shape
    return {"input_shape": shape}, known


def _of_run(args: argparse.Namespace, loaded: Loaded, record: RunRecord) -> Module | Quantized:
    """Return a run's network in the precision that is asked for; by default in its own."""
    from onebyone.pipeline.loading import load_deployed
    from onebyone.pipeline.run_folder import WEIGHTS

    if record.deployed is None or args.weights is not None:
        return loaded.model
    weights = str(Path(args.model) / WEIGHTS)
    floating = load(
        args.model, weights, args.model_option, needs_weights=True, original=args.original
    )
    if args.precision == "float32":
        return floating.model
    return load_deployed(args.model, floating.model)


def _preprocessing(loaded: Loaded, folder: str, inputs: InputSpec | None) -> Preprocessing | None:
    """Return the preprocessing of pictures, from a run's record or the network's library."""
    from onebyone.core.records import InputSpec
    from onebyone.explaining.preparation import find_preparation
    from onebyone.pipeline.exporting import Preprocessing

    try:
        known = find_preparation(loaded.model, loaded.source, folder=folder, inputs=inputs)
    except OptionError:
        return None
    found = known.preparation
    if inputs is None:
        inputs = InputSpec.of_shape((1, found.channels, found.height, found.width))
    return Preprocessing(
        inputs=inputs.with_batch(1),
        mean=found.mean,
        std=found.std,
        crop=found.crop,
        classes=known.classes,
    )


def _own_data(record: RunRecord, examples: int) -> Data | None:
    """Return a few examples of a run's data, or ``None`` if they are not available.

    Only built-in data sets are loaded: a record does not decide which file is opened or executed.
    """
    from onebyone.data import load_data

    command = record.command
    if "--data" not in command[:-1] or command[command.index("--data") + 1] not in DATA_NAMES:
        return None
    try:
        name = command[command.index("--data") + 1]
        return load_data(name, limit=examples, image_size=_image_size(record, name))
    except OneByOneError:
        return None


def _image_size(record: RunRecord | None, data: str) -> int | None:
    """Return the size of a run's pictures, for data whose pictures can be resized."""
    if record is None or record.data is None or not record.data.inputs.is_image:
        return None
    *_, height, width = record.data.inputs.tensors[0].shape
    own_size = data.rpartition(":")[0].endswith(".py")
    return int(height) if height == width and not own_size else None
