"""Plans for latency, measured: is the budget met in the runtime, and does the prediction hold?

    python benchmarks/planning.py                                  # P6 and P7: ResNet-18
    python benchmarks/planning.py --networks resnet18 vgg16_gap resnet50 --batches 1 32 \
        --threads 1 2 --runtimes onnxruntime openvino compile eager --held-out 0
    python benchmarks/planning.py --networks zoo --shares 70 --size 128 --runtimes onnxruntime
    python benchmarks/planning.py --networks zoo --shares 40 --size 128 --precision auto \
        --held-out 0

Random weights and kernels' errors for harm: this is about time alone. For each network, runtime,
batch and number of threads a plan is made for a share of the latency, and its network measured in
turns with the original: the share reached, with its 95 % interval, and how far the prediction was
off. Its front is then built and measured, as `onebyone plan --front` does, and predictions are held
out: for times halfway between neighbors on the front, networks are planned as the measured ones
correct it, and only then built and measured, by the deployment's own export; the error that the
same predictions had without the front's correction stands beside. Every accepted rewrite is timed
once more, alone, and those shown to be slower are counted (P7). P6 is the share of the time saved
by the share of the MACs saved. Results are appended to a file of JSON lines; a run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onebyone.core.errors import OneByOneError
from onebyone.core.records import Budget, FrontPoint
from onebyone.core.tables import Table
from onebyone.core.write_files import write_text
from onebyone.networks.layers import GlobalAverageHead
from onebyone.planning import Planner
from onebyone.planning.latency.correction import Worth
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine

ZOO = (
    "resnet18", "mobilenet_v2", "squeezenet1_0", "densenet121", "shufflenet_v2_x1_0", "mnasnet1_0",
    "regnet_y_400mf", "timm:efficientnet_lite0", "timm:convnext_atto", "timm:ghostnet_100",
    "timm:repvgg_a0", "timm:resnet26d",
)  # fmt: skip


def vgg16_gap() -> nn.Module:
    """VGG-16's features with a head of a 1×1 convolution and a global average."""
    import torchvision

    return nn.Sequential(
        torchvision.models.vgg16(weights=None).features, GlobalAverageHead(512, 1000)
    )


OWN: dict[str, Callable[[], nn.Module]] = {"vgg16_gap": vgg16_gap}


def network(name: str) -> nn.Module:
    """Return a network of torchvision, of timm, or of this file, with random weights."""
    torch.manual_seed(0)
    if name in OWN:
        return OWN[name]().eval()
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=False).eval()
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval()


@dataclass(frozen=True)
class Row:
    """What came of one plan; shares are of the original's time and MACs."""

    network: str
    runtime: str
    batch: int
    threads: int
    size: int
    asked: float
    device: str = "cpu"
    precision: str = "float32"
    detail: str = ""
    reached: float | None = None
    low: float | None = None
    high: float | None = None
    disturbed: bool = False
    before_ms: float | None = None
    error: float | None = None
    held_out: tuple[float, ...] = ()
    uncorrected: tuple[float, ...] = ()
    front: int = 0
    front_measured: int = 0
    front_seconds: float = 0.0
    macs: float | None = None
    rewritten: int = 0
    slower: int = 0
    builds: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked for."""
        return (
            self.network, self.runtime, self.batch, self.threads, self.size, self.asked,
            self.device, self.precision,
        )  # fmt: skip

    @property
    def share(self) -> str:
        """The share of the time that was reached, in words."""
        if self.reached is None or self.low is None or self.high is None:
            return self.detail
        interval = f"[{100 * self.low:.1f}–{100 * self.high:.1f}]"
        return f"{100 * self.reached:.1f} % {interval}" + (" disturbed" if self.disturbed else "")

    @property
    def worth(self) -> float | None:
        """Share of the time saved by the share of the MACs saved (P6)."""
        if self.reached is None or self.macs is None or self.macs >= 1:
            return None
        return (1 - self.reached) / (1 - self.macs)


def measured(asked: Row, cache: Path | None, count: int) -> Row:
    """Plan, and measure what came of it, its front and so many predictions between its points."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        planner = Planner(
            network(asked.network),
            None,
            input_shape=(1, 3, asked.size, asked.size),
            runtime=asked.runtime,
            batch=asked.batch,
            num_threads=asked.threads,
            device=asked.device,
            precision=asked.precision,
            head="keep",
            cache=False if cache is None else cache,
        )
        made = planner.plan([f"latency={asked.asked:g}%"])
    except OneByOneError as error:
        seconds = time.perf_counter() - wall
        return Row(**{**asdict(asked), "detail": str(error), "seconds": seconds})
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    latency = made.latency
    assert latency is not None
    plain = planner.worth
    wall = time.perf_counter()
    points = planner.front("latency", measured=True) if count else ()
    front = [point for point in points if point.rewritten]
    front_seconds = time.perf_counter() - wall
    held_out = list(_held_out(planner, front, plain, count))
    return Row(
        **{
            **asdict(asked),
            "front": len(front),
            "front_measured": sum(point.ratio is not None for point in front),
            "front_seconds": front_seconds,
            "reached": 1 / latency.ratio.value,
            "low": 1 / latency.ratio.high,
            "high": 1 / latency.ratio.low,
            "disturbed": latency.before.disturbed or latency.after.disturbed,
            "before_ms": latency.before.median_ms,
            "error": latency.error,
            "held_out": tuple(corrected for corrected, _ in held_out),
            "uncorrected": tuple(without for _, without in held_out),
            "macs": made.after.macs / made.before.macs,
            "rewritten": len(made.choices),
            "slower": sum(
                o.gain is not None and o.gain.verdict == "slower" for o in planner.retime(made)
            ),
            "builds": latency.corrections + 1,
            "seconds": seconds,
            "cpu_seconds": cpu,
        }
    )


