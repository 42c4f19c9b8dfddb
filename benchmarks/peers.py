"""The same network by its peers and by us: divergence, accuracy and time.

    python -m venv peers && peers/bin/pip install . fasterai tensorly-torch torch-pruning
    peers/bin/python benchmarks/peers.py resnet20 --macs 60 50
    peers/bin/python benchmarks/peers.py resnet20 --macs 50 --epochs 2
    peers/bin/python benchmarks/peers.py resnet20 --macs 60 50 --equal-divergence

Peers: fasterai's Tucker-2 (``Conv_Decomposer``) and tltorch's Tucker (``FactorizedConv.from_conv``)
on every convolution but the first, and Torch-Pruning's group magnitude pruning of channels. Each
has one knob for all layers, which is set by bisection so that torch's counter finds the share of
the MACs; ours plans for the same share. All networks are scored on the same test images and timed
in the same rounds. With ``--epochs`` all are distilled alike, by our defaults. With
``--equal-divergence`` ours is instead the fastest whose divergence on the test images is not above
the peer's. A peer that is not installed, or fails, is said to.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onebyone import apply, distill
from onebyone.calibration import CalibrationData
from onebyone.cli.arguments import progress
from onebyone.data import Data
from onebyone.errors import OneByOneError
from onebyone.evaluation import agreement, paired_difference, score
from onebyone.planning import Planner
from onebyone.profiling.latency import interleave, threads
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine, find_runtime
from onebyone.sites import replace_module
from onebyone.tables import Table

sys.path.insert(0, str(Path(__file__).parent))
from subjects import SUBJECTS

# A network with a knob from 0, nothing removed, to 1.
Peer = Callable[[nn.Module, Tensor, float], nn.Module]
HALVINGS = 8
ROUNDS = 20


def fasterai_tucker(network: nn.Module, _: Tensor, removed: float) -> nn.Module:
    """Every convolution but the first by fasterai."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    first = next(name for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    return Conv_Decomposer().decompose(
        copy.deepcopy(network), percent_removed=removed, method="tucker", exclude=[first]
    )


def tltorch_tucker(network: nn.Module, _: Tensor, removed: float) -> nn.Module:
    """Every convolution but the first, and none of 1×1, by tltorch."""
    from tltorch import FactorizedConv

    small = copy.deepcopy(network)
    convolutions = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d)]
    for name, layer in convolutions[1:]:
        if layer.kernel_size == (1, 1):
            continue
        ranks = [max(1, round((1 - removed) * size)) for size in layer.weight.shape[:2]]
        factorized = FactorizedConv.from_conv(
            layer,
            rank=(*ranks, *layer.kernel_size),
            factorization="tucker",
            implementation="factorized",
        )
        small = replace_module(small, name, factorized)
    return small


def torch_pruning(network: nn.Module, example: Tensor, removed: float) -> nn.Module:
    """Channels of all layers, in groups, by their magnitude."""
    import torch_pruning as tp

    small = copy.deepcopy(network)
    last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        small,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=removed,
        ignored_layers=last,
    )
    pruner.step()
    return small


PEERS: dict[str, tuple[str, Peer]] = {
    "fasterai": ("fasterai", fasterai_tucker),
    "tltorch": ("tensorly-torch", tltorch_tucker),
    "Torch-Pruning": ("torch-pruning", torch_pruning),
}


def macs(network: nn.Module, example: Tensor) -> int:
    """Return multiply-accumulates, half of what torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example)
    return counter.get_total_flops() // 2


def at_share(peer: Peer, network: nn.Module, example: Tensor, share: float) -> nn.Module:
    """Return a peer's network with at most that share of the MACs, by bisection of its knob."""
    whole = macs(network, example)
    low, high = 0.0, 0.98
    best = None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = peer(network, example, middle).eval()
        if macs(found, example) <= share * whole:
            best, high = found, middle
        else:
            low = middle
    if best is None:
        raise ValueError(f"no setting leaves {share:.0%} of the MACs")
    return best


# ---------------------------------------------------------------- ours


class Ours:
    """Our networks, of one survey."""

    def __init__(self, network: nn.Module, data: Data, args: argparse.Namespace) -> None:
        subject = SUBJECTS[args.subject]
        examples = args.examples or subject.examples
        self.network = network
        self.calibration = CalibrationData(data.train.take(examples, 0), data.name, 0)
        runtime = args.runtime if args.equal_divergence else None
        with progress("options") as update:
            self.planner = Planner(
                network, self.calibration, runtime=runtime, num_threads=1, progress=update
            )
        self._made: dict[float, nn.Module | None] = {}

    def at_share(self, share: float) -> nn.Module:
        """Return a network with that share of the MACs."""
        made = self.planner.plan([f"macs={100 * share:g}%"])
        return apply(self.network, made, self.calibration)

    def by_time(self, shares: Sequence[float]) -> Iterator[tuple[float, nn.Module]]:
        """Yield networks with those shares of the time, as long as they can be reached."""
        for share in shares:
            if share not in self._made:
                self._made[share] = self._within(share)
            small = self._made[share]
            if small is None:
                return
            yield share, small

    def _within(self, share: float) -> nn.Module | None:
        try:
            made = self.planner.plan([f"latency={share:g}%"])
        except OneByOneError:
            return None
        return apply(self.network, made, self.calibration)


