"""Choose a rewrite for each site of a network so that a budget is met with the least harm."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import (
    add_data,
    add_device,
    add_model,
    add_output,
    device_of,
    load,
    positive,
    progress,
    show,
    write_record,
)  # fmt: skip

EPILOG = """examples:
  onebyone plan runs/classic --data digits --budget macs=50%
  onebyone plan timm:resnet18 --weights w.safetensors --data imagefolder:photos/ \\
      --budget macs=40% --budget params=6M --out plans/r18
  onebyone plan runs/classic --data digits --budget macs=50% --front

The plan is a small JSON file. It can be edited by hand and carried out by
`onebyone shrink --plan FILE`.
"""


def add_planning(parser: argparse.ArgumentParser) -> None:
    """Add what a plan is made by."""
    parser.add_argument(
        "--budget",
        action="append",
        metavar="QUANTITY=AMOUNT",
        help="macs=50%%, params=20k; may be repeated, all are met (macs=50%%)",
    )
    parser.add_argument(
        "--head",
        choices=("auto", "keep", "exact", "gap"),
        default="auto",
        help="what becomes of Flatten + Linear: 'exact' convolutions of the same function, 'gap' "
        "1×1 convolutions and a global average, or as the plan finds best (auto)",
    )
    parser.add_argument(
        "--leave", action="append", default=[], metavar="NAME", help="a module to leave alone"
    )
    parser.add_argument(
        "--calibration",
        type=positive,
        default=1024,
        metavar="N",
        help="training inputs, without labels, that weights are fitted on (1024)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone plan``."""
    add_model(parser)
    add_data(parser)
    add_planning(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument(
        "--front", action="store_true", help="show what other budgets would come to as well"
    )
    add_device(parser)
    add_output(parser, "folder for plan.json")


def run(args: argparse.Namespace) -> None:
    """Make a plan."""
    loaded = load(args.model, args.weights, args.model_option, needs_weights=True)
    from onebyone.calibration import CalibrationData
    from onebyone.data import load_data
    from onebyone.planning import plan

    device = device_of(args.device)
    data = load_data(args.data, seed=args.seed, limit=args.limit)
    calibration = CalibrationData(
        data.train.take(args.calibration, args.seed), data.name, args.seed, device=device
    )
    with progress("plan") as update:
        record = plan(
            loaded.model,
            calibration,
            budget=args.budget or ["macs=50%"],
            head=args.head,
            leave=args.leave,
            name=loaded.source.name,
            device=device,
            progress=update,
        )
    tables = [record.table(), *([record.front_table()] if args.front else [])]
    show(record, args, *tables)
    write_record(record, args.out, "plan.json", args)
