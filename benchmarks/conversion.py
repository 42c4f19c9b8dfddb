"""Seconds and memory to factorize every convolution of a network, beside tensorly's decomposition.

    python benchmarks/conversion.py                          # VGG-16 and ResNet-50, kernels alone
    python benchmarks/conversion.py --images 512             # also with calibration images
    python benchmarks/conversion.py torchvision:vgg16 --rounds 5 --images 0

Every k×k convolution becomes 1×1, k×k, 1×1 at half its channels. tensorly (``pip install
'onebyone[benchmarks]'``) decomposes the same kernels one by one with ``partial_tucker``; ours
decomposes them one by one too and builds the new layers, then, in an arm of its own, makes the
whole new network, a copy of the old one with all its other weights. Rounds are interleaved; errors
are of the same kernels. With calibration images one run of an eighth of them comes before one of
all, for memory must not grow. Memory is the peak of a process that does nothing else, less what the
imports and the network take.
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
from onebyone.core.records import Plan
from onebyone.core.tables import Table
from onebyone.core.write_files import write_text
from onebyone.networks.conv_layers import kernel_of
from onebyone.networks.surgery import module_at
from onebyone.networks.zoo.load import build
from onebyone.profiling.latency import threads
from onebyone.report.console import print_table
from onebyone.rewrites.low_rank.reduced_rank import problems_of
from onebyone.rewrites.registry import layer_rewrite
from onebyone.runtimes import describe_machine

NETWORKS = ("torchvision:vgg16", "torchvision:resnet50")
SIZE = 224
# What is timed; with calibration images there are more.
TENSORLY, LAYERS, NETWORK = "tensorly", "our layers", "our network"


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


def new_network(model: nn.Module, plan: Plan, images: int) -> nn.Module:
    """Carry a plan out, from the kernels alone or with calibration images."""
    return obo.apply(model, plan, Noise(images) if images else None)


def new_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Make the layers of a plan from the kernels alone, as that does, but copy no network."""
    made: dict[str, nn.Module] = {}
    for option in plan.choices:
        layer, how = module_at(model, option.site), layer_rewrite(option.first.rewrite)
        chain = how.build(layer, option.first.settings, site=option.site)
        how.fit(chain, problems_of(layer), option.first.settings, layer)
        made[option.site] = chain
    return made


def tensorly_factors(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Decompose the same kernels to the same ranks by tensorly, with its defaults."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    found = {}
    for option in plan.choices:
        weight = module_at(model, option.site).weight.detach()
        inner, outer = option.first.settings["ranks"]
        found[option.site] = partial_tucker(weight, rank=[outer, inner], modes=[0, 1])
    return found


def error_of_ours(model: nn.Module, made: dict[str, nn.Module]) -> float:
    """Return the squared error of all kernels, relative to their squared norm."""
    lost = total = 0.0
    for site, chain in made.items():
        kernel = kernel_of(module_at(model, site))[0]
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
    if args.alone == TENSORLY:
        import tensorly.decomposition  # noqa: F401 - its import is not what is measured
    before = _peak_kb(reset=True)
    started = time.process_time(), time.perf_counter()
    kept = arms_of(model, plan, args.images)[args.alone]()
    ended = time.process_time(), time.perf_counter()
    found = {
        "seconds": ended[0] - started[0],
        "wall_seconds": ended[1] - started[1],
        "mb": (_peak_kb() - before) / 1024,
    }
    del kept
    print(json.dumps(found))


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


def arms_of(model: nn.Module, plan: Plan, images: int = 0) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    return {
        TENSORLY: lambda: tensorly_factors(model, plan),
        LAYERS: lambda: new_layers(model, plan),
        NETWORK: lambda: new_network(model, plan, images),
    }


def one_network(spec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network."""
    model = network_of(spec, args.spectrum)
    plan = plan_of(model)
    arms = arms_of(model, plan)
    seconds = interleaved(arms, args.rounds)
    ratios = {
        name: [a / b for a, b in zip(seconds[TENSORLY], seconds[name], strict=True)]
        for name in (LAYERS, NETWORK)
    }
    errors = {
        TENSORLY: error_of_tensorly(model, arms[TENSORLY]()),
        LAYERS: error_of_ours(model, arms[LAYERS]()),
    }
    network = arms[NETWORK]()
    errors[NETWORK] = error_of_ours(
        model, {option.site: module_at(network, option.site) for option in plan.choices}
    )
    runs = [{"arm": name, "images": 0, **alone(spec, name, 0, args)} for name in arms]
    runs += [
        {"arm": NETWORK, "images": count, **alone(spec, NETWORK, count, args)}
        for count in sorted({args.images // 8, args.images} - {0})
    ]
    return {
        "network": spec,
        "layers": len(plan.choices),
        "seconds": seconds,
        "ratios": ratios,
        "errors": errors,
        "alone": runs,
    }


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Return what was measured."""
    return Table(
        columns=(
            "network", "how", ">CPU s", ">wall s", ">images/s", ">faster", ">error", ">peak MB",
        ),
        rows=[_cells(found, run) for found in results for run in found["alone"]],
        title="Every k×k convolution to half its channels (Tucker-2)",
        notes=[
            (
                f"{args.threads} thread(s). From the kernels alone: median CPU seconds [least–"
                f"greatest] of {args.rounds} interleaved rounds after one that is not counted; "
                "peak memory, and all with calibration images, of one run alone."
            ),
            "Images a second of the processor: all passes over them and the algebra.",
            *(line for found in results for line in _ratios(found)),
            f"{describe_machine('cpu')}, tensorly {_tensorly_version()}.",
        ],
    )  # fmt: skip


def _cells(found: dict[str, Any], run: dict[str, Any]) -> list[str]:
    arm, images = run["arm"], run["images"]
    cells = [found["network"].partition(":")[2], f"{arm}, {images} images" if images else arm]
    if images:
        speed = images / run["seconds"]
        cells += [f"{run['seconds']:.0f}", f"{run['wall_seconds']:.0f}", f"{speed:.2f}", "", ""]
    else:
        rounds, ratios = found["seconds"][arm], found["ratios"].get(arm)
        cells += [
            f"{statistics.median(rounds):.2f} [{min(rounds):.2f}–{max(rounds):.2f}]",
            "",
            "",
            f"{statistics.median(ratios):.1f}×" if ratios else "",
            f"{found['errors'][arm]:.5f}",
        ]
    return [*cells, f"{run['mb']:.0f}"]


def _ratios(found: dict[str, Any]) -> list[str]:
    lines = []
    for arm, ratios in found["ratios"].items():
        more = 100 * (found["errors"][arm] / found["errors"][TENSORLY] - 1)
        lines.append(
            f"{found['network']}, {found['layers']} layers, tensorly ÷ {arm}: "
            f"{statistics.median(ratios):.1f} [{min(ratios):.1f}–{max(ratios):.1f}], at an error "
            f"{more:+.2f} % of its own."
        )
    return lines


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
    parser.add_argument("--alone", choices=(TENSORLY, LAYERS, NETWORK), help=argparse.SUPPRESS)
    args = parser.parse_args()
    specs = args.networks or list(NETWORKS)
    with threads(args.threads):
        if args.alone:
            run_alone(specs[0], args)
            return
        results = []
        for spec in specs:
            # With images a network takes many minutes: what is there is kept.
            results.append(one_network(spec, args))
            if args.out:
                write_text(args.out, json.dumps(results, indent=2) + "\n")
    print_table(table(results, args))


if __name__ == "__main__":
    main()
