"""Networks that exist only as ONNX files: read, proven, planned and rewritten.

    python benchmarks/onnx_networks.py files/ --shape text.onnx=1x3x48x320 --keep onnx.json
    python benchmarks/onnx_networks.py files/ --only text.onnx --latency 60 --threads 1

Each ``.onnx`` file of the folder is read as layers, and its outputs are compared with those of ONNX
Runtime: the largest difference, beside the outputs' standard deviation. Then it is rewritten at
full rank, which must give the same outputs (the gap is relative to that deviation), and planned for
a share of its MACs on random inputs, and with ``--latency`` for a share of its measured time in
ONNX Runtime. Plans are carried out before any fine-tuning; their error is the squared one of the
outputs as a share of their variance, on other random inputs. Random inputs are no pictures: it only
says that the rewrites do what they should.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import onebyone as obo
from onebyone.core.errors import OneByOneError
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.pipeline.importing import imported
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes import describe_machine
from onebyone.runtimes.output_check import difference, outputs_of

SEED = 0
EXAMPLES, HELD_OUT = 32, 8


def drawn(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Return random inputs between 0 and 1, as pixels are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape[1:], generator=generator)


def relative_error(network: nn.Module, small: nn.Module, inputs: Tensor) -> float:
    """Return the squared error of all outputs as a share of their variance."""
    with torch.no_grad():
        pairs = zip(outputs_of(network(inputs)), outputs_of(small(inputs)), strict=True)
        shares = [
            float((new - old).square().mean() / old.var().clamp_min(1e-30)) for old, new in pairs
        ]
    return max(shares)


def measure(file: Path, shape: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was found of one file."""
    start = time.perf_counter()
    loaded = imported(file, input_shape=shape)
    seconds = time.perf_counter() - start
    network = loaded.model
    assert loaded.inputs is not None, f"give --shape {file.name}=1x3x48x320"
    size = loaded.inputs.with_batch(1).single("this benchmark").shape
    inputs, others = drawn(size, EXAMPLES, SEED), drawn(size, HELD_OUT, SEED + 1)
    own = obo.load_model(file)(others[:1])
    with torch.no_grad():
        gap = difference(outputs_of(own), outputs_of(network(others[:1])))
    costs = trace_layers(network, others[:1])
    found: dict[str, Any] = {
        "file": file.name,
        "sha256": loaded.source.sha256,
        "shape": list(size),
        "seconds": round(seconds, 1),
        "layers": len(costs.layers),
        "params": costs.params,
        "macs": costs.macs,
        "gap": gap.max_abs,
        "deviation": max(float(each.double().std()) for each in outputs_of(own)),
    }
    whole = obo.uniform_plan(network, size, ranks=1.0)
    found["full_rank"] = relative_error(network, obo.apply(network, whole, None), others) ** 0.5
    if args.no_plan:
        return found
    try:
        planned(found, network, inputs, others, args)
    except OneByOneError as error:
        found["refused"] = str(error)
    return found


def planned(
    found: dict[str, Any], network: nn.Module, inputs: Tensor, others: Tensor, args: Any
) -> None:
    """Add what plans give."""
    plan = obo.plan(network, inputs, budget=f"macs={args.macs}%", task="embedding", closest=True)
    small = obo.apply(network, plan, inputs, task="embedding")
    found["planned_macs"] = trace_layers(small, others[:1]).macs
    found["rewritten"] = len(plan.choices)
    found["error"] = relative_error(network, small, others)
    if args.latency is None:
        return
    plan = obo.plan(
        network,
        inputs,
        budget=f"latency={args.latency}%",
        runtime="onnxruntime",
        num_threads=args.threads,
        task="embedding",
        closest=True,
    )
    assert plan.latency is not None
    small = obo.apply(network, plan, inputs, task="embedding")
    ratio = plan.latency.ratio
    found["latency"] = {
        "before_ms": plan.latency.before.median_ms,
        "after_ms": plan.latency.after.median_ms,
        "faster": [ratio.value, ratio.low, ratio.high],
        "macs": trace_layers(small, others[:1]).macs,
        "rewritten": len(plan.choices),
        "error": relative_error(network, small, others),
    }


def reason(row: dict[str, Any]) -> str:
    """Return the first words of an error, without the file's path."""
    return str(row["refused"]).split(row["file"])[-1].strip().split(":")[0]


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Return a line a file."""
    lines = []
    for row in rows:
        if "macs" not in row:
            lines.append([row["file"], f"refused: {reason(row)}", *[""] * 7])
            continue
        left = row.get("planned_macs")
        none = "refused" if "refused" in row else "–"
        share = none if left is None else f"{100 * left / row['macs']:.0f} %"
        error = "" if left is None else f"{row['error']:.2g}"
        timed = row.get("latency")
        speed = ""
        if timed is not None:
            value, low, high = timed["faster"]
            speed = f"{timed['before_ms']:.2f} → {timed['after_ms']:.2f} ms, "
            speed += f"{value:.2f}× [{low:.2f}–{high:.2f}], error {timed['error']:.2g}"
        gap = f"{row['gap']:.1e} of {row['deviation']:.1e}"
        lines.append([
            row["file"], "×".join(map(str, row["shape"])), format_count(row["params"]),
            format_count(row["macs"]), gap, f"{row['full_rank']:.1e}", share, error, speed,
        ])  # fmt: skip
    return Table(
        columns=(
            "file", "input", "params", "MACs", "gap to ONNX Runtime", "gap at full rank",
            f"MACs at {args.macs} %", "error", f"time at {args.latency or '–'} %",
        ),
        rows=lines,
        title="ONNX files",
    )  # fmt: skip


def main() -> None:
    """Measure the files of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--shape", action="append", default=[], metavar="FILE=1x3x48x320")
    parser.add_argument("--macs", type=int, default=60, help="share of the MACs in percent")
    parser.add_argument("--no-plan", action="store_true", help="read, prove, and full rank alone")
    parser.add_argument("--latency", type=int, help="share of the time in ONNX Runtime in percent")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="JSON file; its rows of other files stay")
    args = parser.parse_args()
    shapes = dict(each.split("=", 1) for each in args.shape)
    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else []
    rows = {row["file"]: row for row in kept}
    torch.set_num_threads(args.threads)
    for file in sorted(args.folder.glob("*.onnx")):
        if args.only and file.name not in args.only:
            continue
        try:
            rows[file.name] = measure(file, shapes.get(file.name), args)
        except OneByOneError as error:
            rows[file.name] = {"file": file.name, "refused": str(error)}
        if args.keep:
            args.keep.write_text(json.dumps([*rows.values()], indent=1) + "\n")
    print(f"{describe_machine('cpu').processor}, {args.threads} thread(s)\n")
    print(table([*rows.values()], args).to_markdown())


if __name__ == "__main__":
    main()
