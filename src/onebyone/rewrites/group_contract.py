"""What every rewrite of a group of layers must do, checked on small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onebyone.calibration.collect import collect
from onebyone.core.contracts import failing_as, hold
from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, LayerCost, Settings
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.surgery import module_at, replace_module
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.registry import GroupRewrite

# A fit in float64 whose relative squared error is below this is the same function.
_EXACT = 1e-20
_SAME = 1e-8
# What `error` promises without building may be this much better than what is reached.
_PROMISE = 1.5
_NOISE = 1e-9


@dataclass(frozen=True)
class _Case:
    name: str
    network: nn.Module
    example: Tensor


@dataclass(frozen=True)
class _Scene:
    """A group in its network, with what is known of both.

    Attributes:
        rewrite: Which is checked.
        must: Whom a message is about.
        case: Not modified.
        group: The layers.
        layers: The network's, by name.
        problems: Of each reader.
    """

    rewrite: GroupRewrite
    must: str
    case: _Case
    group: ChannelGroup
    layers: dict[str, LayerCost]
    problems: tuple[Problem, ...]

    def work(self) -> nn.Module:
        """Return a network that may be modified."""
        return copy.deepcopy(self.case.network)

    def cost(self, settings: Settings | None) -> Cost:
        """Return what the rewrite says that the group's modules cost."""
        return self.rewrite.cost(self.case.network, self.group, self.layers, settings)


