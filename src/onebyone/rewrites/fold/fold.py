"""Exact layer fusion on a copy of a network: all that can be folded, or what a plan says.

A batch norm in evaluation is one multiplication and one addition a channel, which the convolution
before it, or often the one after it, can do as well; and two convolutions with nothing between, one
of them 1×1, are one convolution. The function stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from onebyone.core.arguments import checked
from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, Option, Plan, Settings
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import as_inputs
from onebyone.networks.surgery import (
    as_network,
    check_finite,
    copy_network,
    evaluation_copy,
)
from onebyone.rewrites.equivalence import plan_of
from onebyone.rewrites.fold.carry_out import carried_out, carry_out, ordered
from onebyone.rewrites.fold.find import find_with_steps
from onebyone.rewrites.fold.scene import FORMS, Fold, Scene, look_at, why_not


def rewrite(
    network: nn.Module,
    example: Inputs,
    *,
    site: str,
    settings: Settings,
    structure_only: bool = False,
) -> nn.Module:
    """Return a copy of a network with one fold carried out.

    Args:
        network: Not modified.
        example: An input that it is run on, to see which layer feeds which.
        site: The module that disappears.
        settings: ``form``, one of :data:`FORMS`, and ``into``, the layer that takes it in.
        structure_only: The network's weights are loaded later, so a fold is not refused because of
            its present weights.

    Raises:
        PlanError: If the fold does not fit the network; says why.
        ModelError: If the network cannot be run.
    """
    nothing = Cost(params=0, macs=0, bytes=0)
    option = Option.of("fold", settings, site=site, before=nothing, after=nothing)
    return rewrite_all(network, example, [option], structure_only=structure_only)


def rewrite_all(
    network: nn.Module,
    example: Inputs,
    options: Sequence[Option],
    *,
    structure_only: bool = False,
) -> nn.Module:
    """Return a copy of a network with folds carried out one after the other.

    Far faster than one by one: the network is only run again where a fold builds on another.

    Args:
        network: Not modified.
        example: An input that it is run on.
        options: Read for ``site`` and the settings of the first step, in this order.
        structure_only: As for :func:`rewrite`.

    Raises:
        PlanError: If a fold does not fit the network; says why.
        ModelError: If the network cannot be run.
    """
    work = copy_network(network)
    scene: Scene | None = None
    touched: set[str] = set()
    for option in options:
        fold = _read(work, option)
        if scene is None or touched & {fold.site, fold.into}:
            scene = look_at(evaluation_copy(work), example, values=not structure_only)
            touched = set()
        reason = why_not(scene, fold)
        if reason is not None:
            raise PlanError(
                f"The plan's site {fold.site!r} cannot be folded into {fold.into!r}: {reason}."
            )
        work = carry_out(work, ordered(scene, fold))
        # A chain of factors of which one is left gives it its own name.
        touched |= {fold.site, fold.into, fold.into.rpartition(".")[0]}
    return work


def _read(network: nn.Module, option: Option) -> Fold:
    form, into = option.first.settings.get("form"), option.first.settings.get("into")
    if form not in FORMS or not isinstance(into, str):
        raise PlanError(
            f"The settings of {option.site!r} must have a `form`, one of {', '.join(FORMS)}, and "
            f"`into`, the name of a layer, got {option.first.settings}."
        )
    for name in (option.site, into):
        try:
            network.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"The plan's site {name!r} must be a layer of the network, but {error}."
            ) from error
    return Fold(str(form), option.site, into)


@checked
@ordinary_torch()
def fold(
    model: nn.Module, example: Inputs | tuple[int, ...], *, name: str | None = None
) -> tuple[nn.Module, Plan]:
    """Return a smaller network of the same function: all that can be folded is.

    Batch norms go into the convolutions and linear layers next to them, and 1×1 convolutions into
    those that they follow or feed where that costs no more. The function is that of evaluation:
    a batch norm that is folded has its running statistics for ever, also when the network is then
    trained. What is left alone, and why, is in the plan, which can be printed, saved, and applied
    to the same network anywhere.

    Args:
        model: Not modified.
        example: A tensor ``(batch, …)``, a tuple of arguments, keyword arguments, or the shape of
            an input with the batch in front. The network is run on it to see which layer feeds
            which, and to compare the outputs before and after.
        name: What the plan calls the network; its class by default.

    Returns:
        A new network, in the mode of the old one, module by module; and the plan.

    Raises:
        ModelError: If the network cannot be copied or run on the example.
        WeightsError: If a weight is not finite: then nothing can be compared.
        OptionError: If a shape has a size that is not positive.

    References:
        Ioffe, Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.1: in inference it
        is a linear transform.

    Examples:
        >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> network, plan = fold(chain, (1, 3, 5, 7))
        >>> network
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    model = as_network(model)
    check_finite(model)
    inputs = as_inputs(model, example)
    found, left_alone = find_with_steps(model, inputs)
    options = [option for option, _ in found]
    plan = plan_of(model, inputs, options, left_alone, name=name)
    return carried_out(copy_network(model), [step for _, step in found]), plan
