r"""Int8 files of several tools from the same calibration images: divergence, accuracy, time.

    python benchmarks/int8.py --json int8.json
    python benchmarks/int8.py resnet20 --ablation

Every contestant is an ONNX file, and every figure is of that file in ONNX Runtime: float32, ONNX
Runtime's ``quantize_static`` (per channel, QDQ), NNCF's ``quantize`` where it is installed, and
ours; with ``--ablation`` ours without each of its closed forms. Divergence is the mean
Kullback-Leibler divergence from the float network's classes; of the denoiser the mean squared
difference, in units of the 255th part squared. Intervals: 95 %, bootstrap over the images. Times
are interleaved, with one thread and a batch of 1. NNCF is not a dependency: `pip install nncf`.
Subnormal weights are set to zero first, for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import onebyone as obo
from onebyone.core.statistics import ratio_of
from onebyone.core.tables import Table
from onebyone.data import Data
from onebyone.networks.subnormals import flush_in_place
from onebyone.profiling.latency import interleave
from onebyone.quantizing import ClosedForms, quantize
from onebyone.quantizing.saturation import eight_bit_instructions, saturates_here
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine
from onebyone.runtimes.onnx import onnxruntime_session
from onebyone.runtimes.openvino import prepare_onnx_in_openvino

sys.path.insert(0, str(Path(__file__).parent))
from cifar10_data import cifar10_imagenet_statistics, cifar10_nin_statistics
from dncnn import denoising, psnr
from networks import cifar10_nin, dncnn_sigma25, resnet20, resnet32

ROUNDS = 30
CROPS, CROP = 2, 64  # of each of the denoiser's test pictures so many squared
RESAMPLES = 2000


class Subject(NamedTuple):
    """A pretrained network and its data."""

    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    calibration: int


def half_of_nin() -> nn.Module:
    """Return NiN with half of its MACs, its layers factorized: not trained afterwards."""
    network, data = cifar10_nin(), cifar10_nin_statistics()
    calibration = data.train.take(256, 0)
    plan = obo.plan(network, calibration, budget="macs=50%")
    return obo.apply(network, plan, calibration)


SUBJECTS = {
    "resnet20": Subject(resnet20, cifar10_imagenet_statistics, 128),
    "resnet32": Subject(resnet32, cifar10_imagenet_statistics, 128),
    "nin": Subject(cifar10_nin, cifar10_nin_statistics, 128),
    "nin_half": Subject(half_of_nin, cifar10_nin_statistics, 128),
    "dncnn": Subject(dncnn_sigma25, denoising, 48),
}


@dataclass(frozen=True)
class Row:
    """A contestant's figures; times are ratios to float32 in the same runtime."""

    network: str
    contestant: str
    divergence: float
    low: float
    high: float
    theirs_over_ours: float | None
    ratio_low: float | None
    ratio_high: float | None
    score: float
    agreement: float | None
    file_bytes: int
    seconds: float
    onnxruntime: tuple[float, float, float] | None
    openvino: tuple[float, float, float] | None


# ---------------------------------------------------------------- contestants


