"""What ``detector.py`` and ``segmenter.py`` keep and print of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from onebyone.core.records import Difference, Measured, Ratio, RunRecord
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from result_cells import interval, speed


def add_options(parser: argparse.ArgumentParser, *, scenes: int, epochs: int) -> None:
    """Add what both benchmarks take."""
    parser.add_argument("--budget", default="latency=50%", help="of the original's (latency=50%%)")
    parser.add_argument("--runtime", default="onnxruntime", help="that is planned for")
    parser.add_argument("--threads", type=int, default=1, help="while timing (1)")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"of distilling ({epochs})")
    parser.add_argument(
        "--scenes", type=int, default=scenes, help=f"to fit and distil on, unlabelled ({scenes})"
    )
    parser.add_argument("--test", type=int, default=1000, help="scenes to test on (1000)")
    parser.add_argument("--calibration", type=int, default=256, help="scenes to fit on (256)")
    parser.add_argument("--effort", default="quick", help="of the plan: quick, normal, thorough")
    parser.add_argument("--rate", type=float, help="of distilling; default: found by trials")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--keep", type=Path, help="JSON file for the figures")


def shrink_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what both benchmarks give ``obo.shrink``."""
    if not args.budget.startswith("latency"):
        raise SystemExit("--budget must be a latency, such as latency=50%: the table shows times.")
    return {
        "budget": args.budget,
        "runtimes": [args.runtime],
        "num_threads": args.threads,
        "epochs": args.epochs,
        "seed": args.seed,
        "effort": args.effort,
        "calibration_examples": args.calibration,
        "learning_rate": args.rate,
    }


def figures(
    record: RunRecord, name: str, about: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of a finished run.

    Args:
        record: Of the run.
        name: Of the network, for the table.
        about: What this benchmark alone has to say.
        args: The options of both.
    """
    before, one_shot, after = record.before, record.one_shot, record.after
    compared, plan = record.comparison, record.plan
    assert before is not None
    assert one_shot is not None
    assert after is not None
    assert compared is not None
    assert plan is not None
    assert plan.latency is not None
    ((runtime, ratio),) = compared.latency_ratio.items()
    assert before.metric is not None
    return {
        "network": name,
        **about,
        **{each: getattr(args, each) for each in ("scenes", "calibration", "epochs", "seed")},
        "runtime": runtime,
        "threads": before.latency[runtime].threads,
        "batch": before.latency[runtime].batch,
        "machine": str(record.machine),
        "onebyone": record.onebyone,
        "created": record.created,
        "budget": plan.budgets[0].asked,
        "interval": before.metric.interval,
        "rows": [
            _row("original", before, before.latency[runtime].median_ms),
            _row(
                "rewritten, before fine-tuning", one_shot, plan.latency.after.median_ms,
                record.one_shot_difference, plan.latency.ratio,
            ),
            _row(
                "distilled without labels", after, after.latency[runtime].median_ms,
                compared.difference, ratio,
            ),
        ],
    }  # fmt: skip


def _row(
    what: str,
    measured: Measured,
    ms: float,
    difference: Difference | None = None,
    ratio: Ratio | None = None,
) -> dict[str, Any]:
    metric = measured.metric
    assert metric is not None
    return {
        "what": what,
        "metric": metric.name,
        "n": metric.n,
        "value": interval(metric),
        "difference": difference and interval(difference),
        "test": difference and difference.test,
        "faster": ratio and interval(ratio),
        "rounds": ratio and ratio.rounds,
        "ms": ms,
        "macs": measured.macs,
        "params": measured.params,
    }


def table(found: dict[str, Any]) -> Table:
    """Return the figures as a table, a line a network."""
    rows = found["rows"]
    lines = []
    for row in rows:
        value, low, high = (100 * each for each in row["value"])
        change = ""
        if row["difference"] is not None:
            apart, least, most = (f"{100 * each:+.2f}" for each in row["difference"])
            change = f"{apart} points [{least} … {most}]".replace("-", "−")
        lines.append([
            row["what"], f"{value:.2f} % [{low:.2f}–{high:.2f}]", change, speed(row),
            format_count(row["macs"]), format_count(row["params"]),
        ])  # fmt: skip
    metric = rows[0]["metric"]
    return Table(
        columns=(
            found["network"], f">{metric} [95 %]", ">difference [95 %, paired]",
            f">{found['runtime']}, {found['threads']} thread(s)", ">MACs", ">params",
        ),
        rows=lines,
        notes=[
            f"{rows[0]['n']:,} scenes to test on; seed {found['seed']}; {found['budget']}.",
            f"Backgrounds: {found['backgrounds']}.",
            f"Intervals: {found['interval']}; differences paired on the same scenes.",
            (
                f"Fitted on {found['calibration']} unlabelled scenes, distilled on "
                f"{found['scenes']:,} for {found['epochs']} epochs."
            ),
            f"Times: batch {found['batch']}, {rows[-1]['rounds']} rounds. {found['machine']}.",
        ],
    )  # fmt: skip


def kept(found: dict[str, Any], file: Path | None) -> None:
    """Print the figures as Markdown, and keep them."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found).to_markdown())
