"""Make a network smaller within a budget, keep what it knows, and prove the result here.

Profile, calibrate, plan, apply, distil, compare: the run's folder then has report.html, run.json,
plan.json and model.safetensors, and is itself a network that every command takes.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from onebyone.cli.arguments import (
    add_data,
    add_measuring,
    add_metric,
    add_model,
    add_run_folder,
    free_folder,
    load,
    not_negative,
    progress,
    run_settings,
    runtimes_of,
    say,
    show,
    stoppable,
)
from onebyone.cli.plan import add_planning

if TYPE_CHECKING:
    from onebyone.records import RunRecord
    from onebyone.tables import Table

EPILOG = """examples:
  onebyone shrink runs/classic --data digits --budget params=2% --head gap
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget macs=50% --out runs/r18
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget latency=50% --runtime onnxruntime --threads 1
  onebyone shrink runs/r20 --data cifar10 --max-drop 0.5 --runtime openvino
  onebyone shrink net.py:make --data data.py:load --budget macs=40% --epochs 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone shrink``."""
    add_model(parser)
    add_data(parser)
    add_planning(parser)
    parser.add_argument(
        "--only-faster",
        action="store_true",
        help="take no rewrite that is not shown to be faster in the first --runtime; so it is "
        "always where latency is bounded",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="instead of a budget: the fastest network, in the first --runtime, that loses no more "
        "than this on the validation data before fine-tuning; in the metric's unit if it is not a "
        "share",
    )
    parser.add_argument(
        "--front",
        action="store_true",
        help="where times are planned for, build and measure the networks of other budgets as "
        "well, as many as a minute allows, for the report",
    )
    parser.add_argument("--plan", metavar="FILE", help="carry out this plan instead of making one")
    parser.add_argument(
        "--reconstruct",
        type=not_negative,
        default=0,
        metavar="STEPS",
        help="bring all weights nearer to the original's outputs on training inputs, without "
        "labels, before any fine-tuning; a few hundred take a minute or a few (0)",
    )
    parser.add_argument(
        "--epochs",
        type=not_negative,
        default=5,
        metavar="N",
        help="of distilling from the original; 0 stops before fine-tuning (5)",
    )
    parser.add_argument("--rate", type=float, metavar="R", help="learning rate of the distilling")
    parser.add_argument(
        "--label-weight",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the distilling's loss that the labels get, from 0 to 1 (0: no labels; more for an "
        "averaging head, which the original's outputs can hold back)",
    )
    parser.add_argument(
        "--mix",
        type=float,
        metavar="SHARE",
        help="of the distilling's images, those in which a rectangle is another one's (half of "
        "them where images are augmented and labels have no weight, else none)",
    )
    add_metric(parser)
    add_measuring(parser)
    add_run_folder(parser)


def run(args: argparse.Namespace) -> None:
    """Shrink a network."""
    from onebyone.data import load_data
    from onebyone.pipeline import ShrinkSettings, shrink_loaded
    from onebyone.planning import check_budgets
    from onebyone.records import Plan

    # A typing error should not wait for the network and the data.
    runtimes_of(args.runtime)
    if args.budget is not None:
        check_budgets(args.budget)
    loaded = load(args.model, args.weights, args.model_option, needs_weights=True)

    plan = None if args.plan is None else Plan.load(args.plan)
    data = load_data(args.data, seed=args.seed, limit=args.limit)
    out = args.out or free_folder(loaded.source.name)
    with stoppable(out), progress("shrink") as update:
        settings = ShrinkSettings(
            budget=args.budget,
            fastest=args.fastest,
            max_drop=args.max_drop,
            only_faster=args.only_faster,
            measure_front=args.front,
            plan=plan,
            head=args.head,
            leave=args.leave,
            reconstruct=args.reconstruct,
            epochs=args.epochs,
            learning_rate=args.rate,
            label_weight=args.label_weight,
            mix=args.mix,
            calibration_examples=args.calibration,
            **run_settings(args, out, update),
        )
        shrunk = shrink_loaded(loaded.model, loaded.source, data, settings)
    record = shrunk.record
    assert record.plan is not None
    assert record.comparison is not None
    show(record, args, record.plan.table(), *_one_shot(record), record.comparison.table())
    say(args, f"Report: {out}/report.html")


def _one_shot(record: RunRecord) -> tuple[Table, ...]:
    from onebyone.tables import Table

    if record.one_shot is None or record.training is None:
        return ()
    metric, agreement = record.one_shot.metric, record.one_shot_agreement
    rows = []
    if metric is not None:
        rows.append([f"test {metric.name}", str(metric)])
    if agreement is not None:
        rows.append(["agreement", str(agreement)])
    rows.append(["divergence", f"{record.one_shot_divergence:.4g}"])
    return (Table(columns=("", "value"), rows=rows, title="Before fine-tuning (one-shot)"),)
