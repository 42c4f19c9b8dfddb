"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebyone.errors import OptionError, OutputError, WeightsError

if TYPE_CHECKING:
    from onebyone.models import Loaded
    from onebyone.records import Record
    from onebyone.tables import Table

MODEL_HELP = (
    "onebyone:NAME, torchvision:NAME, timm:NAME, path/net.py:factory, or the folder of a run"
)
DATA_HELP = (
    "digits, mnist, fashion-mnist, cifar10, imagefolder:DIR, or file.py:factory, a function that "
    "gives train, validation and test data"
)
# Of these nothing is known but random weights, unless weights are given.
ZOOS = ("onebyone:", "torchvision:", "timm:")


def add_model(parser: argparse.ArgumentParser, *, name: str = "model") -> None:
    """Add the network and its weights."""
    parser.add_argument(name, metavar=name.upper(), help=MODEL_HELP)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a .safetensors or state-dict file, 'pretrained' (downloads), or 'random'",
    )
    parser.add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the network's factory, such as num_classes=10; may be repeated",
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the data."""
    parser.add_argument("--data", metavar="DATA", required=required, help=DATA_HELP)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="at most N examples of each part of the data"
    )


def add_measuring(parser: argparse.ArgumentParser, *, default: str = "eager") -> None:
    """Add how latency is measured."""
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        action="append",
        help="eager, channels-last, packed, compile, onnxruntime, openvino, executorch, "
        "cuda-graph, tensorrt, some with :bf16 after it or, on a GPU, :tf32; may be repeated "
        f"(default: {default})",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads while timing")
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="batch size while timing (1)"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where to run."""
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (where there is one)")


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the metric."""
    parser.add_argument(
        "--metric",
        default="accuracy",
        metavar="METRIC",
        help="accuracy (default), or file.py:function of (outputs, targets) that gives a score "
        "for each example, higher is better",
    )


def add_output(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the output folder and ``--json``."""
    parser.add_argument("--out", metavar="DIR", help=help_text)
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print the record as JSON, and nothing else"
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a run, and what to do if there is one already."""
    add_output(parser, "folder for the run (runs/NAME, with a number if that is taken)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in DIR"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    parser.add_argument(
        "--no-capture",
        dest="capture",
        action="store_false",
        help="train on a GPU kernel by kernel, not by CUDA graphs",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (0)")


def positive(text: str) -> int:
    """Read a whole number from 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """Read a whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``1,3,224,224``."""
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"must be sizes separated by commas, batch first, such as 1,3,224,224; got {text!r}"
        )
    return sizes


def model_options(texts: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; values are ints, floats, ``true``, ``false``, or texts.

    Raises:
        OptionError: If a text is no such pair.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"--model-option must be KEY=VALUE, got {text!r}.")
        options[key] = _value(value)
    return options


def _value(text: str) -> int | float | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load(spec: str, weights: str | None, options: list[str], *, needs_weights: bool) -> Loaded:
    """Load a network.

    Raises:
        WeightsError: If it would have random weights, and ``needs_weights``.
    """
    from onebyone.runs import is_run, load_source

    if needs_weights and weights is None and spec.startswith(ZOOS) and not is_run(spec):
        raise WeightsError(
            f"{spec} needs trained weights: give --weights FILE, --weights pretrained, or, for "
            f"timings alone, --weights random."
        )
    if weights == "random" and is_run(spec):
        raise OptionError("--weights random does not go with a run, which has its weights.")
    return load_source(spec, weights=weights, **model_options(options))


def load_metric(text: str) -> Any:
    """Return a built-in metric's name, or the function that a file has.

    Raises:
        OptionError: If the file or the function is missing, or the file fails.
    """
    path, colon, function = text.rpartition(":")
    if not colon:
        return text
    import runpy

    if not Path(path).is_file():
        raise OptionError(f"--metric must name a file's function, but there is no file {path!r}.")
    # As when the file is run as a script: it may import its neighbors.
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise OptionError(f"The metric's file {path} failed: {error}") from error
    finally:
        sys.path.remove(folder)
    found = names.get(function)
    if not callable(found):
        raise OptionError(f"--metric {text}: {path} has no function {function!r}.")
    return found


def device_of(text: str | None) -> str:
    """Return the device to use, CUDA where there is one by default.

    Raises:
        OptionError: If there is no such device.
    """
    import torch

    from onebyone.sites import as_device

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(as_device(text))


def runtimes_of(names: list[str] | None) -> tuple[str, ...]:
    """Return the runtimes asked for, each checked to be there, once."""
    from onebyone.runtimes import find_runtime

    wanted = tuple(dict.fromkeys(names or ["eager"]))
    for name in wanted:
        find_runtime(name)
    return wanted


def run_settings(
    args: argparse.Namespace, out: str | Path, update: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Return the settings that all runs have, from the arguments that all runs have."""
    return {
        "out": out,
        "runtimes": runtimes_of(args.runtime),
        "metric": load_metric(args.metric),
        "batch": args.batch,
        "num_threads": args.threads,
        "seed": args.seed,
        "device": device_of(args.device),
        "capture": args.capture,
        "resume": args.resume,
        "overwrite": args.overwrite,
        "command": args.command_line,
        "progress": update,
    }


def free_folder(name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, … that is not there yet."""
    base = Path("runs") / "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def show(record: Record, args: argparse.Namespace, *tables: Table) -> None:
    """Print a record as JSON if asked, else as tables."""
    from onebyone.report.console import print_table

    if args.json:
        sys.stdout.write(record.to_json())
        return
    for place, table in enumerate(tables):
        if place:
            sys.stdout.write("\n")
        print_table(table)


def say(args: argparse.Namespace, text: str) -> None:
    """Print a line unless only JSON was asked for."""
    if not args.json:
        sys.stdout.write(text + "\n")


def write_record(record: Record, folder: str | None, name: str, args: argparse.Namespace) -> None:
    """Write a record into ``--out``, if it was given.

    Raises:
        OutputError: If the folder cannot be made, or the file cannot be written.
    """
    if folder is None:
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {path}: {error.strerror}.") from error
    record.save(path / name)
    say(args, f"Wrote {path / name}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on standard error where that is a terminal."""
    from onebyone.report.console import progress as bar

    with bar(title) as update:
        yield update


@contextmanager
def stoppable(out: str | Path) -> Iterator[None]:
    """Say on an interruption where the run is, and how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"Stopped. {out} says where; go on by --out {out} --resume.\n")
        raise
