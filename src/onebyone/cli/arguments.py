"""Arguments that several commands share."""

from __future__ import annotations

import argparse

from onebyone.cli.options import add_settings, group
from onebyone.cli.values import shape, whole
from onebyone.core.data_names import DATA_NAMES
from onebyone.core.settings.common import ScoreSettings, TaskSettings
from onebyone.core.settings.runs import RunSettings

SOURCES = "network and data"
_MODELS = "onebyone:NAME, torchvision:NAME, timm:NAME, path/net.py:factory, the folder of a run"
MODEL_HELP = f"{_MODELS}, or net.onnx, whose layers are read"
# Of commands that score or time what is deployed.
FILE_HELP = (
    f"{_MODELS}, or a file for a runtime (net.onnx, net.xml, net.pte), which runs there as it is"
)
DATA_HELP = (
    f"{', '.join(DATA_NAMES)}, imagefolder:DIR, shards:PATTERN (WebDataset's tar files), hf:DIR "
    "(saved by Hugging Face's datasets), or file.py:factory, a function that returns (train, "
    "validation, test) or (train, test), each (inputs, labels), a torch Dataset or a DataLoader; "
    "inputs may be a mapping of keyword arguments"
)


def add_model(
    parser: argparse.ArgumentParser, *, name: str = "model", help_text: str = MODEL_HELP
) -> None:
    """Add the network and its weights."""
    parser.add_argument(name, metavar=name.upper(), help=help_text)
    place = group(parser, SOURCES)
    place.add_argument(
        "--weights",
        metavar="FILE",
        help="a .safetensors or state-dict file, 'pretrained' (downloads), or 'random'",
    )
    place.add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the network's factory, such as num_classes=10; may be repeated. For "
        "net.onnx that leaves sizes free: input_shape=1x3x48x320",
    )
    add_original(parser)


def add_original(parser: argparse.ArgumentParser) -> None:
    """Add the original network of a run."""
    group(parser, SOURCES).add_argument(
        "--original",
        metavar="SPEC",
        help="for a run that was made from a Python or an ONNX file: that file, such as "
        "net.py:make or net.onnx; a record alone never runs code and opens no other file",
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the data."""
    place = group(parser, SOURCES)
    place.add_argument("--data", metavar="DATA", required=required, help=DATA_HELP)
    place.add_argument(
        "--limit",
        type=whole("limit"),
        metavar="N",
        help="at most N examples of each part of the data",
    )
    place.add_argument(
        "--image-size",
        type=whole("image_size"),
        metavar="PIXELS",
        help="height and width to resize pictures to (default: 224 for imagefolder, else as they "
        "are); not for file.py",
    )
    place.add_argument(
        "--workers",
        type=whole("workers"),
        metavar="N",
        help="for pictures in files: N threads decode them as they are used (default: if all fit "
        "into memory, they are decoded once; else a thread for each free processor)",
    )


def add_input(parser: argparse.ArgumentParser, *, place: str | None = None) -> None:
    """Add what a network is called with: the shape of a tensor, or an example.

    Args:
        parser: Gets the arguments.
        place: Name of the group that they stand in; by default none.
    """
    at = parser if place is None else group(parser, place)
    at.add_argument(
        "--input-shape",
        type=shape,
        metavar="N,C,H,W",
        help="shape of the input, batch first, if the network's is not known",
    )
    at.add_argument(
        "--example",
        metavar="FILE.PY:NAME",
        help="for several inputs: a function of a file that returns a tensor, a tuple of "
        "positional arguments or a mapping of keyword arguments",
    )


def add_measuring(parser: argparse.ArgumentParser, *, default: str = "eager") -> None:
    """Add the options of timing."""
    names = ("runtimes", "num_threads", "batch", "device")
    add_settings(parser, RunSettings, *names, defaults={"runtimes": default})


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the metric, the task, and the ignored label."""
    add_settings(parser, ScoreSettings)


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add the task."""
    add_settings(parser, TaskSettings)


def add_output(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the output folder and ``--json``."""
    group(parser, "run").add_argument("--out", metavar="DIR", help=help_text)
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    group(parser, "run").add_argument(
        "--json", action="store_true", help="print the record as JSON, and nothing else"
    )


def add_seed(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the random seed."""
    group(parser, "run").add_argument(
        "--seed", type=whole("seed"), default=0, metavar="N", help=help_text
    )


def add_run(parser: argparse.ArgumentParser, settings: type[RunSettings]) -> None:
    """Add a network, data, the settings of a run with them, and its folder."""
    add_model(parser)
    add_data(parser)
    add_settings(parser, settings)
    add_output(parser, "folder for the run (runs/NAME, with a number if that is taken)")
