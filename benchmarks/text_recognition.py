"""A text recognizer that exists only as an ONNX file: the lines it reads at a share of its time.

    pip download --no-deps rapidocr-onnxruntime==1.4.4 matplotlib==3.11.2
    unzip '*.whl' -d files/
    python benchmarks/text_recognition.py files/ --folder runs/text

Text lines with known words are rendered; those to fit on, without their texts, and those to test on
have no word in common. The network is planned for a share of its time in ONNX Runtime, its weights
are fitted in closed form, and then brought nearer to the original's outputs without labels. A line
counts as read if the greedy CTC decoding is its text exactly; the character error rate is the
edits from all decoded texts to the true ones by the number of true characters. The plan and the
weights are kept in the folder, so the command goes on where it stopped. Without the files it says
so and ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.text import edit_distance

import onebyone as obo
from onebyone.core.records import Plan
from onebyone.core.set_metrics import Array, SetMetric
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.data import TensorSplit
from onebyone.evaluation.set_scores import Pooled
from onebyone.evaluation.statistics import Scores, paired_difference
from onebyone.networks.zoo import load_weights
from onebyone.pipeline.importing import imported
from onebyone.report.console import progress
from onebyone.rewrites import restructure

sys.path.insert(0, str(Path(__file__).parent))
from result_cells import interval, percent, speed
from text_lines import HEIGHT, WIDTH, Lines, font_files, text_lines

FITTED, TESTED = 0, 1  # halves of the words
BATCH = 20
RECOGNIZER = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
FONTS_IN = "matplotlib/mpl-data/fonts/ttf"


@dataclass(frozen=True)
class CharacterErrors(SetMetric):
    """The character error rate of a set of lines, negated so that higher is better."""

    name: str = "character errors"

    def counts(self, outputs: Any, targets: Tensor, ignore_index: int | None) -> Sequence[Any]:
        """Refuse: lines are counted as texts, by ``errors_of``."""
        raise NotImplementedError

    def values(self, counts: Sequence[Any], weights: Array) -> Array:
        """Return the edits of each set by its characters, negated."""
        edits, characters = (weights @ np.array(counts, dtype=float)).T
        return -edits / characters


def prepared(lines: Lines) -> Tensor:
    """Return pictures as the recognizer takes them: blue first, from -1 to 1."""
    pixels = np.ascontiguousarray(lines.images[..., ::-1].transpose(0, 3, 1, 2))
    return (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5


def characters_of(file: Path) -> list[str]:
    """Return the text of each class: the blank, the file's own characters, and the space."""
    import onnxruntime

    found = onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map
    return ["", *found["character"].splitlines(), " "]


def decoded(outputs: Tensor, characters: Sequence[str]) -> list[str]:
    """Return the texts of ``(n, positions, classes)``: equal neighbors are one, blanks are none."""
    texts = []
    for row in outputs.argmax(dim=2).tolist():
        kept = [one for one, before in zip(row, [0, *row], strict=False) if one != before]
        texts.append("".join(characters[one] for one in kept).strip())
    return texts


def read(network: nn.Module, inputs: Tensor, characters: Sequence[str]) -> list[str]:
    """Return what a network reads."""
    with torch.inference_mode():
        return [t for part in inputs.split(BATCH) for t in decoded(network(part), characters)]


@dataclass(frozen=True)
class Read:
    """How well a network reads lines."""

    exact: Scores
    errors: Pooled

    @classmethod
    def of(cls, found: Sequence[str], true: Sequence[str]) -> Read:
        """Return the scores of texts beside the true ones."""
        hits: NDArray[Any] = np.array([a == b for a, b in zip(found, true, strict=True)], float)
        edits = edit_distance(list(found), list(true), reduction="none").tolist()
        counts = [(made, len(text)) for made, text in zip(edits, true, strict=True)]
        return cls(Scores("lines read", hits), Pooled(CharacterErrors(), counts))


# ---------------------------------------------------------------- the line


def planned(network: nn.Module, fitted: TensorSplit, args: argparse.Namespace) -> Plan:
    """Return the plan, kept in the folder."""
    file = args.folder / "plan.json"
    if not file.exists():
        with progress("plan") as update:
            plan = obo.plan(
                network, fitted, budget=args.budget, runtime="onnxruntime", closest=True,
                num_threads=args.threads, effort=args.effort, leave=args.leave, progress=update,
            )  # fmt: skip
        plan.save(file)
    return Plan.load(file)


