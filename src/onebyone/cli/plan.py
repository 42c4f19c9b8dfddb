"""Choose a rewrite for each site of a network so that a budget is met with the least harm."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from onebyone.cli.arguments import (
    add_data,
    add_device,
    add_model,
    add_output,
    device_of,
    load,
    positive,
    progress,
    shape,
    show,
    write_record,
)  # fmt: skip
from onebyone.errors import OptionError

if TYPE_CHECKING:
    from onebyone.records import Plan

EPILOG = """examples:
  onebyone plan runs/classic --data digits --budget macs=50%
  onebyone plan timm:resnet18 --weights w.safetensors --data imagefolder:photos/ \\
      --budget macs=40% --budget params=6M --out plans/r18
  onebyone plan runs/classic --data digits --budget macs=50% --front
  onebyone plan runs/r20 --data cifar10 --budget latency=60% --runtime onnxruntime --threads 1
  onebyone plan timm:convnext_atto --weights random --ranks 50% --out plans/convnext

The plan is a small JSON file. It can be edited by hand and carried out by
`onebyone shrink --plan FILE`.
"""


def add_planning(parser: argparse.ArgumentParser) -> None:
    """Add what a plan is made by."""
    parser.add_argument(
        "--budget",
        action="append",
        metavar="QUANTITY=AMOUNT",
        help="latency=50%%, latency=5ms, macs=50%%, params=20k, memory=8MB; may be repeated, all "
        "are met (macs=50%%)",
    )
    parser.add_argument(
        "--fastest",
        action="store_true",
        help="the fastest network whose harm is hardly above the least within the budgets",
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
        metavar="N",
        help="training inputs, without labels, that weights are fitted on (1024, or more for a "
        "cheap network with a wide linear layer)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone plan``."""
    add_model(parser)
    add_data(parser, required=False)
    add_planning(parser)
    _add_deployment(parser)
    _add_uniform(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument(
        "--front",
        action="store_true",
        help="show what other budgets would come to as well; for a runtime their networks are "
        "built and measured, as many as a minute allows",
    )
    add_device(parser)
    add_output(parser, "folder for plan.json")


def _add_deployment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help="where the network is to run, such as onnxruntime: rewrites that are not shown to be "
        "faster there are not taken (eager where latency is bounded, else none)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads while timing")
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="batch size while timing (1)"
    )


def _add_uniform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=share,
        metavar="SHARE",
        help="no budget and no data: every layer to this share of its ranks, such as 50%%",
    )
    parser.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="with --ranks: reduce, expand, tucker2, spatial, spatial-expand, pair, or the first "
        "that pays (auto)",
    )
    parser.add_argument(
        "--input-shape",
        type=shape,
        metavar="N,C,H,W",
        help="with --ranks: shape of the input, batch first, if the network's is not known",
    )


def share(text: str) -> float:
    """Read a share such as ``50%`` or ``0.5``."""
    from onebyone.units import parse_percent

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
    if args.ranks is not None:
        record = _uniform(args)
    elif args.data is None:
        raise OptionError("Give --data to plan for a budget, or --ranks for a plan without data.")
    else:
        record = _planned(args)
    tables = [record.table(), *([record.front_table()] if args.front else [])]
    show(record, args, *tables)
    write_record(record, args.out, "plan.json", args)


def _uniform(args: argparse.Namespace) -> Plan:
    asked = {
        "--data": args.data,
        "--budget": args.budget,
        "--front": args.front,
        "--runtime": args.runtime,
        "--fastest": args.fastest,
    }
    for name, given in asked.items():
        if given:
            raise OptionError(f"{name} does not go with --ranks, which asks for no data.")
    loaded = load(args.model, args.weights, args.model_option, needs_weights=False)
    from onebyone.planning import uniform_plan

    size = args.input_shape or (loaded.input_shape and (1, *loaded.input_shape))
    if size is None:
        raise OptionError(f"The input shape of {args.model} is not known: give --input-shape.")
    return uniform_plan(
        loaded.model,
        size,
        ranks=args.ranks,
        form=args.form,
        leave=args.leave,
        name=loaded.source.name,
    )


def _planned(args: argparse.Namespace) -> Plan:
    from onebyone.calibration import drawn_for
    from onebyone.data import load_data
    from onebyone.planning import check_budgets, plan

    budget = args.budget or ["macs=50%"]
    check_budgets(budget)  # a typing error should not wait for the network and the data
    loaded = load(args.model, args.weights, args.model_option, needs_weights=True)
    device = device_of(args.device)
    data = load_data(args.data, seed=args.seed, limit=args.limit)
    calibration = drawn_for(
        loaded.model,
        data.train,
        examples=args.calibration,
        name=data.name,
        seed=args.seed,
        device=device,
    )
    with progress("plan") as update:
        return plan(
            loaded.model,
            calibration,
            budget=budget,
            head=args.head,
            leave=args.leave,
            runtime=args.runtime,
            batch=args.batch,
            num_threads=args.threads,
            fastest=args.fastest,
            measure_front=args.front,
            name=loaded.source.name,
            device=device,
            progress=update,
        )