def _held_out(
    planner: Planner, front: Sequence[FrontPoint], plain: Worth, count: int
) -> Iterator[tuple[float, float]]:
    """Yield errors of predictions between points of the front, and what they were without it."""
    gaps = list(itertools.pairwise(front))
    spots = np.linspace(0, len(gaps) - 1, min(count, len(gaps))).round().astype(int)
    for spot in sorted({int(s) for s in spots}):
        near, far = (point.after.ms or 0.0 for point in gaps[spot])
        limit = (near * far) ** 0.5
        made = planner.predict([Budget(quantity="latency", limit=limit, asked="halfway")])
        whole, alone = made.before.ms or 0.0, planner.worth.alone(made.before.ms - made.after.ms)
        latency = planner.measure(made).latency
        assert latency is not None
        measured = whole / latency.ratio.value
        yield latency.error, abs(whole - plain.saved(alone) - measured) / measured


# ---------------------------------------------------------------- showing


def table(rows: Sequence[Row]) -> Table:
    """Return a plan a line, and the errors of all predictions."""
    lines = [_line(row) for row in rows]
    errors = [row.error for row in rows if row.error is not None]
    held = [error for row in rows for error in row.held_out]
    plain = [error for row in rows for error in row.uncorrected]
    points, known = (
        sum(getattr(row, each) for row in rows) for each in ("front", "front_measured")
    )
    longest = max((row.front_seconds for row in rows), default=0.0)
    slower, accepted = sum(row.slower for row in rows), sum(row.rewritten for row in rows)
    notes = [
        _spread("Predicted against measured, of the plans", errors),
        _spread("Held out between points of their fronts, which corrected them", held),
        _spread("Of the same networks, by what the plan alone had measured", plain),
        f"Fronts: {points} rewritten networks, {known} measured, in at most {longest:.0f} s each."
        if points
        else "",
        f"Accepted rewrites timed again, alone: {slower} of {accepted} shown to be slower (P7).",
        "; ".join(str(describe_machine(device)) for device in {row.device for row in rows}) + ".",
    ]
    return Table(
        columns=(
            "network", "runtime", ">batch", ">thr.", ">before", ">asked", ">reached", ">pred. off",
            ">MACs", ">saved ÷ MACs saved", ">sites", ">built", ">plan, CPU s",
        ),
        rows=lines,
        title="Plans for latency",
        notes=[note for note in notes if note],
    )  # fmt: skip


def _line(row: Row) -> list[str]:
    where = [row.network, row.runtime, str(row.batch), str(row.threads)]
    if row.reached is None or row.macs is None or row.error is None:
        return [*where, "–", f"{row.asked:g} %", row.detail, *[""] * 5, f"{row.seconds:.0f}"]
    return [
        *where,
        f"{row.before_ms:.2f} ms",
        f"{row.asked:g} %",
        row.share,
        f"{100 * row.error:.1f} %",
        f"{100 * row.macs:.0f} %",
        "–" if row.worth is None else f"{row.worth:.2f}",
        str(row.rewritten),
        str(row.builds),
        f"{row.cpu_seconds:.0f}",
    ]


def _spread(what: str, errors: Sequence[float]) -> str:
    if not errors:
        return ""
    median, high = np.percentile(errors, [50, 95])
    return (
        f"{what}: median error {100 * median:.1f} %, 95th percentile {100 * high:.1f} % "
        f"({len(errors)} networks)."
    )


def load(path: Path) -> dict[tuple[object, ...], Row]:
    """Return the results of a file, the last of each plan."""
    rows: dict[tuple[object, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = Row(**json.loads(line))
        rows[row.key] = row
    return rows


def asked_for(args: argparse.Namespace) -> list[Row]:
    """Return what to plan, in order."""
    names = [n for name in args.networks for n in (ZOO if name == "zoo" else (name,))]
    found = itertools.product(names, args.runtimes, args.batches, args.threads, args.shares)
    return [
        Row(name, runtime, batch, count, args.size, share, args.device, args.precision)
        for name, runtime, batch, count, share in found
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18"], help="or zoo: a sample")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--shares", nargs="+", type=float, default=[50, 25], help="in percent")
    parser.add_argument("--size", type=int, default=224, help="height and width of the input")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--precision", choices=("float32", "int8", "auto"), default="float32")
    parser.add_argument("--results", type=Path, default=Path("runs/planning.jsonl"))
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    parser.add_argument(
        "--held-out",
        type=int,
        default=3,
        metavar="N",
        help="networks between the front's points to predict and measure; 0: no front (3)",
    )
    parser.add_argument("--cache", type=Path, help="keep layers' times there (by default, nowhere)")
    args = parser.parse_args(argv)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = load(args.results)
    wanted = asked_for(args)
    for place, asked in enumerate(wanted):
        if asked.key in done:
            continue
        row = done[asked.key] = measured(asked, args.cache, args.held_out)
        with args.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(f"{place + 1}/{len(wanted)}", *_line(row), file=sys.stderr, flush=True)
    found = table([done[asked.key] for asked in wanted])
    print_table(found)
    if args.table:
        write_text(args.table, found.to_markdown())


if __name__ == "__main__":
    main()
