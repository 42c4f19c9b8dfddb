"""Choose rewrites of a network that meet a budget with the least harm."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from onebyone.cli.arguments import add_data, add_input, add_model, add_output
from onebyone.cli.loading import data_of, device_of, input_of, load_asked, settings_of
from onebyone.cli.options import add_settings, group, offered
from onebyone.cli.output import check_output, progress, show, write_record
from onebyone.core.errors import OptionError
from onebyone.core.settings.planning import PlanSettings
from onebyone.core.settings.runs import ShrinkSettings

if TYPE_CHECKING:
    from onebyone.core.records import Plan

# Options of the command that `onebyone.plan` does not take: they prepare its data.
OF_DATA = ("calibration_examples", "ignore_index", "device", "seed")
EPILOG = """examples:
  onebyone plan runs/classic --data digits --budget macs=50%
  onebyone plan timm:resnet18 --weights w.safetensors --data imagefolder:photos/ \\
      --budget macs=40% --budget params=6M --out plans/r18
  onebyone plan runs/classic --data digits --budget macs=50% --front
  onebyone plan runs/r20 --data cifar10 --budget latency=60% --runtime onnxruntime --threads 1
  onebyone plan timm:convnext_atto --weights random --ranks 50% --out plans/convnext

The plan is a small JSON file. It can be edited by hand and carried out by
`onebyone shrink --plan FILE`.

A plan has no --resume: it is written at its end, and a plan that is stopped
leaves no file. Kept for the next plan are the times of layers and, once they
are all measured, the options. Shrink keeps each stage: --epochs 0 --out DIR
makes and carries out a plan, and is resumed by --resume.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone plan``."""
    add_model(parser)
    add_data(parser, required=False)
    add_settings(parser, PlanSettings, *(set(offered(PlanSettings)) - set(OF_DATA)))
    _add_uniform(parser)
    add_settings(parser, ShrinkSettings, *OF_DATA)
    add_output(parser, "folder for plan.json")


def _add_uniform(parser: argparse.ArgumentParser) -> None:
    place = group(parser, "plan without data")
    place.add_argument(
        "--ranks",
        type=share,
        metavar="SHARE",
        help="without budget and data: reduce every layer to this share of its ranks, such as 50%%",
    )
    place.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="reduce, expand, tucker2, spatial, spatial-expand, pair, or the first "
        "that saves anything (auto)",
    )
    add_input(parser, place="plan without data")


def share(text: str) -> float:
    """Read a share such as ``50%`` or ``0.5``."""
    from onebyone.core.units import parse_percent

    value = parse_percent(text)
    try:
        value = float(text) if value is None else value
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 50% or 0.5, got {text!r}")
    return value


def run(args: argparse.Namespace) -> None:
    """Make a plan."""
    from onebyone.core.processes import is_main, on_main

    on_main(lambda: check_output(args.out))
    if args.ranks is not None:
        record = _uniform(args)
    elif args.data is None:
        raise OptionError("Give --data to plan for a budget, or --ranks for a plan without data.")
    else:
        record = _planned(args)
    tables = [record.table(), *([record.front_table()] if args.measure_front else [])]
    show(record, args, *tables)
    if is_main():
        write_record(record, args.out, "plan.json", args)


def _uniform(args: argparse.Namespace) -> Plan:
    asked = {
        "--data": args.data,
        "--budget": args.budget,
        "--front": args.measure_front,
        "--runtime": args.runtime,
        "--precision": args.precision != "float32",
        "--fastest": args.fastest,
        "--closest": args.closest,
    }
    for name, given in asked.items():
        if given:
            raise OptionError(f"{name} does not go with --ranks, which needs no data.")
    loaded = load_asked(args, needs_weights=False)
    from onebyone.planning import uniform_plan

    given = input_of(args, loaded)
    return uniform_plan(
        loaded.model,
        next(iter(given.values())),
        ranks=args.ranks,
        form=args.form,
        leave=args.leave or (),
        name=loaded.source.name,
    )


def _planned(args: argparse.Namespace) -> Plan:
    from onebyone.calibration.infer_task import Known, meaning_of
    from onebyone.calibration.inputs import drawn_for
    from onebyone.planning import plan

    asked = settings_of(args, PlanSettings)
    PlanSettings(**asked)  # a typing error should not wait for the network and the data
    loaded = load_asked(args, needs_weights=True)
    device = device_of(args.device)
    data = data_of(args)
    calibration = drawn_for(
        loaded.model,
        data.train,
        examples=args.calibration_examples,
        name=data.name,
        seed=args.seed,
        device=device,
    )
    meaning = meaning_of(
        loaded.model,
        data,
        asked.get("task"),
        known=Known.of(loaded.source),
        ignore_index=args.ignore_index,
    )
    with progress("plan") as update:
        here = {"task": meaning, "name": loaded.source.name, "device": device, "progress": update}
        return plan(loaded.model, calibration, **{**asked, **here})
