"""Seconds and memory to factorize every convolution of a network, beside tensorly's decomposition.

    python benchmarks/conversion.py                          # VGG-16 and ResNet-50, kernels alone
    python benchmarks/conversion.py --images 512             # also with calibration images
    python benchmarks/conversion.py torchvision:vgg16 --rounds 5 --images 0

Every k×k convolution becomes 1×1, k×k, 1×1 at half its channels. tensorly (``pip install
'onebyone[benchmarks]'``) decomposes the same kernels one by one with ``partial_tucker``; ours
copies the network, decomposes, and builds the new layers. Rounds are interleaved; errors are of
the same kernels. Memory is the peak of a process that does nothing else, less what the imports and
the network take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import onebyone as obo
from onebyone.kernels import kernel_of
from onebyone.models.zoo import build
from onebyone.profiling.latency import threads
from onebyone.records import Plan, write_text
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine
from onebyone.sites import module_at
from onebyone.tables import Table

NETWORKS = ("torchvision:vgg16", "torchvision:resnet50")
SIZE = 224


class Noise(Dataset[Tensor]):
    """Pictures that are drawn when they are asked for, so that they take no memory themselves."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        # Smooth at several scales, as pictures are, not white.
        picture = torch.zeros(1, 3, SIZE, SIZE)
        for size in (4, 14, 56, 224):
            coarse = torch.randn(1, 3, size, size, generator=generator)
            picture += nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear") / 2
        return picture[0]


def network_of(spec: str, spectrum: float) -> nn.Module:
    """Return a network whose kernels have falling singular values, as trained ones have.

    Args:
        spec: Its name.
        spectrum: Exponent: channel directions, of inputs and of outputs, are scaled by
            ``rank ** -spectrum``; 0 leaves the random weights as they are drawn.
    """
    torch.manual_seed(0)
    model = build(spec).eval()
    if spectrum:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.copy_(_fallen(module.weight, spectrum))
    return model


def _fallen(weight: Tensor, spectrum: float) -> Tensor:
    out, channels = weight.shape[:2]
    norm = weight.norm()
    for axis, size in ((0, out), (1, channels)):
        scales = torch.arange(1, size + 1, dtype=torch.float32) ** -spectrum
        mixing = torch.linalg.qr(torch.randn(size, size))[0] * scales
        weight = torch.tensordot(mixing, weight, dims=([1], [axis])).movedim(0, axis)
    return weight * norm / weight.norm()


# ---------------------------------------------------------------- what is timed


def ours(model: nn.Module, plan: Plan, images: int) -> nn.Module:
    """Carry a plan out, from the kernels alone or with calibration images."""
    return obo.apply(model, plan, Noise(images) if images else None)


