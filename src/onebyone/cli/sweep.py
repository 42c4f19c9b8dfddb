"""Shrink networks under every combination of budgets, runtimes, seeds, precisions and efforts.

Each combination is a trial: a run of `onebyone shrink`, in a folder of its own. They run one after
the other on this machine, or with --address on each node of a Ray cluster. The folder then has
report.html with the front of all trials, and trials.csv with a line for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onebyone.cli.arguments import MODEL_HELP, SOURCES, add_data, add_output
from onebyone.cli.options import add_settings, group, offered
from onebyone.cli.output import free_folder, progress, say, show, stoppable
from onebyone.cli.sweep_trials import AXES, OWN, asked_words, merged, networks_of, trials_of
from onebyone.core.settings.runs import ShrinkSettings

EPILOG = """examples:
  onebyone sweep runs/r20 --data cifar10 --budget macs=70% --budget macs=50% --seed 0,1,2
  onebyone sweep runs/r20 runs/nin --data cifar10 --budget latency=60% \\
      --runtime eager,onnxruntime --precision float32,int8 --threads 1 --out sweeps/a
  onebyone sweep sweep.toml --out sweeps/b --address auto --node gpu1 --node gpu2
  onebyone sweep sweep.toml --out sweeps/b --address auto --resume

A file has the options by name, without dashes; a list gives an option several
times. A network with weights or data of its own is a table:

  data = "cifar10"
  model = ["runs/r20", "runs/nin"]
  budget = ["macs=70%", "macs=50%,params=60%"]
  runtime = ["eager", "onnxruntime"]
  seed = [0, 1, 2]
  epochs = 0
  [[network]]
  model = "torchvision:resnet18"
  weights = "r18.safetensors"
  data = "imagefolder:photos/"

A trial that fails is a row with its error. One whose process or node ends is run
again. --resume keeps the trials that have finished, and tries the others.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone sweep``."""
    parser.add_argument("model", metavar="MODEL", nargs="+", help=f"{MODEL_HELP}; or one FILE.toml")
    place = group(parser, SOURCES)
    place.add_argument(
        "--weights", metavar="FILE", help="of every network: a file, 'pretrained', or 'random'"
    )
    add_data(parser, required=False)
    place = group(parser, "trials: every combination of these")
    for name, words in AXES.items():
        place.add_argument(
            f"--{name}",
            metavar=words.metavar,
            action="append",
            help=f"{words.help}. May be repeated",
        )
    settings = set(offered(ShrinkSettings)) - set(OWN)
    add_settings(parser, ShrinkSettings, *settings)
    place = group(parser, "run")
    place.add_argument(
        "--address", metavar="ADDRESS", help="a Ray cluster to use, such as auto or 10.0.0.1:6379"
    )
    place.add_argument(
        "--node",
        metavar="NAME",
        action="append",
        help="a node of the cluster that trials may run on, by name or address (default: all). "
        "May be repeated",
    )
    place.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    place.add_argument("--overwrite", action="store_true", help="replace the sweep in --out")
    add_output(parser, "folder for the sweep (runs/sweep, with a number if that is taken)")
    for action in parser._actions:  # noqa: SLF001
        # What was not given must be told from a default: it may be in the file.
        action.default = argparse.SUPPRESS


def run(args: argparse.Namespace) -> None:
    """Carry out a sweep."""
    asked = merged(args)
    networks = networks_of(asked)
    out = Path(asked.get("out") or free_folder("sweep"))
    trials = trials_of(networks, asked, out)
    from onebyone.cli.sweep_runs import identified, shrunk_quietly
    from onebyone.pipeline.sweep import SweepSettings, sweep
    from onebyone.report.sweep_rows import table_of

    with stoppable(out, _how_to_go_on), progress("sweep") as update:
        settings = SweepSettings(
            out=out,
            shrink=shrunk_quietly,
            identify=identified,
            address=asked.get("address"),
            nodes=asked.get("node", ()),
            resume=asked.get("resume", False),
            overwrite=asked.get("overwrite", False),
            command=args.command_line,
            progress=update,
        )
        record, runs = sweep(trials, asked_words(networks, asked), settings)
    args.json = asked.get("json", False)
    show(record, args, table_of(record, runs))
    say(args, f"Table: {out}/trials.csv\nReport: {out}/report.html")


def _how_to_go_on(out: Path) -> str:
    return f"Resume the sweep with --out {out} --resume."
