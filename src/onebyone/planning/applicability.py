"""Which rewrite applies to which site of a network, and else why not, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from onebyone.core.arguments import checked
from onebyone.core.errors import PlanError
from onebyone.core.records import LayerCost, Record
from onebyone.core.tables import Table
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.dataflow import find_neighbours
from onebyone.networks.examples import as_inputs
from onebyone.networks.plain_layers import why_not_its_class
from onebyone.networks.surgery import aliases, as_network, module_at, parameter_owners
from onebyone.profiling.trace import LayerCosts, trace_layers
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.plain import why_not_plain
from onebyone.rewrites.registry import group_rewrites, layer_rewrites

HEAD = "(head)"


@dataclass(frozen=True, kw_only=True)
class SiteRewrite(Record):
    """Whether a rewrite applies to a site.

    Attributes:
        site: Name of the layer, or ``(head)`` for a head that was not found.
        reason: Why it does not apply, in words; ``None`` where it does.
    """

    site: str
    kind: str
    rewrite: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Applicability(Record):
    """Each site of a network with each rewrite that could be thought of there."""

    network: str
    sites: tuple[SiteRewrite, ...]

    def table(self) -> Table:
        """Return a line for each site and rewrite."""
        rows = [[s.site or "(root)", s.kind, s.rewrite, s.reason or "applies"] for s in self.sites]
        count = sum(s.reason is None for s in self.sites)
        return Table(
            columns=("site", "kind", "rewrite", "applies, or why not"),
            rows=rows,
            title=f"Rewrites of {self.network}",
            notes=[f"{count} of {len(rows)} apply."],
        )

    def __str__(self) -> str:
        return str(self.table())


@checked
@ordinary_torch()
def applies(model: nn.Module, inputs: Inputs | tuple[int, ...]) -> Applicability:
    """Tell for each site of a network which rewrites apply to it, and else why not.

    Args:
        model: Not modified; copies in evaluation mode are run.
        inputs: An input: its shape with the batch in front, a tensor, a tuple of arguments, or
            keyword arguments.

    Raises:
        ModelError: If the network cannot be copied or run on that input.
    """
    model = as_network(model)
    example = as_inputs(model, inputs)
    costs = trace_layers(model, example)
    obstacles = _obstacles(model, example, costs)
    sites = []
    for layer in costs.layers:
        module = module_at(model, layer.name)
        if not is_site(layer, module):
            continue
        for name, rewrite in layer_rewrites().items():
            reason = obstacles.get(layer.name) or rewrite.why_not(module)
            site = SiteRewrite(site=layer.name, kind=layer.kind, rewrite=name, reason=reason)
            sites.append(site)
    sites += _group_rewrites(model, example)
    sites += _head_rewrites(model, example)
    return Applicability(network=type(model).__name__, sites=tuple(sites))


def _group_rewrites(model: nn.Module, example: Inputs) -> Iterator[SiteRewrite]:
    for name, rewrite in group_rewrites().items():
        found = rewrite.find(model, example)
        reasons: dict[str, str | None] = {group.site: None for group in found.groups}
        reasons.update(found.reasons)
        for site in (each for each, _ in model.named_modules() if each in reasons):
            yield SiteRewrite(site=site, kind="group", rewrite=name, reason=reasons[site])


def _head_rewrites(model: nn.Module, example: Inputs) -> Iterator[SiteRewrite]:
    found = head.of_inputs(model, example)
    if isinstance(found, head.NoHead):
        yield SiteRewrite(site=HEAD, kind="head", rewrite="head", reason=found.reason)
        return
    for form in head.FORMS:
        reason = head.why_not(found, form) or _why_not_same(model, example, found, form)
        yield SiteRewrite(site=found.name, kind="head", rewrite=f"head {form}", reason=reason)


def _why_not_same(model: nn.Module, example: Inputs, site: head.HeadSite, form: str) -> str | None:
    """Return why the head is not the same function in a form that is to keep it, or ``None``."""
    if form != "exact":
        return None
    assert isinstance(example, Tensor)
    try:
        head.rewrite(model, example, name=site.name, form=form, hidden=[])
    except PlanError as error:
        return str(error).rstrip(".")
    return None


# ---------------------------------------------------------------- layers and their reasons


def is_site(layer: LayerCost, module: nn.Module) -> bool:
    """Whether a layer multiplies, or would if it ran."""
    computes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))  # noqa: SLF001
    return bool(layer.macs) or computes


def left_alone(network: nn.Module, names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of modules to leave alone, each checked to be there.

    Raises:
        OptionError: If the network has no module of a name: it would be rewritten all the same.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    for name in asked:
        module_at(network, name)
    return asked


def reasons(
    network: nn.Module, inputs: Inputs, costs: LayerCosts, leave: Sequence[str] = ()
) -> dict[str, str]:
    """Return the layers that no rewrite of one layer by itself takes, each with the reason.

    Args:
        network: Not modified; a copy in evaluation mode is run.
        inputs: That it was traced on.
        costs: Its layers.
        leave: Names of modules to leave alone, with all inside them.
    """
    obstacles = _obstacles(network, inputs, costs)
    found: dict[str, str] = {}
    for layer in costs.layers:
        module = module_at(network, layer.name)
        if not is_site(layer, module):
            continue
        reason: str | None = "left alone as asked"
        if not is_left(layer.name, leave):
            reason = obstacles.get(layer.name) or _refusal(module)
        if reason is not None:
            found[layer.name] = reason
    return found


def is_left(name: str, leave: Sequence[str]) -> bool:
    """Whether a module is one of those to leave alone, or inside one."""
    return any(name == each or name.startswith(f"{each}.") for each in leave)


def _obstacles(network: nn.Module, inputs: Inputs, costs: LayerCosts) -> dict[str, str]:
    """Return why no rewrite of a layer by itself would be right, whatever the layer is."""
    tied = _tied(network, inputs)
    found: dict[str, str] = {}
    free = []
    for layer in costs.layers:
        module = module_at(network, layer.name)
        reason = _obstacle(layer, module, tied)
        if reason is not None:
            found[layer.name] = reason
        elif is_site(layer, module) and _refusal(module) is None:
            free.append(layer.name)
    return found | why_not_plain(network, inputs, free)


def _refusal(module: nn.Module) -> str | None:
    refusals = [rewrite.why_not(module) for rewrite in layer_rewrites().values()]
    return None if None in refusals else refusals[0]


def _tied(network: nn.Module, inputs: Inputs) -> dict[int, str]:
    """Return, by identity, the modules that are, hold or lend what others use too, and how."""
    owners = parameter_owners(network)
    tied = {
        id(module): "its weight is shared with another layer"
        for module in network.modules()
        if any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
    }
    for name, others in aliases(network).items():
        if len(others) > 1:
            tied[id(module_at(network, name))] = f"shared: the same layer as {others[1]!r}"
    for name, reader in find_neighbours(network, inputs).read_elsewhere.items():
        where = repr(reader) if reader else "the network"
        tied.setdefault(id(module_at(network, name)), f"its weight is read by {where} itself")
    return tied


def _obstacle(layer: LayerCost, module: nn.Module, tied: Mapping[int, str]) -> str | None:
    """Return why no rewrite of this layer by itself would be right, whatever the layer is."""
    if id(module) in tied:
        return tied[id(module)]
    if layer.calls == 0:
        return "does not run on this input"
    if layer.calls > 1 and not _keeps_size(layer, module):
        return f"runs {layer.calls} times in one pass, and changes the size of its input"
    return why_not_its_class(module) if is_site(layer, module) else None


def _keeps_size(layer: LayerCost, module: nn.Module) -> bool:
    """Whether a layer gives as many positions as it is given, whatever these are.

    If so, a rewrite saves the same share of the layer's cost in each call, even if the calls differ
    in size, as with the maps of a feature pyramid.
    """
    if isinstance(module, nn.Linear):
        return True
    return not layer.macs or layer.input_shape[1:] == layer.output_shape[1:]