# ---------------------------------------------------------------- rows


def compared(args: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """Return a line for each network, and what is to be said below."""
    subject = SUBJECTS[args.subject]
    network, data = subject.network().eval(), subject.data()
    example = torch.zeros(1, *data.input_shape)
    notes = []
    ours = Ours(network, data, args)
    rows = []
    for share in args.macs:
        found: dict[str, nn.Module] = {}
        for name, (package, peer) in PEERS.items():
            try:
                version = importlib.metadata.version(package)
                found[f"{name} {version}"] = at_share(peer, network, example, share / 100)
            except Exception as error:  # noqa: BLE001 - whatever a peer fails by is said
                notes.append(f"{name} at {share:g} %: {type(error).__name__}: {error}")
        if not args.equal_divergence:
            found["onebyone"] = ours.at_share(share / 100)
        if args.epochs:
            found = {
                name: distill(small, data, teacher=network, epochs=args.epochs, seed=0).model
                for name, small in found.items()
            }
        rows += _rows(network, found, data, share=share, args=args, ours=ours)
    return rows, list(dict.fromkeys(notes))


def _rows(
    network: nn.Module,
    found: dict[str, nn.Module],
    data: Data,
    *,
    share: float,
    args: argparse.Namespace,
    ours: Ours,
) -> list[list[str]]:
    metric = SUBJECTS[args.subject].metric
    both = score([network, *found.values()], data.test, metric=metric)
    divergences = dict(zip(found, both.divergences[1:], strict=True))
    lines = []
    for (name, small), after in zip(found.items(), both.each[1:], strict=True):
        loss, same = paired_difference(both.each[0], after), agreement(both.each[0], after)
        line = [
            f"{share:g} %",
            name,
            f"{100 * macs(small, torch.zeros(1, *data.input_shape)) / _macs(network, data):.1f} %",
            f"{after.summary()}",
            f"{loss.value:+.4f} [{loss.low:+.4f} … {loss.high:+.4f}]",
            "–" if same is None else f"{same.value:.3f}",
            f"{divergences[name]:.4g}",
            _time(network, small, data, args.runtime),
        ]
        if args.equal_divergence:
            line.append(
                _at_equal_divergence(
                    network, small, data, least=divergences[name], args=args, ours=ours
                )
            )
        lines.append(line)
    return lines


def _macs(network: nn.Module, data: Data) -> int:
    return macs(network, torch.zeros(1, *data.input_shape))


def _time(before: nn.Module, after: nn.Module, data: Data, runtime: str) -> str:
    """Return the share of the time, in interleaved rounds, or why there is none."""
    example = torch.randn(1, *data.input_shape)
    prepare = find_runtime(runtime).prepare
    with threads(1):
        try:
            both = {"after": prepare(after, example), "before": prepare(before, example)}
        except OneByOneError as error:
            return f"not in {runtime}: {str(error)[:60]}"
        ratio = interleave(both, rounds=ROUNDS).ratio("after", "before")
    return f"{100 * ratio.value:.1f} % [{100 * ratio.low:.1f}–{100 * ratio.high:.1f}]"


def _at_equal_divergence(
    network: nn.Module,
    peer: nn.Module,
    data: Data,
    *,
    least: float,
    args: argparse.Namespace,
    ours: Ours,
) -> str:
    """Return how many times faster ours is than a peer's at no more divergence."""
    best: tuple[float, nn.Module, float] | None = None
    for share, small in ours.by_time(args.shares):
        found = score([network, small], data.test, metric=SUBJECTS[args.subject].metric)
        if found.divergences[1] > least:
            break
        best = share, small, found.divergences[1]
    if best is None:
        return "none of ours diverges less"
    example = torch.randn(1, *data.input_shape)
    prepare = find_runtime(args.runtime).prepare
    with threads(1):
        try:
            theirs = prepare(peer, example)
        except OneByOneError:
            return f"{args.runtime} cannot run the peer's"
        ratio = interleave(
            {"peer": theirs, "ours": prepare(best[1], example)}, rounds=ROUNDS
        ).ratio("peer", "ours")
    return f"{ratio} at divergence {best[2]:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=[name for name in SUBJECTS if name != "dncnn"])
    parser.add_argument("--macs", nargs="+", type=float, default=[60, 50], help="in percent")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--examples", type=int, help="calibration inputs of ours")
    parser.add_argument("--epochs", type=int, default=0, help="of distilling all alike")
    parser.add_argument("--equal-divergence", action="store_true")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[80, 70, 60, 52, 46, 40], help="of the time"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, notes = compared(args)
    equal = (">faster at equal divergence",) if args.equal_divergence else ()
    trained = f"after {args.epochs} epochs of distilling" if args.epochs else "without training"
    print_table(
        Table(
            columns=(
                ">MACs asked", "by", ">MACs", ">accuracy", ">change", ">agreement",
                ">divergence", f">time in {args.runtime}", *equal,
            ),
            rows=rows,
            title=f"{args.subject} by its peers and by us, {trained}",
            notes=[*notes, f"1 thread, batch 1. {describe_machine('cpu')}."],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
