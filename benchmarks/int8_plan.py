r"""Plans in int8 beside float32, int8 alone and the same rewrites in float32: time and accuracy.

    python benchmarks/int8_plan.py nin --precision int8 --json nin.json
    python benchmarks/int8_plan.py resnet18 resnet50 vgg16_gap --effort quick --peers

The plan is made for the time of int8 alone times ``--share``, in each runtime; where that cannot be
reached it is the nearest. Every contestant is an ONNX file that is run in that runtime: float32,
int8 alone, the plan's rewrites in float32, and the plan as it is deployed; with ``--peers`` also
``quantize_static`` and NNCF by their defaults. Times are interleaved in one series of rounds, with
one thread and a batch of 1; ratios are to float32, with the 95 % interval of a block bootstrap.
Divergence is the mean Kullback-Leibler divergence from the float32 network on the test images; its
intervals are over the images. Nothing is trained. The networks at 224 have random weights: they
are timed only. Subnormal weights are set to zero first, for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import onebyone as obo
from onebyone.core.errors import OneByOneError
from onebyone.core.records import Plan
from onebyone.core.statistics import ratio_of
from onebyone.core.tables import Table
from onebyone.networks.subnormals import flush_in_place
from onebyone.planning import Planner
from onebyone.profiling.latency import interleave
from onebyone.quantizing import NO_CLOSED_FORMS, quantize
from onebyone.quantizing.saturation import eight_bit_instructions, saturates_here
from onebyone.quantizing.untrained import int8_form
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine
from onebyone.runtimes.onnx import to_onnx

sys.path.insert(0, str(Path(__file__).parent))
from int8 import (
    SUBJECTS,
    by_nncf,
    by_onnxruntime,
    call,
    divergences,
    interval,
    outputs_of_file,
    test_part,
    times,
    to_flexible,
)

RUNTIMES = ("onnxruntime", "openvino")
SHARE = 0.65
# Networks at 224 by 224 with random weights, timed only.
RANDOM = (
    "resnet18", "resnet50", "vgg16_gap", "mobilenet_v2", "efficientnet_lite0", "squeezenet1_1",
    "shufflenet_v2_x1_0",
)  # fmt: skip
PLAN_EXAMPLES = 128
ROUNDS = 20


@dataclass(frozen=True)
class Row:
    """A contestant's figures in one runtime; times are ratios to float32."""

    network: str
    runtime: str
    contestant: str
    ratio: tuple[float, float, float]
    divergence: tuple[float, float, float] | None
    accuracy: float | None
    agreement: float | None
    file_bytes: int
    remark: str = ""


@dataclass(frozen=True)
class Subject:
    """A network, its calibration inputs and test part; without data it is timed only."""

    network: nn.Module
    calibration: Tensor
    planned_on: object
    test: tuple[Tensor, Tensor] | None


def vgg16_gap() -> nn.Module:
    """Return VGG-16 with global average pooling and one linear layer as its head."""
    import torchvision

    network = torchvision.models.vgg16()
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(512, 1000)
    return network


def random_network(name: str) -> nn.Module:
    """Return a network with random weights."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name == "vgg16_gap":
        return vgg16_gap()
    if name == "efficientnet_lite0":
        return timm.create_model("tf_efficientnet_lite0")
    return torchvision.models.get_model(name)


def subject_of(name: str) -> Subject:
    """Return a network in evaluation mode with its data."""
    if name in RANDOM:
        network = random_network(name).eval()
        return Subject(network, torch.randn(4, 3, 224, 224), None, None)
    known = SUBJECTS[name]
    network, data = known.network().eval(), known.data()
    flush_in_place(network)
    images = next(iter(data.train.take(known.calibration, 0).batches(known.calibration)))[0]
    return Subject(network, images, data.train.take(PLAN_EXAMPLES, 0), test_part(name, data))


def alone_share(network: nn.Module, example: Tensor, runtime: str) -> float:
    """Return the time of int8 alone as a share of float32's."""
    content = to_onnx(network, example)
    files = {"float32": content, "int8": int8_form(content, inputs=example)}
    samples = interleave({k: call(v, example, runtime) for k, v in files.items()}, rounds=ROUNDS)
    return ratio_of(samples.ms["int8"], samples.ms["float32"]).value


def in_int8(network: nn.Module, subject: Subject, kept: dict[str, str]) -> bytes:
    """Return an int8 file; of random weights the closed forms would be of no use."""
    forms = NO_CLOSED_FORMS if subject.test is None else None
    made = quantize(network, subject.calibration, keep_float32=kept, forms=forms)
    return to_flexible(made.network, subject.calibration)


def carried_out(plan: Plan, subject: Subject) -> nn.Module:
    """Return the rewritten network, its weights fitted where there is data."""
    if subject.test is None:
        return obo.restructure(subject.network, plan).eval()
    return obo.apply(subject.network, plan, subject.planned_on).eval()


def by_peers(plain: bytes, calibration: Tensor) -> dict[str, bytes]:
    """Return the files of other quantizers, by their defaults, from the same inputs."""
    files = {"quantize_static": by_onnxruntime(plain, calibration, "MinMax")}
    if importlib.util.find_spec("nncf") is not None:
        files["NNCF"] = by_nncf(plain, calibration)
    return {name: content for name, content in files.items() if _runs(name, content, calibration)}


