"""What every rewrite of a layer, or of a group of layers, must do, checked on small ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onebyone.core.arguments import checked
from onebyone.core.contracts import failing_as, hold
from onebyone.core.records import Settings, Step
from onebyone.networks.conv_layers import is_linear
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.rewrites.group_contract import check_group_rewrite
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.registry import (
    GROUP_METHODS,
    METHODS,
    GroupRewrite,
    LayerRewrite,
    missing_of,
)
from onebyone.rewrites.steps import roughly_fitted

# A fit in float64 whose relative squared error is below this is the same function.
_EXACT = 1e-20
_SAME = 1e-8
# What `errors` promises without building may be this much better than what `fit` reaches.
_PROMISE = 1.5
_NOISE = 1e-9


@dataclass(frozen=True)
class _Case:
    name: str
    layer: nn.Module
    example: Tensor
    site: nn.Module  # the layer that it was before any step


@dataclass(frozen=True)
class _Option:
    settings: Settings
    error: float  # promised


def _cases() -> Iterator[_Case]:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d, nn.Linear
    layers: tuple[tuple[str, nn.Module, tuple[int, ...]], ...] = (
        ("a 3×3 convolution", conv(8, 12, 3, padding=1), (8, 9, 7)),
        ("a strided convolution without bias", conv(6, 8, 3, stride=2, bias=False), (6, 11, 9)),
        ("a dilated convolution", conv(6, 6, 3, dilation=2, padding=2), (6, 8, 8)),
        ("a 5×3 convolution", conv(4, 10, (5, 3), padding=(2, 1)), (4, 8, 9)),
        ("a convolution that pads by reflection", _reflecting(), (6, 8, 8)),
        ("a grouped convolution", conv(8, 8, 3, groups=2, padding=1), (8, 6, 6)),
        ("a depthwise convolution", conv(8, 8, 3, groups=8, padding=1), (8, 6, 6)),
        ("a 1×1 convolution", conv(12, 10, 1), (12, 5, 5)),
        ("a transposed convolution", nn.ConvTranspose2d(6, 8, 2, stride=2), (6, 5, 5)),
        ("a 1-D convolution", nn.Conv1d(6, 8, 3, padding=1), (6, 10)),
        ("a 3-D convolution", nn.Conv3d(4, 6, 3, padding=1), (4, 5, 4, 5)),
        ("a linear layer", linear(14, 11), (14,)),
        ("a layer of zeros", _zeros(), (6, 6, 6)),
    )
    for name, layer, shape in layers:
        made = layer.double().eval()
        yield _Case(name, made, torch.randn(3, *shape, dtype=torch.float64), made)
    yield _after_a_step()


def _after_a_step() -> _Case:
    site = nn.Conv2d(6, 8, 3, padding=1).double().eval()
    step = Step(rewrite="factorize", settings={"form": "tucker2", "ranks": [4, 5]})
    chain = roughly_fitted(site, [step], problems_of(site))
    example = torch.randn(3, 6, 7, 6, dtype=torch.float64)
    return _Case("what `factorize` makes of a 3×3 convolution", chain, example, site)


def _reflecting() -> nn.Module:
    return nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")


def _zeros() -> nn.Module:
    layer = nn.Conv2d(6, 6, 3, padding=1)
    nn.init.zeros_(layer.weight)
    return layer


@checked
def check_rewrite(rewrite: LayerRewrite | GroupRewrite, *, name: str) -> None:
    """Check that a rewrite of a layer, or of a group of layers, does what every such one must.

    Of one layer:

    - It takes a layer, or what another rewrite made of one, or says in words why not; what is no
      layer of weights it does not take.
    - The layer that it is given stays as it was.
    - Its options cost what they say: parameters, bytes of weights, and MACs as torch counts them.
    - Its result has the layer's output shape, and fresh structure + saved weights give the result.
    - The errors that it promises are not far better than those that its fit reaches.
    - Where a fit has no error, or the rewrite says that an option is exact, the result is the same
      function.

    Of a group of layers that share channels, on networks that have such groups and one that has
    none:

    - It finds groups, with a reason in words for each that it does not take.
    - The network that it is given to look at stays as it was.
    - Its options save what they say: parameters, bytes of weights, and MACs as torch counts them.
    - Its stand-ins, and fresh structure + saved weights, give what the carried-out option gives.
    - The error that it promises is not far better than the one that is reached.
    - With all channels (`channels` in its settings), with no error, or where it says so, the result
      is the same function.
    - Settings that do not fit are refused by a :class:`PlanError` that names the group's site.

    Args:
        rewrite: A module or an object with the functions of
            :class:`onebyone.rewrites.registry.LayerRewrite` or
            :class:`onebyone.rewrites.registry.GroupRewrite`; the latter is known by its ``find``.
        name: What it is called in plans.

    Raises:
        ContractError: Naming the rewrite, the layer or network, and what does not hold.
    """
    of_group = callable(getattr(rewrite, "find", None))
    methods = GROUP_METHODS if of_group else METHODS
    missing = missing_of(rewrite, methods)
    hold(not missing, f"The rewrite {name!r} must have the functions {', '.join(methods)}")
    if of_group:
        check_group_rewrite(cast("GroupRewrite", rewrite), name)
    else:
        _check_layer_rewrite(cast("LayerRewrite", rewrite), name)


def _check_layer_rewrite(rewrite: LayerRewrite, name: str) -> None:
    for foreign in (nn.ReLU(), nn.BatchNorm2d(4), nn.Identity()):
        reason = rewrite.why_not(foreign)
        words = f"The rewrite {name!r} must say in words why it does not take a"
        hold(isinstance(reason, str) and bool(reason), f"{words} {type(foreign).__name__}")
    taken = 0
    for case in _cases():
        with failing_as(f"The rewrite {name!r} must take {case.name} or say why not"):
            taken += _check_case(rewrite, name, case)
    hold(taken > 0, f"The rewrite {name!r} must take at least one of the layers it is tried on")


def _check_case(rewrite: LayerRewrite, name: str, case: _Case) -> bool:
    must = f"The rewrite {name!r}, given {case.name}, must"
    reason = rewrite.why_not(case.layer)
    hold(reason is None or bool(reason), f"{must} say in words why it does not take it")
    if reason is not None:
        return False
    weights = {key: tensor.clone() for key, tensor in case.layer.state_dict().items()}
    options = rewrite.grid(case.layer)
    problems = problems_of(case.site)
    promised = rewrite.errors(problems, case.layer, options)
    hold(len(promised) == len(options), f"{must} give an error for each option")
    for index in sorted({0, len(options) // 2, len(options) - 1} if options else ()):
        option = _Option(options[index], promised[index])
        _check_option(rewrite, must, case, problems, option)
    kept = all(torch.equal(weights[key], now) for key, now in case.layer.state_dict().items())
    hold(kept, f"{must} not modify the layer")
    return bool(options)


def _check_option(
    rewrite: LayerRewrite,
    must: str,
    case: _Case,
    problems: Sequence[Problem],
    option: _Option,
) -> None:
    settings, promised = option.settings, option.error
    must = f"{must}, for {dict(settings)},"
    with torch.no_grad():
        wanted = case.layer(case.example)
    chain = rewrite.build(case.layer, settings, site="layer").double().eval()
    reached = rewrite.fit(chain, problems, settings, case.layer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        given = chain(case.example)
    hold(given.shape == wanted.shape, f"{must} give outputs of shape {tuple(wanted.shape)}")
    hold(bool(given.isfinite().all()), f"{must} give finite outputs")
    sizes = case.example.shape[2:], wanted.shape[2:]
    if is_linear(case.layer):
        sizes = case.example.shape[1:-1], wanted.shape[1:-1]
    cost = rewrite.cost(case.layer, settings, input_size=sizes[0], output_size=sizes[1])
    params = sum(each.numel() for each in chain.parameters())
    hold(cost.params == params, f"{must} say {params:,} parameters, not {cost.params:,}")
    held = weight_bytes(chain)
    hold(cost.bytes == held, f"{must} say {held:,} bytes of weights, not {cost.bytes:,}")
    macs = counter.get_total_flops() / 2 / len(case.example)
    hold(cost.macs == macs, f"{must} say {macs:,.0f} MACs, not {cost.macs:,}")
    hold(
        math.isfinite(promised) and promised >= 0 and reached <= _PROMISE * promised + _NOISE,
        f"{must} reach about the error that it promises, {promised:.3g}, not {reached:.3g}",
    )
    blank = rewrite.build(case.layer, settings, site="layer").double().eval()
    blank.load_state_dict(chain.state_dict())
    with torch.no_grad():
        again = blank(case.example)
    hold(torch.equal(again, given), f"{must} give the same from fresh structure + saved weights")
    if reached <= _EXACT or rewrite.is_exact(case.layer, settings):
        gap = float((given - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
        hold(
            gap <= _SAME,
            f"{must} be the same function where its error is 0 or it says so, got {gap:.2g}",
        )
