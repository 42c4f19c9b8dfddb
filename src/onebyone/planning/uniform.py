"""The same share of its ranks for every layer: a plan that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from onebyone.core.arguments import checked
from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.records import LayerCost, LeftAlone, Option, Plan, Step
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.units import format_percent
from onebyone.networks.examples import as_inputs, inputs_of
from onebyone.networks.surgery import as_network, check_finite, module_at
from onebyone.planning.applicability import is_site, left_alone, reasons
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.registry import cost_before
from onebyone.rewrites.steps import cost_of

# Of the forms that a layer can take, the first that pays.
PREFERRED = ("tucker2", "reduce", "expand", "spatial", "spatial-expand", "pair")


@checked
@ordinary_torch()
def uniform_plan(
    model: nn.Module,
    inputs: Inputs | tuple[int, ...],
    *,
    ranks: float = 0.5,
    form: str = "auto",
    leave: Sequence[str] = (),
    name: str | None = None,
) -> Plan:
    """Factorize every layer to the same share of its full ranks, without data.

    A layer is left alone, with the reason, where that share of its ranks is not below break-even,
    in parameters and in MACs. With ``ranks=1`` break-even is not asked for: the rewritten network
    is then the same function, which is what that is good for.

    Args:
        model: Not modified.
        inputs: An input: its shape with the batch in front, a tensor, a tuple of arguments, or
            keyword arguments.
        ranks: Above 0 and at most 1. The full ranks of ``reduce`` are the input channels, of
            ``expand`` the output channels, of ``tucker2`` both, of ``pair`` the fewer of both; of
            ``spatial`` the input channels times the kernel's height or the output channels times
            its width, whichever is less, of ``spatial-expand`` these and the output channels.
        form: One of these, for the layers that can take it; ``auto``: ``tucker2`` for k×k kernels,
            or the first form that pays, and ``pair`` for 1×1 and linear layers.
        leave: Names of modules to leave alone, with all inside them.
        name: What to call the network; its class by default.

    Returns:
        A plan whose harm is not known; :func:`onebyone.apply` carries it out from the kernels
        alone or, far better, with calibration data.

    Raises:
        OptionError: If ``ranks`` is not above 0 and at most 1, or ``leave`` names no module.
        UnknownNameError: If there is no such form.
        ModelError: If the network cannot be copied or run on that input.
        WeightsError: If a weight is not finite.
    """
    if not 0 < ranks <= 1:
        raise OptionError(f"`ranks` must be a share above 0 and at most 1, got {ranks}.")
    if form not in ("auto", *PREFERRED):
        raise UnknownNameError("form", form, ("auto", *PREFERRED))
    model = as_network(model)
    check_finite(model)
    leave = left_alone(model, leave)
    example = as_inputs(model, inputs)
    costs = trace_layers(model, example)
    why = reasons(model, example, costs, leave)
    choices: list[Option] = []
    for layer in costs.layers:
        module = module_at(model, layer.name)
        if layer.name in why or not is_site(layer, module):
            continue
        found = _option(layer, module, ranks, PREFERRED if form == "auto" else (form,))
        if isinstance(found, Option):
            choices.append(found)
        else:
            why[layer.name] = found
    before = after = costs.cost
    for option in choices:
        after = after - option.saved
    order = {layer.name: place for place, layer in enumerate(costs.layers)}
    return Plan(
        network=name or type(model).__name__,
        inputs=inputs_of(model, example),
        budgets=(),
        before=before,
        after=after,
        choices=tuple(choices),
        left_alone=tuple(
            LeftAlone(site=site, reason=why[site]) for site in sorted(why, key=order.__getitem__)
        ),
    )


def _option(
    layer: LayerCost, module: nn.Module, share: float, forms: Sequence[str]
) -> Option | str:
    """Return the first form that pays at that share of its ranks, or why there is none."""
    refusal = factorize.why_not(module)
    if refusal is not None:
        return refusal
    own = factorize.forms_of(module)
    allowed = [form for form in forms if form in own]
    if not allowed:
        return f"has no form {forms[0]!r}, only {', '.join(own)}"
    before = cost_before(module, layer)
    for form in allowed:
        ranks = [max(1, round(share * full)) for full in factorize.full_ranks(module, form)]
        steps = (Step(rewrite="factorize", settings={"form": form, "ranks": ranks}),)
        after = cost_of(module, layer, steps)
        if share == 1 or (after.macs < before.macs and after.params < before.params):
            return Option(
                site=layer.name,
                steps=steps,
                before=before,
                after=after,
                occupies=(layer.name,),
            )
    return f"{format_percent(share, 0)} of its ranks would not save parameters and MACs"