def tensorly_factors(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Decompose the same kernels to the same ranks by tensorly, with its defaults."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    found = {}
    for option in plan.choices:
        weight = module_at(model, option.site).weight.detach()
        inner, outer = option.settings["ranks"]
        found[option.site] = partial_tucker(weight, rank=[outer, inner], modes=[0, 1])
    return found


def error_of_ours(model: nn.Module, rewritten: nn.Module, plan: Plan) -> float:
    """Return the squared error of all kernels, relative to their squared norm."""
    lost = total = 0.0
    for option in plan.choices:
        kernel = kernel_of(module_at(model, option.site))[0]
        chain = module_at(rewritten, option.site)
        first, core, last = (kernel_of(part)[0] for part in chain.children())
        made = torch.einsum("or,rsp,sc->ocp", last[:, :, 0], core, first[:, :, 0])
        lost += float((made - kernel).square().sum())
        total += float(kernel.square().sum())
    return lost / total


def error_of_tensorly(model: nn.Module, factors: dict[str, Any]) -> float:
    """Return the same of tensorly's kernels."""
    lost = total = 0.0
    for site, ((core, (outer, inner)), _) in factors.items():
        weight = module_at(model, site).weight.detach().double()
        made = torch.einsum("or,rskl,cs->ockl", outer.double(), core.double(), inner.double())
        lost += float((made - weight).square().sum())
        total += float(weight.square().sum())
    return lost / total


# ---------------------------------------------------------------- rounds and memory


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each arm, in turn; the first round is a warm-up.

    Seconds of the processor, which neighbours on the machine hardly change: for one thread.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for place in range(rounds + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if place:
                seconds[name].append(time.process_time() - started)
    return seconds


def alone(spec: str, arm: str, images: int, args: argparse.Namespace) -> dict[str, float]:
    """Run one arm once in a process of its own; return its seconds and peak memory."""
    command = [
        sys.executable, __file__, spec, "--alone", arm, "--images", str(images),
        "--spectrum", str(args.spectrum), "--threads", str(args.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(spec: str, args: argparse.Namespace) -> None:
    """Be that process."""
    model = network_of(spec, args.spectrum)
    plan = plan_of(model)
    if args.alone == "tensorly":
        import tensorly.decomposition  # noqa: F401 - its import is not what is measured
    before = _peak_kb(reset=True)
    started = time.process_time()
    if args.alone == "tensorly":
        tensorly_factors(model, plan)
    else:
        ours(model, plan, args.images)
    seconds = time.process_time() - started
    peak = _peak_kb()
    print(json.dumps({"seconds": seconds, "mb": (peak - before) / 1024}))


def _peak_kb(*, reset: bool = False) -> int:
    """Return the most memory that this process has held since the last reset."""
    if reset:
        # What building the network took at its worst is not what is measured.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def plan_of(model: nn.Module) -> Plan:
    """Return the plan: every k×k convolution at half its channels."""
    return obo.uniform_plan(model, (1, 3, SIZE, SIZE), ranks=0.5, form="tucker2")


def one_network(spec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network."""
    model = network_of(spec, args.spectrum)
    plan = plan_of(model)
    kept: dict[str, Any] = {}

    def tensorly_arm() -> None:
        kept["tensorly"] = tensorly_factors(model, plan)

    def our_arm() -> None:
        kept["ours"] = ours(model, plan, 0)

    seconds = interleaved({"tensorly": tensorly_arm, "ours": our_arm}, args.rounds)
    ratios = [a / b for a, b in zip(seconds["tensorly"], seconds["ours"], strict=True)]
    result = {
        "network": spec,
        "layers": len(plan.choices),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "error": {
            "tensorly": error_of_tensorly(model, kept["tensorly"]),
            "ours": error_of_ours(model, kept["ours"], plan),
        },
        "alone": {arm: alone(spec, arm, 0, args) for arm in ("tensorly", "ours")},
    }
    # Memory must not grow with the images: a quarter of them, then all.
    for count in sorted({args.images // 4, args.images} - {0}):
        result["alone"][f"ours, {count} images"] = alone(spec, "ours", count, args)
    return result


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Return what was measured."""
    rows = []
    for found in results:
        for arm, run in found["alone"].items():
            rounds = found["seconds"].get(arm)
            error = found["error"].get(arm)
            low, middle, high = (
                (min(rounds), statistics.median(rounds), max(rounds)) if rounds else (0, 0, 0)
            )
            rows.append(
                [
                    found["network"],
                    arm,
                    str(found["layers"]),
                    f"{middle:.2f} [{low:.2f}–{high:.2f}]" if rounds else f"{run['seconds']:.1f}",
                    f"{found['ratio']:.1f}×" if arm == "ours" else "",
                    "" if error is None else f"{error:.5f}",
                    f"{run['mb']:.0f}",
                ]
            )
    notes = [
        (
            f"CPU seconds, {args.threads} thread(s); median [least–greatest] of {args.rounds} "
            "interleaved rounds after one that is not counted; with images one run."
        ),
        *(
            f"{found['network']}: tensorly ÷ ours {found['ratio']:.1f} "
            f"[{min(found['ratios']):.1f}–{max(found['ratios']):.1f}], our error "
            f"{100 * (found['error']['ours'] / found['error']['tensorly'] - 1):+.2f} % of its own."
            for found in results
        ),
        str(describe_machine("cpu")) + f", tensorly {_tensorly_version()}.",
    ]
    return Table(
        columns=("network", "how", ">layers", ">CPU seconds", ">faster", ">error", ">peak MB"),
        rows=rows,
        title="Every k×k convolution to half its channels (Tucker-2)",
        notes=notes,
    )


def _tensorly_version() -> str:
    import tensorly

    return str(tensorly.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="torchvision:vgg16 torchvision:resnet50")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--images", type=int, default=512, help="calibration images; 0: none (512)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--spectrum", type=float, default=0.5, help="fall of the singular values (0.5); 0: none"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--alone", choices=("tensorly", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    specs = args.networks or list(NETWORKS)
    with threads(args.threads):
        if args.alone:
            run_alone(specs[0], args)
            return
        results = [one_network(spec, args) for spec in specs]
    print_table(table(results, args))
    if args.out:
        write_text(args.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