def kept(file: Path, network: nn.Module, make: Any) -> nn.Module:
    """Return the network of a file of weights; make it first if there is none."""
    if not file.exists():
        made = make()
        torch.save(made.state_dict(), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        return made
    load_weights(network, file, network=file.stem)
    return network.eval()


def variants(
    network: nn.Module, plan: Plan, args: argparse.Namespace, fonts: Any
) -> dict[str, Any]:
    """Return the original, and the rewritten network before and after the steps."""
    lines = text_lines(args.lines, seed=args.seed, part=FITTED, fonts=fonts)
    fitted = TensorSplit(prepared(lines))

    def applied() -> nn.Module:
        with progress("apply") as update:
            return obo.apply(network, plan, fitted.take(args.calibration, 0), progress=update)

    def nearer() -> nn.Module:
        with progress("steps") as update:
            return obo.reconstruct(
                one_shot, teacher=network, calibration=fitted, steps=args.steps, seed=args.seed,
                batch_size=args.batch, learning_rate=args.rate, progress=update,
            ).model  # fmt: skip

    one_shot = kept(args.folder / "one-shot.pt", restructure(network, plan), applied)
    found = {"original": network, "rewritten, before any step": one_shot}
    if args.steps:
        file = args.folder / f"{args.steps}-steps.pt"
        found[f"after {args.steps} steps"] = kept(file, restructure(network, plan), nearer)
    return found


def measured(networks: dict[str, nn.Module], characters: list[str], args: Any, fonts: Any) -> Any:
    """Return a row a network, with paired differences from the first, and what timed them."""
    lines = text_lines(args.test, seed=args.seed + 1, part=TESTED, fonts=fonts)
    inputs = prepared(lines)
    timed = obo.compare(
        *networks.values(), input_shape=tuple(inputs[:1].shape), runtimes=["onnxruntime"],
        num_threads=args.threads, names=list(networks),
    )  # fmt: skip
    rows, first = [], None
    for place, (name, network) in enumerate(networks.items()):
        with progress(f"reading, {name}"):
            one = Read.of(read(network, inputs, characters), lines.texts)
        first = first or one
        pair = timed.pair(place) if place else None
        cost = timed.contenders[place].measured
        rows.append({
            "name": name, "macs": cost.macs, "params": cost.params,
            "ms": cost.latency["onnxruntime"].median_ms,
            "faster": None if pair is None else interval(pair.latency_ratio["onnxruntime"]),
            "exact": interval(one.exact.summary()),
            "errors": interval(one.errors.summary()),
            "exact apart": interval(paired_difference(first.exact, one.exact)) if place else None,
            "errors apart": interval(first.errors.difference(one.errors)) if place else None,
        })  # fmt: skip
    return rows, str(timed.machine)


# ---------------------------------------------------------------- showing


def table(found: dict[str, Any]) -> Table:
    """Return a line a network."""
    rows = []
    for row in found["rows"]:
        apart = wrong = ""
        if row["faster"]:
            apart = percent(row["exact apart"], signed=True)
            wrong = percent(row["errors apart"], signed=True, negated=True)
        rows.append([
            row["name"], percent(row["exact"]), apart, percent(row["errors"], negated=True), wrong,
            speed(row), format_count(row["macs"]), format_count(row["params"]),
        ])  # fmt: skip
    return Table(
        columns=(
            found["file"], ">lines read [95 %]", ">difference [95 %, paired]",
            ">character errors [95 %]", ">difference [95 %, paired]",
            f">onnxruntime, {found['threads']} thread(s)", ">MACs", ">params",
        ),
        rows=rows,
        notes=[
            f"{found['test']:,} lines to test on; seed {found['seed']}; {found['budget']}.",
            f"Fonts: {found['fonts']}. Input 1×3×{HEIGHT}×{WIDTH}.",
            (
                f"Planned and fitted on {found['calibration']:,} lines, steps on "
                f"{found['lines']:,}; effort {found['effort']}."
            ),
            f"{found['machine']}.",
        ],
    )  # fmt: skip


def main() -> None:
    """Plan, rewrite, read and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, help="folder in which the two wheels were unzipped")
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--budget", default="latency=60%")
    parser.add_argument("--threads", type=int, default=1, help="while timing (1)")
    parser.add_argument("--effort", default="quick", help="of the plan: quick, normal, thorough")
    parser.add_argument("--leave", nargs="*", default=[], help="layers to leave alone")
    parser.add_argument("--calibration", type=int, default=128, help="lines to fit on (128)")
    parser.add_argument("--lines", type=int, default=1024, help="for the steps (1024)")
    parser.add_argument("--steps", type=int, default=300, help="without labels; 0 for none (300)")
    parser.add_argument("--rate", type=float, default=1e-4, help="of the steps (1e-4)")
    parser.add_argument("--batch", type=int, help="lines in a step")
    parser.add_argument("--test", type=int, default=1000, help="lines to test on (1000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    args = parser.parse_args()
    file, folder = args.files / RECOGNIZER, args.files / FONTS_IN
    if not file.exists():
        print(f"Skipped: {file} is missing. To get it: {__doc__.splitlines()[2].strip()}; unzip it")
        return
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    fonts = font_files(folder)
    network = imported(file, input_shape=f"1x3x{HEIGHT}x{WIDTH}").model
    lines = text_lines(args.lines, seed=args.seed, part=FITTED, fonts=fonts)
    started = time.process_time()
    calibration = TensorSplit(prepared(lines)).take(args.calibration, 0)
    plan = planned(network, calibration, args)
    print(f"{plan}\n{time.process_time() - started:.0f} CPU s", file=sys.stderr)
    rows, machine = measured(variants(network, plan, args, fonts), characters_of(file), args, fonts)
    found = {
        "file": file.name, "rows": rows, "machine": machine,
        "fonts": ", ".join("Aileron" if each is None else each.stem for each in fonts),
        **{name: getattr(args, name) for name in (
            "budget", "threads", "effort", "calibration", "lines", "steps", "test", "seed",
        )},
    }  # fmt: skip
    (args.folder / "text.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found).to_markdown())


if __name__ == "__main__":
    main()
