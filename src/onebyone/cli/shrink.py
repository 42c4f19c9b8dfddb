"""Make a network smaller within a budget, keep its accuracy, and prove the result here.

The steps are profile, calibrate, plan, apply, distil and compare. The run's folder then has
report.html, run.json, plan.json and model.safetensors. Every command accepts it as a network.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from onebyone.cli.arguments import add_run
from onebyone.cli.loading import data_of, load_asked, run_settings
from onebyone.cli.output import free_folder, progress, say, show, stoppable
from onebyone.core.settings.runs import ShrinkSettings

if TYPE_CHECKING:
    from onebyone.core.records import RunRecord
    from onebyone.core.tables import Table

EPILOG = """examples:
  onebyone shrink runs/classic --data digits --budget params=2% --head gap
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget macs=50% --out runs/r18
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget latency=50% \\
      --runtime onnxruntime --threads 1
  onebyone shrink runs/r20 --data cifar10 --max-drop 0.5 --runtime openvino
  onebyone shrink net.py:make --data data.py:load --budget macs=40% --epochs 0
  onebyone shrink net.onnx --data data.py:load --budget latency=60% --runtime onnxruntime
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone shrink``."""
    add_run(parser, ShrinkSettings)


def run(args: argparse.Namespace) -> None:
    """Shrink a network."""
    from onebyone.pipeline.shrink import shrink_loaded

    settings = run_settings(args, ShrinkSettings)
    loaded = load_asked(args, needs_weights=True)
    data = data_of(args)
    out = args.out or free_folder(loaded.source.name)
    with stoppable(out), progress("shrink") as update:
        settings = replace(settings, out=out, progress=update)
        shrunk = shrink_loaded(loaded.model, loaded.source, data, settings)
    record = shrunk.record
    assert record.plan is not None
    assert record.comparison is not None
    deployed = () if record.deployed is None else (record.deployed.table(),)
    tables = (record.plan.table(), *_one_shot(record), *deployed, record.comparison.table())
    show(record, args, *tables)
    say(args, f"Report: {out}/report.html")


def _one_shot(record: RunRecord) -> tuple[Table, ...]:
    from onebyone.core.tables import Table
    from onebyone.core.units import plural

    if record.one_shot is None or record.training is None:
        return ()
    metric, agreement = record.one_shot.metric, record.one_shot_agreement
    rows = []
    if metric is not None:
        rows.append([f"test {metric.name}", str(metric)])
    if agreement is not None:
        rows.append(["agreement", str(agreement)])
    rows.append(["divergence", f"{record.one_shot_divergence:.4g}"])
    done = plural(len(record.training.epochs), "epoch")
    note = f"Then fine-tuned for {done}; {record.training.kept} were kept."
    title = "Before fine-tuning (one-shot)"
    return (Table(columns=("", "value"), rows=rows, title=title, notes=[note]),)
