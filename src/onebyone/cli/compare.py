"""Score networks on the same examples, and time them in interleaved rounds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from onebyone.cli.arguments import (
    FILE_HELP,
    add_data,
    add_measuring,
    add_metric,
    add_original,
    add_output,
    add_seed,
)
from onebyone.cli.loading import (
    data_of,
    device_of,
    load,
    load_example,
    load_metric,
    load_task,
    runtimes_of,
)
from onebyone.cli.output import progress, say, show
from onebyone.core.errors import OptionError

if TYPE_CHECKING:
    from onebyone.core.records import InputSpec
    from onebyone.data import Data
    from onebyone.networks.zoo import Loaded

RECORD = "compare.json"
PAGE = "report.html"

EPILOG = """examples:
  onebyone compare runs/classic runs/small --data digits
  onebyone compare runs/a runs/b runs/c --data cifar10 --runtime eager --runtime onnxruntime
  onebyone compare torchvision:resnet18 torchvision:resnet34 --weights random --threads 1
  onebyone compare runs/small exports/int8/model.onnx --data digits
  onebyone compare net.onnx runs/smaller --original net.onnx --data data.py:load
  onebyone compare net.py:old net.py:new --data data.py:noisy --metric scores.py:psnr --out c

Files (.onnx, .xml, .pte) are scored and timed in the runtime that they are for, as they are. To
time the layers of an ONNX file in other runtimes, give a run that was made from it.
Every network is scored on the same examples and compared with the first one, A. Hits and misses use
the exact McNemar test, other metrics a sign-flip test, exact for up to 15 examples. In each round
of timing, every network runs in turn in every runtime. With --out the folder gets report.html and
compare.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone compare``."""
    parser.add_argument("a", metavar="A", help=FILE_HELP)
    parser.add_argument("others", metavar="B", nargs="+", help="others, to compare with A")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        action="append",
        default=[],
        help="as for shrink: once for all networks, or once for each in their order (- for none)",
    )
    parser.add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of all factories, such as num_classes=10; may be repeated",
    )
    add_original(parser)
    add_data(parser, required=False)
    add_metric(parser)
    add_measuring(parser)
    parser.add_argument(
        "--example",
        metavar="FILE.PY:NAME",
        help="of several inputs without data: a function of a file that returns what networks are "
        "timed on, a tuple of positional arguments or a mapping of keyword arguments",
    )
    add_seed(parser, "seed of the data's split (0)")
    add_output(parser, "folder for report.html and compare.json")


def run(args: argparse.Namespace) -> None:
    """Compare networks."""
    from onebyone.core.write_files import check_folder

    runtimes = runtimes_of(args.runtimes or _of_files([args.a, *args.others]))
    metric, task = load_metric(args.metric), load_task(args.task)
    folder = None
    if args.out is not None:
        folder = check_folder(args.out, owner="an earlier comparison's", marks=[RECORD])
    networks = _load_all(
        [args.a, *args.others], args.weights, args.model_option, original=args.original
    )
    from onebyone.evaluation.compare import compare

    data = None if args.data is None else data_of(args)
    known = [network.inputs for network in networks if network.inputs is not None]
    inputs = data.inputs if data is not None else known[0] if known else None
    if inputs is None and args.example is None:
        raise OptionError(
            "The input shape of these networks is not known: give --data, or --example "
            "FILE.PY:FUNCTION."
        )
    with progress("compare") as update:
        record = compare(
            *(network.model for network in networks),
            data=data,
            **_timed_on(args, networks[0], inputs, data),
            runtimes=runtimes,
            metric=metric,
            task=task,
            ignore_index=args.ignore_index,
            names=_names(networks),
            sources=[network.source for network in networks],
            num_threads=args.num_threads,
            device=device_of(args.device),
            command=args.command_line,
            progress=update,
        )
    if folder is not None:
        from onebyone.core.write_files import write_text, written_together
        from onebyone.report.comparison_page import render_compared

        with written_together(folder) as aside:
            write_text(aside / PAGE, render_compared(record))
            record.save(aside / RECORD)
    show(record, args, *record.tables())
    if folder is not None:
        say(args, f"Report: {folder / PAGE}")


def _timed_on(
    args: argparse.Namespace, first: Loaded, inputs: InputSpec | None, data: Data | None
) -> dict[str, Any]:
    """Return what the networks are timed on, as the argument ``input_shape`` or ``example``."""
    if args.example is not None:
        return {"example": load_example(args.example, args.batch)}
    assert inputs is not None
    if inputs.is_single:
        return {"input_shape": inputs.with_batch(args.batch).single("compare").shape}
    from onebyone.networks.examples import example_of

    if data is not None and len(data.test) >= args.batch:  # real values fit one another
        return {"example": next(iter(data.test.batches(args.batch)))[0]}
    return {"example": example_of(first.model, inputs.with_batch(args.batch), device="cpu")}


def _of_files(specs: list[str]) -> list[str] | None:
    """Return the runtime in which files are timed by default: OpenVINO runs ONNX files, too.

    Raises:
        OptionError: If no runtime runs all of them.
    """
    from pathlib import Path

    from onebyone.core.errors import OptionError
    from onebyone.runtimes.files import SUFFIXES

    found = {
        SUFFIXES[suffix] for suffix in (Path(spec).suffix for spec in specs) if suffix in SUFFIXES
    }
    if "executorch" in found and len(found) > 1:
        raise OptionError(
            "Files that are compared must run in one runtime, but only ExecuTorch runs .pte files, "
            "and it runs no other ones. Compare each with the network that it was made from."
        )
    return [max(found)] if found else None


def _load_all(
    specs: list[str], weights: list[str], options: list[str], *, original: str | None
) -> list[Loaded]:
    """Load the networks, each with its weights.

    Raises:
        OptionError: If the number of weights is neither one nor that of the networks.
    """
    if len(weights) not in (0, 1, len(specs)):
        raise OptionError(
            f"--weights must be given once for all networks, or {len(specs)} times, once for each "
            f"(- for none), got {len(weights)}."
        )
    from onebyone.pipeline.loading import needs_original
    from onebyone.pipeline.run_folder import is_run

    each = weights if len(weights) == len(specs) else (weights or ["-"]) * len(specs)
    networks = []
    for spec, file in zip(specs, each, strict=True):
        # A single file is for the networks that need weights; a run has its own.
        own = file == "-" or (len(weights) == 1 and is_run(spec))
        run = is_run(spec)
        networks.append(
            load(
                spec,
                None if own else file,
                [] if run and original is None else options,
                needs_weights=True,
                original=original if run and needs_original(spec) else None,
                as_file=True,
            )
        )
    return networks


def _names(networks: list[Loaded]) -> list[str]:
    """Return the networks' names; equal ones become longer by their folders or libraries."""
    names = [network.source.name for network in networks]
    specs = [network.source.spec or network.source.name for network in networks]
    return [
        spec if names.count(name) > 1 else name for name, spec in zip(names, specs, strict=True)
    ]