def contestants(
    network: nn.Module, calibration: Tensor, *, ablation: bool
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the name of each contestant and how its file's content is made."""
    flexible = to_flexible(network, calibration)
    yield "float32", lambda: flexible
    for method in ("MinMax", "Entropy"):
        yield f"quantize_static {method}", lambda m=method: by_onnxruntime(flexible, calibration, m)
    if importlib.util.find_spec("nncf") is not None:
        yield "NNCF", lambda: by_nncf(flexible, calibration)
    yield "ours", lambda: by_us(network, calibration, ClosedForms())
    for field in fields(ClosedForms) if ablation else ():
        forms = replace(ClosedForms(), **{field.name: False})
        yield f"ours, no {field.name}", lambda f=forms: by_us(network, calibration, f)


def to_flexible(network: nn.Module, calibration: Tensor) -> bytes:
    """Return the float network as an ONNX file's content with a free batch."""
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(network, (calibration[:2],), dynamic_shapes=shapes)
    exported = torch.onnx.export(program, dynamo=True, input_names=["input"], verbose=False)
    return exported.model_proto.SerializeToString()


def by_us(network: nn.Module, calibration: Tensor, forms: ClosedForms) -> bytes:
    """Return our int8 file."""
    quantized = quantize(network, calibration, forms=forms, examples=len(calibration))
    return to_flexible(quantized.network, calibration)


def by_onnxruntime(content: bytes, calibration: Tensor, method: str) -> bytes:
    """Return the file of ``quantize_static``, prepared as its documentation asks for."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """Gives the examples one by one."""

        def __init__(self) -> None:
            self.rest = iter(calibration.numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            """Return the next example."""
            example = next(self.rest, None)
            return None if example is None else {"input": example[None]}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder) / f"{name}.onnx" for name in "abc")
        source.write_bytes(content)
        quant_pre_process(str(source), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, method),
        )
        return target.read_bytes()


def by_nncf(content: bytes, calibration: Tensor) -> bytes:
    """Return NNCF's file, quantized by its defaults."""
    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    examples = nncf.Dataset(list(calibration.numpy()), lambda each: {"input": each[None]})
    model = nncf.quantize(onnx.load_from_string(content), examples, subset_size=len(calibration))
    return model.SerializeToString()


# ---------------------------------------------------------------- figures


def outputs_of_file(content: bytes, inputs: Tensor) -> Tensor:
    """Return what a file gives in ONNX Runtime."""
    session = onnxruntime_session(content)
    name = session.get_inputs()[0].name
    size = session.get_inputs()[0].shape[0]
    step = size if isinstance(size, int) else 50
    parts = [session.run(None, {name: part.numpy()})[0] for part in inputs.split(step)]
    return torch.from_numpy(np.concatenate(parts))


def divergences(exact: Tensor, given: Tensor) -> np.ndarray:
    """Return each image's divergence from the float network's outputs."""
    if exact.ndim > 2:
        return ((given - exact) * 255).square().flatten(1).mean(1).double().numpy()
    wanted, got = exact.double().log_softmax(1), given.double().log_softmax(1)
    return (wanted.exp() * (wanted - got)).sum(1).numpy()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean."""
    drawn = _draws(len(values))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a ratio of means over the same images."""
    drawn = _draws(len(above))
    low, high = np.quantile(above[drawn].mean(1) / below[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _draws(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def times(files: dict[str, bytes], example: Tensor, runtime: str) -> dict[str, Any]:
    """Return each file's time in a runtime as a ratio to that of float32, with its interval."""
    run = {name: call(content, example, runtime) for name, content in files.items()}
    samples = interleave(run, rounds=ROUNDS)
    found = {}
    for name in files:
        ratio = ratio_of(samples.ms[name], samples.ms["float32"])
        found[name] = (ratio.value, ratio.low, ratio.high)
    return found


def call(content: bytes, example: Tensor, runtime: str) -> Callable[[], object]:
    if runtime == "openvino":
        return prepare_onnx_in_openvino(content, example)
    session = onnxruntime_session(content)
    feed = {session.get_inputs()[0].name: example.numpy()}
    return lambda: session.run(None, feed)


def test_part(name: str, data: Data) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets that are scored: the denoiser's are squares."""
    if name != "dncnn":
        parts = list(data.test.batches(250))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    pairs = [(_crops(x), _crops(y)) for x, y in data.test.batches(1)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _crops(picture: Tensor) -> Tensor:
    """Return squares from the center of a picture."""
    side = CROPS * CROP
    top, left = ((size - side) // 2 for size in picture.shape[2:])
    center = picture[:, :, top : top + side, left : left + side]
    squares = center.unfold(2, CROP, CROP).unfold(3, CROP, CROP)
    return squares.reshape(-1, 1, CROP, CROP)


def measure(name: str, *, ablation: bool, timed: bool) -> list[Row]:
    """Return the figures of every contestant for one network."""
    subject = SUBJECTS[name]
    network, data = subject.network().eval(), subject.data()
    flush_in_place(network)
    calibration = next(iter(data.train.take(subject.calibration, 0).batches(subject.calibration)))[
        0
    ]
    inputs, targets = test_part(name, data)
    files: dict[str, bytes] = {}
    seconds: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for contestant, make in contestants(network, calibration, ablation=ablation):
        started = time.monotonic()
        try:
            files[contestant] = make()
        except Exception as error:  # noqa: BLE001 - a tool may fail in every way
            print(f"{name}: {contestant} failed: {error}", file=sys.stderr)
            continue
        seconds[contestant] = time.monotonic() - started
        outputs[contestant] = outputs_of_file(files[contestant], inputs)
        print(f"{name}: {contestant}, {seconds[contestant]:.0f} s", file=sys.stderr)
    measured = {k: v for k, v in files.items() if not k.startswith("ours,")}
    ratios = {
        runtime: times(measured, inputs[:1], runtime) if timed else {}
        for runtime in ("onnxruntime", "openvino")
    }
    exact = outputs["float32"]
    apart = {each: divergences(exact, given) for each, given in outputs.items()}
    return [
        _row(
            name,
            each,
            apart=apart,
            outputs=outputs,
            targets=targets,
            files=files,
            seconds=seconds,
            ratios=ratios,
        )
        for each in outputs
    ]


def _row(
    name: str,
    contestant: str,
    *,
    apart: dict[str, np.ndarray],
    outputs: dict[str, Tensor],
    targets: Tensor,
    files: dict[str, bytes],
    seconds: dict[str, float],
    ratios: dict[str, dict[str, Any]],
) -> Row:
    values, given = apart[contestant], outputs[contestant]
    low, high = interval(values)
    others = contestant not in ("float32", "ours")
    ratio = ratio_interval(values, apart["ours"]) if others else (None, None)
    agreement = None
    if given.ndim == 2:
        score = float((given.argmax(1) == targets).double().mean())
        agreement = float((given.argmax(1) == outputs["float32"].argmax(1)).double().mean())
    else:
        score = float(psnr(given, targets).mean())
    return Row(
        network=name,
        contestant=contestant,
        divergence=float(values.mean()),
        low=low,
        high=high,
        theirs_over_ours=float(values.mean() / apart["ours"].mean()) if others else None,
        ratio_low=ratio[0],
        ratio_high=ratio[1],
        score=score,
        agreement=agreement,
        file_bytes=len(files[contestant]),
        seconds=seconds[contestant],
        onnxruntime=ratios["onnxruntime"].get(contestant),
        openvino=ratios["openvino"].get(contestant),
    )


def table(rows: list[Row]) -> Table:
    """Return a contestant a line."""
    lines = [
        [
            row.network,
            row.contestant,
            f"{row.divergence:.3g} ({row.low:.3g}…{row.high:.3g})",
            ""
            if row.theirs_over_ours is None
            else f"{row.theirs_over_ours:.2f} ({row.ratio_low:.2f}…{row.ratio_high:.2f})",
            f"{row.score:.2f} dB" if row.agreement is None else f"{row.score:.1%}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            _shown(row.onnxruntime),
            _shown(row.openvino),
        ]
        for row in rows
    ]
    return Table(
        columns=(
            "network", "file", ">divergence", ">÷ ours", ">score", ">agreement",
            ">time, ONNX Runtime", ">time, OpenVINO",
        ),
        rows=lines,
        title="Int8 from the same calibration images",
        notes=[
            "Times: share of float32's in the same runtime, 1 thread, batch 1.",
            f"Instructions for 8-bit products: {', '.join(eight_bit_instructions()) or 'none'}.",
            f"ONNX Runtime saturates sums of 8-bit products here: {saturates_here()}.",
        ],
    )  # fmt: skip


def _shown(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}…{ratio[2]:.2f})"


def main() -> None:
    """Measure the networks that are named."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", choices=[*SUBJECTS, []], help="all by default")
    parser.add_argument("--ablation", action="store_true", help="ours without each closed form too")
    parser.add_argument("--untimed", action="store_true", help="leave the times out")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for name in args.networks or SUBJECTS
        for row in measure(name, ablation=args.ablation, timed=not args.untimed)
    ]
    print_table(table(rows))
    if args.json is not None:
        content = {
            "machine": asdict(describe_machine()),
            "instructions": eight_bit_instructions(),
            "saturates": saturates_here(),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