def _runs(name: str, content: bytes, inputs: Tensor) -> bool:
    try:
        outputs_of_file(content, inputs)
    except Exception as error:  # noqa: BLE001 - the runtime's own classes
        print(f"The file of {name} does not run in ONNX Runtime: {error}", file=sys.stderr)
        return False
    return True


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """Return the figures of every contestant in each runtime."""
    precision = args.precision
    subject = subject_of(name)
    example = subject.calibration[:1]
    alone = in_int8(subject.network, subject, {})
    plain = to_flexible(subject.network, subject.calibration)
    peers = by_peers(plain, subject.calibration) if args.peers else {}
    planner: Planner | None = None
    rows = []
    for runtime in args.runtime or RUNTIMES:
        started = time.monotonic()
        wanted = min(1.0, args.share * alone_share(subject.network, example, runtime))
        planner = _planner(subject, args, runtime, planner)
        plan = planner.plan([f"latency={100 * wanted:.1f}%"], closest=True)
        print(plan, f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
        small = carried_out(plan, subject)
        kept = {item.site: item.reason for item in plan.float32_layers}
        files = {"float32": plain, **peers, "int8 alone": alone}
        files["rewrites in float32"] = to_flexible(small, subject.calibration)
        ours = files["rewrites in float32"]
        if plan.precision == "int8":
            ours = in_int8(small, subject, kept)
        files[f"ours, {precision}"] = ours
        found = times(files, example, runtime)
        remark = _remark(plan, wanted)
        for contestant, content in files.items():
            own = remark if contestant.startswith("ours") else ""
            figures = _scores(subject, content, plain)
            row = Row(name, runtime, contestant, found[contestant], *figures, len(content), own)
            rows.append(row)
    return rows


def _planner(
    subject: Subject, args: argparse.Namespace, runtime: str, known: Planner | None
) -> Planner:
    if known is not None:
        return known.for_runtime(runtime, num_threads=1)
    shape = None if subject.planned_on is not None else (1, *subject.calibration.shape[1:])
    return Planner(
        subject.network,
        subject.planned_on,
        runtime=runtime,
        num_threads=1,
        precision=args.precision,
        effort=args.effort,
        input_shape=shape,
        progress=_told,
    )


def _told(done: int, total: int, message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {done}/{total} {message}", file=sys.stderr)


def _remark(plan: Plan, wanted: float) -> str:
    kept = f", {len(plan.float32_layers)} layers float32" if plan.float32_layers else ""
    found = "" if plan.latency is None else f", predicted {plan.latency.error:.1%} off"
    return f"asked {wanted:.2f}, {len(plan.choices)} rewrites, {plan.precision}{kept}{found}"


def _scores(
    subject: Subject, content: bytes, plain: bytes
) -> tuple[tuple[float, float, float] | None, float | None, float | None]:
    """Return divergence, accuracy and agreement in ONNX Runtime."""
    if subject.test is None:
        return None, None, None
    inputs, targets = subject.test
    exact, given = outputs_of_file(plain, inputs), outputs_of_file(content, inputs)
    apart = divergences(exact, given)
    right = float((given.argmax(1) == targets).double().mean())
    same = float((given.argmax(1) == exact.argmax(1)).double().mean())
    return (float(np.mean(apart)), *interval(apart)), right, same


def tables(rows: list[Row]) -> list[Table]:
    """Return a table for each network and runtime, a contestant a line."""
    made = []
    for (network, runtime), found in itertools.groupby(
        rows, lambda row: (row.network, row.runtime)
    ):
        own = list(found)
        made.append(
            Table(
                columns=("file", ">time", ">divergence × 1000", ">accuracy", ">agreement", ">kB"),
                rows=[_cells(row) for row in own],
                title=f"{network} in {runtime}",
                notes=[row.remark for row in own if row.remark],
            )
        )
    return made


def _cells(row: Row) -> list[str]:
    return [
        row.contestant,
        _shown(row.ratio),
        "" if row.divergence is None else _shown(row.divergence, 1000),
        "" if row.accuracy is None else f"{row.accuracy:.1%}",
        "" if row.agreement is None else f"{row.agreement:.1%}",
        str(row.file_bytes // 1000),
    ]


def _shown(figure: tuple[float, float, float], scale: float = 1.0) -> str:
    value, low, high = (scale * each for each in figure)
    return f"{value:.2f} [{low:.2f}–{high:.2f}]"


def _conditions() -> str:
    instructions = ", ".join(eight_bit_instructions()) or "none"
    return (
        f"{describe_machine()}. Instructions for 8-bit products: {instructions}; saturation found: "
        f"{saturates_here()}. Times: share of float32's in the same runtime, 1 thread, batch 1. "
        "Accuracy and divergence are of the file in ONNX Runtime."
    )


def main() -> None:
    """Measure the networks that are named."""
    assert __doc__ is not None
    names: list[str] = ["nin", "resnet20", "resnet32", *RANDOM]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", choices=names)
    parser.add_argument("--precision", choices=("int8", "auto"), default="int8")
    parser.add_argument("--share", type=float, default=SHARE, help="of the time of int8 alone")
    parser.add_argument("--effort", choices=("quick", "normal", "thorough"), default="normal")
    parser.add_argument("--peers", action="store_true", help="also other quantizers' files")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="both by default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in args.networks:
        try:
            rows += measure(name, args)
        except OneByOneError as error:
            print(f"{name}: {error}", file=sys.stderr)
    for each in tables(rows):
        print_table(each)
    print(_conditions())
    if args.json is not None:
        content = {
            "machine": asdict(describe_machine()),
            "instructions": eight_bit_instructions(),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