class _Fork(nn.Module):
    """Two layers read the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 5, 1)
        self.right = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first(x).relu()
        out: Tensor = self.left(seen) + self.right(seen)
        return out


def _cases() -> Iterator[_Case]:
    torch.manual_seed(0)
    conv, chain = nn.Conv2d, nn.Sequential
    networks: tuple[tuple[str, nn.Module, tuple[int, ...]], ...] = (
        (
            "two convolutions with a batch norm between them",
            chain(conv(3, 8, 3, padding=1, bias=False), _norm(8), nn.ReLU(), conv(8, 5, 3)),
            (3, 7, 6),
        ),
        (
            "a depthwise convolution between two 1×1 convolutions",
            chain(
                *(conv(4, 6, 1), nn.ReLU6(), conv(6, 6, 3, padding=1, groups=6), nn.ReLU6()),
                conv(6, 4, 1),
            ),
            (4, 6, 6),
        ),
        ("a convolution that two others read", _Fork(), (4, 6, 5)),
        (
            "a linear layer on a flattened map",
            chain(conv(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)),
            (3, 8, 8),
        ),
        ("two linear layers", chain(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 3)), (7,)),
        (
            "a layer of which half of the channels are dead",
            chain(_half_dead(conv(3, 8, 3)), nn.ReLU(), conv(8, 4, 3)),
            (3, 8, 8),
        ),
        ("a network without such a group", chain(conv(3, 4, 3), nn.ReLU()), (3, 6, 6)),
    )
    for name, network, shape in networks:
        made = network.double().eval()
        yield _Case(name, made, torch.randn(48, *shape, dtype=torch.float64))


def _norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    return norm


def _half_dead(layer: nn.Conv2d) -> nn.Conv2d:
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight[::2] = 0
        layer.bias[::2] = 0
    return layer


def check_group_rewrite(rewrite: GroupRewrite, name: str) -> None:
    """Check that a rewrite of groups does what every such rewrite must.

    Raises:
        ContractError: Naming the rewrite, the network and what does not hold.
    """
    taken = 0
    for case in _cases():
        with failing_as(f"The rewrite {name!r} must take {case.name} or say why not"):
            taken += _check_case(rewrite, name, case)
    hold(taken > 0, f"The rewrite {name!r} must take at least one of the networks it is tried on")


def _check_case(rewrite: GroupRewrite, name: str, case: _Case) -> int:
    must = f"The rewrite {name!r}, given {case.name}, must"
    weights = {key: tensor.clone() for key, tensor in case.network.state_dict().items()}
    text = str(case.network)
    found = rewrite.find(case.network, case.example[:2])
    words = all(found.reasons.values())
    hold(words, f"{must} say in words why it does not take a group")
    names = dict(case.network.named_modules())
    strange = [each for each in found.reasons if each not in names]
    hold(not strange, f"{must} give its reasons by names of modules, not {strange}")
    if found.groups:
        reason = rewrite.why_other(case.network, case.example[:2], found.groups)
        hold(reason is None, f"{must} find no reason against the groups that it found: {reason}")
    layers = {layer.name: layer for layer in trace_layers(case.network, case.example[:1]).layers}
    taken = 0
    for group in found.groups:
        readers = list(group.readers)
        moments = collect(case.network, readers, lambda: iter([case.example]))
        problems = tuple(
            problem
            for reader in readers
            for problem in problems_of(module_at(case.network, reader), moments[reader])
        )
        scene = _Scene(rewrite, must, case, group, layers, problems)
        taken += _check_group(scene)
    kept = case.network.state_dict()
    same = kept.keys() == weights.keys() and all(torch.equal(weights[k], kept[k]) for k in kept)
    hold(same and str(case.network) == text, f"{must} not modify the network")
    return taken


def _check_group(scene: _Scene) -> bool:
    rewrite, group, must = scene.rewrite, scene.group, scene.must
    options = rewrite.grid(group)
    if not options:
        return False
    counted = _counted_modules(scene)
    said = scene.cost(None)
    hold(said == counted, f"{must} say what the group costs as it is, {counted}, not {said}")
    places = sorted({0, len(options) // 2, len(options) - 1})
    chosen = [options[place] for place in places]
    if "channels" in options[0]:
        whole = {**options[0], "channels": group.channels}
        exact = rewrite.is_exact(group, whole)
        hold(exact, f"{must} keep the function with all {group.channels} channels")
        chosen.append(whole)
    for settings in chosen:
        _check_option(scene, settings)
    if options[0]:
        _check_refusal(scene)
    return True


def _counted_modules(scene: _Scene) -> Cost:
    """Return what the modules of a group cost as they are."""
    total = Cost(params=0, macs=0, bytes=0)
    for name in scene.group.members:
        module = module_at(scene.case.network, name)
        params = sum(each.numel() for each in module.parameters())
        macs = scene.layers[name].macs if name in scene.layers else 0
        total = total + Cost(params=params, macs=macs, bytes=weight_bytes(module))
    return total


def _check_option(scene: _Scene, settings: Settings) -> None:
    rewrite, group, case = scene.rewrite, scene.group, scene.case
    must = f"{scene.must} for {dict(settings)}"
    wanted = _outputs(case.network, case.example)
    fits = rewrite.fits(scene.work(), group, scene.problems)
    promised = fits.error(settings)
    stand_ins = fits.stand_ins(settings)
    hold(
        bool(stand_ins) and set(stand_ins) <= set(group.readers),
        f"{must} give stand-ins of the group's readers, not {sorted(stand_ins)}",
    )
    new, reached = fits.carried_out(settings)
    new = new.double().eval()
    given = _outputs(new, case.example)
    hold(given.shape == wanted.shape, f"{must} give outputs of shape {tuple(wanted.shape)}")
    hold(bool(given.isfinite().all()), f"{must} give finite outputs")
    _check_cost(scene, settings, new, must)
    hold(
        promised >= 0 and 0 <= reached <= _PROMISE * promised + _NOISE,
        f"{must} reach about the error that it promises, {promised:.3g}, not {reached:.3g}",
    )
    standing = scene.work()
    for name, module in stand_ins.items():
        standing = replace_module(standing, name, module)
    gap = _gap(_outputs(standing.double().eval(), case.example), given)
    hold(gap <= _SAME, f"{must} give the same from its stand-ins as carried out, got {gap:.2g}")
    blank = rewrite.build(scene.work(), group, settings).double().eval()
    blank.load_state_dict(new.state_dict())
    again = _outputs(blank, case.example)
    hold(torch.equal(again, given), f"{must} give the same from fresh structure + saved weights")
    if reached <= _EXACT or rewrite.is_exact(group, settings):
        gap = _gap(given, wanted)
        hold(
            gap <= _SAME,
            f"{must} be the same function where its error is 0 or it says so, got {gap:.2g}",
        )


def _check_cost(scene: _Scene, settings: Settings, new: nn.Module, must: str) -> None:
    """Check that the network costs as much less as the rewrite says of the group."""
    saved = scene.cost(None) - scene.cost(settings)
    before, after = (_counted(each, scene.case.example[:1]) for each in (scene.case.network, new))
    for what, said, counted in (
        ("parameters", saved.params, before.params - after.params),
        ("bytes of weights", saved.bytes, before.bytes - after.bytes),
        ("MACs", saved.macs, before.macs - after.macs),
    ):
        hold(said == counted, f"{must} save {counted:,} {what}, as counted, not {said:,}")


def _counted(network: nn.Module, example: Tensor) -> Cost:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    return Cost(
        params=sum(each.numel() for each in network.parameters()),
        macs=counter.get_total_flops() // 2,
        bytes=weight_bytes(network),
    )


def _check_refusal(scene: _Scene) -> None:
    """Check that settings that do not fit are refused with the group's name."""
    group = scene.group
    asked: Sequence[Callable[[], object]] = (
        lambda: scene.rewrite.is_exact(group, {}),
        lambda: scene.rewrite.build(scene.work(), group, {}),
    )
    for ask in asked:
        try:
            ask()
        except PlanError as error:
            said = str(error)
        else:
            said = "nothing was raised"
        hold(
            repr(group.site) in said,
            f"{scene.must} refuse settings that do not fit by a PlanError that names "
            f"{group.site!r}, got: {said}",
        )


def _outputs(network: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network(example)
    return outputs


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
