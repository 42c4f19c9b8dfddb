"""What makes a network smaller for nothing: layers that follow one another become one.

A batch norm in evaluation is one multiplication and one addition a channel, which the convolution
before it, or often the one after it, can do as well; and two convolutions with nothing between, one
of them 1×1, are one convolution. The function stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from onebyone.errors import ModelError, OneByOneError, PlanError
from onebyone.kernels import (
    is_transposed,
    shape_of,
    why_unknown,
)
from onebyone.neighbours import Neighbours, neighbours_in
from onebyone.profiling import as_inputs
from onebyone.profiling.trace import trace_layers
from onebyone.randomness import seeded
from onebyone.records import Cost, LeftAlone, Option, Plan, Settings
from onebyone.rewrites.merging import (
    Merge,
    acts_in_place,
    affine_of,
    axes_of,
    is_batch_norm,
    merge_of,
    merged,
    rest_of,
    why_no_affine,
    why_uneven,
    with_affine,
)
from onebyone.rewrites.same import keeping, plan_of
from onebyone.sites import (
    Inputs,
    aliases,
    as_network,
    copy_network,
    device_of,
    evaluation_copy,
    has_hooks,
    hooks_removed,
    module_at,
    replace_module,
    run,
    tensors_in,
)

FORMS = {
    "norm-before": "a batch norm goes into the layer before it",
    "norm-after": "a batch norm goes into the layer after it",
    "merge": "two layers with nothing between become one",
}
# Largest difference of the outputs, relative to the largest output, that rounding may cause. The
# rules themselves are checked in float64, wherever the network runs in it.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
# The children of a chain that `factorize` makes.
_FACTORS = {"reduce", "spatial", "vertical", "horizontal", "expand"}
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001


# ---------------------------------------------------------------- what may be folded


@dataclass(frozen=True)
class _Fold:
    """One fold, by names.

    Attributes:
        form: One of :data:`FORMS`.
        site: The module that disappears.
        into: The layer that takes it in.
    """

    form: str
    site: str
    into: str


@dataclass(frozen=True)
class _Scene:
    """A network and what is known of which layer feeds which.

    Attributes:
        network: Run, never modified while the scene is looked at.
        names: First name -> all the names of that module.
        owners: Where a tensor's data is -> the modules that own such a tensor.
        hooked: Tensors that a module with hooks takes or returns -> that module.
        batch: Of the example.
        values: Whether weights count, or only structure.
    """

    network: nn.Module
    neighbours: Neighbours
    names: dict[str, tuple[str, ...]]
    owners: dict[int, list[str]]
    hooked: dict[int, str]
    batch: int
    values: bool

    def module(self, name: str) -> nn.Module:
        """Return a module."""
        return module_at(self.network, name)

    def in_order(self, fold: _Fold) -> tuple[str, str]:
        """Return the names of a fold's two modules in the order in which they run."""
        if fold.form == "norm-before":
            return fold.into, fold.site
        if fold.form == "norm-after":
            return fold.site, fold.into
        if self.neighbours.only_consumer(fold.into).name == fold.site:
            return fold.into, fold.site
        return fold.site, fold.into


def _look(network: nn.Module, example: Inputs, *, values: bool) -> _Scene:
    neighbours = neighbours_in(network, example)
    modules = dict(network.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.numel():
                owners.setdefault(tensor.data_ptr(), []).append(name)
    hooked = {
        place: call.module
        for call in neighbours.calls
        if has_hooks(modules[call.module])
        for place in (*call.inputs, *call.outputs)
    }
    batch = max(1, next((t.shape[0] for t in tensors_in(example) if t.ndim), 1))
    return _Scene(network, neighbours, aliases(network), owners, hooked, batch, values)


def _why_not(scene: _Scene, fold: _Fold) -> str | None:
    """Return why a fold would not be exact, or would disturb something, in words."""
    first, second = scene.in_order(fold)
    consumer = scene.neighbours.only_consumer(first)
    if consumer.name != second:
        return consumer.reason or f"{first!r} feeds {consumer.name!r}"
    between = scene.neighbours.calls_of(first)[0].outputs[0]
    watcher = scene.hooked.get(between)
    if watcher is not None:
        return f"hooks of {watcher!r} see what is between"
    dropout = _acting_in_training(scene, between)
    if dropout is not None:
        return f"{dropout} is between, which acts in training"
    for name in (first, second):
        reason = _why_tied(scene, name)
        if reason is not None:
            return reason
    if fold.form == "merge":
        merge = _why_unknown_layers(scene, first, second) or merge_of(
            scene.module(first), scene.module(second), values=scene.values
        )
        return merge if isinstance(merge, str) else _why_dearer(scene, first, second, merge)
    return _why_no_norm(scene, fold)


def _acting_in_training(scene: _Scene, between: int) -> str | None:
    """Return the kind of a layer that passes a tensor on unchanged, but only in evaluation."""
    for call in scene.neighbours.calls:
        if between in call.inputs and between in call.outputs:
            module = scene.module(call.module)
            idle = type(module) is nn.Identity or any(True for _ in module.children())
            if not idle and 0.0 not in (getattr(module, n, 1.0) for n in ("p", "drop_prob")):
                return type(module).__name__
    return None


def _why_tied(scene: _Scene, name: str) -> str | None:
    """Return what else depends on a module being as it is, or ``None``."""
    module = scene.module(name)
    if len(scene.names[name]) > 1:
        return f"{name!r} is one module of several names, {', '.join(scene.names[name])}"
    if has_hooks(module):
        return f"{name!r} has hooks"
    if name in scene.neighbours.read_elsewhere:
        reader = scene.neighbours.read_elsewhere[name] or "the network"
        return f"the forward of {reader} reads the weight of {name!r}"
    for tensor in (*module.parameters(), *module.buffers()):
        for owner in scene.owners.get(tensor.data_ptr(), ()) if tensor.numel() else ():
            if owner != name and not owner.startswith(f"{name}."):
                return f"{name!r} shares a weight with {owner!r}"
    return None


def _why_unknown_layers(scene: _Scene, *names: str) -> str | None:
    return next(filter(None, (why_unknown(scene.module(name)) for name in names)), None)


def _why_no_norm(scene: _Scene, fold: _Fold) -> str | None:
    norm, layer = scene.module(fold.site), scene.module(fold.into)
    reason = why_unknown(layer) or why_no_affine(norm)
    if reason is not None:
        return reason
    shape, before = shape_of(layer), fold.form == "norm-before"
    value = scene.neighbours.input_of(fold.site)
    dimensions = 2 if isinstance(layer, nn.Linear) else axes_of(layer) + 2
    if value is None or len(value.shape) != dimensions:
        return "they do not agree on which axis the channels are"
    if len(affine_of(norm)[0]) != (shape.out if before else shape.channels):
        return "they have different numbers of channels"
    return None if before else _why_not_after(norm, layer, values=scene.values)


def _why_not_after(norm: nn.Module, layer: nn.Module, *, values: bool) -> str | None:
    if type(rest_of(norm)) is not nn.Identity:
        return "it has an activation of its own"
    if not values or not bool(affine_of(norm)[1].any()):
        return None
    return why_uneven(layer)


# ---------------------------------------------------------------- costs


def _macs(scene: _Scene, name: str) -> int:
    """Return the MACs of a layer for one input, as counted."""
    return _weights(scene.module(name)) * _places(scene, name) // scene.batch


def _weights(layer: nn.Module) -> int:
    """Return the number of values of a layer's kernel."""
    shape = shape_of(layer)
    return shape.out * shape.values


def _places(scene: _Scene, name: str) -> int:
    """Return how many places of the whole batch meet the whole kernel."""
    shape = shape_of(scene.module(name))
    neighbours = scene.neighbours
    value = neighbours.input_of(name) if shape.transposed else neighbours.output_of(name)
    assert value is not None
    return math.prod(value.shape) // (shape.channels if shape.transposed else shape.out)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _costs(scene: _Scene, fold: _Fold) -> tuple[Cost, Cost]:
    """Return what the two modules cost, and what the one that they become costs."""
    first, second = scene.in_order(fold)
    params = _params(scene.module(first)) + _params(scene.module(second))
    if fold.form == "merge":
        merge = merge_of(scene.module(first), scene.module(second), values=scene.values)
        assert isinstance(merge, Merge)
        before = Cost(params=params, macs=_macs(scene, first) + _macs(scene, second))
        return before, _merged_cost(scene, first, second, merge)
    layer, norm = scene.module(fold.into), scene.module(fold.site)
    shape = shape_of(layer)
    macs = _macs(scene, fold.into)
    after = _weights(layer) + shape.out + _params(rest_of(norm))
    return Cost(params=params, macs=macs), Cost(params=after, macs=macs)


def _merged_cost(scene: _Scene, first: str, second: str, merge: Merge) -> Cost:
    transposed_first = is_transposed(scene.module(first))
    places = _places(scene, first if transposed_first else second)
    return Cost(params=merge.params, macs=merge.weights * places // scene.batch)


def _why_dearer(scene: _Scene, first: str, second: str, merge: Merge) -> str | None:
    if not scene.values:
        return None
    now = Cost(
        params=_params(scene.module(first)) + _params(scene.module(second)),
        macs=_macs(scene, first) + _macs(scene, second),
    )
    then = _merged_cost(scene, first, second, merge)
    if then.macs > now.macs:
        return f"merged they would cost {then.macs:,} MACs, not {now.macs:,}"
    if then.params > now.params:
        return f"merged they would have {then.params:,} parameters, not {now.params:,}"
    return None


# ---------------------------------------------------------------- carrying out


@dataclass(frozen=True)
class _Step:
    """A fold whose two modules' order is known: what carrying it out needs."""

    fold: _Fold
    first: str
    second: str
    values: bool


def _step(scene: _Scene, fold: _Fold) -> _Step:
    return _Step(fold, *scene.in_order(fold), scene.values)


def _carry_out(network: nn.Module, step: _Step) -> nn.Module:
    """Fold two modules of a network, in place."""
    fold = step.fold
    if fold.form == "merge":
        return _carry_out_merge(network, step)
    norm, layer = module_at(network, fold.site), module_at(network, fold.into)
    new = with_affine(layer, norm, before=fold.form == "norm-before")
    if new is not layer:
        network = replace_module(network, fold.into, new)
    return _replace_keeping_modes(network, fold.site, rest_of(norm))


def _replace_keeping_modes(network: nn.Module, name: str, new: nn.Module) -> nn.Module:
    inside = [(module, module.training) for module in new.modules() if module is not new]
    network = replace_module(network, name, new)
    for module, training in inside:
        module.training = training
    return network


def _carry_out_merge(network: nn.Module, step: _Step) -> nn.Module:
    fold = step.fold
    one, two = module_at(network, step.first), module_at(network, step.second)
    merge = merge_of(one, two, values=step.values)
    if isinstance(merge, str):
        raise PlanError(f"{fold.site!r} cannot be folded into {fold.into!r}: {merge}.")
    network = replace_module(network, fold.into, merged(merge, one, two))
    parent = _chain_of(network, fold)
    if parent is None:
        return replace_module(network, fold.site, nn.Identity())
    chain = cast("nn.Sequential", module_at(network, parent))
    # By name: deleting by place would number the others anew.
    delattr(chain, fold.site.rpartition(".")[2])
    return network if len(chain) > 1 else replace_module(network, parent, chain[0])


def _chain_of(network: nn.Module, fold: _Fold) -> str | None:
    """Return the name of the factorized layer that both are factors of, or ``None``."""
    parent, _, name = fold.site.rpartition(".")
    if fold.into.rpartition(".")[0] != parent:
        return None
    chain = module_at(network, parent)
    if type(chain) is not nn.Sequential or has_hooks(chain):
        return None
    names = {child for child, _ in chain.named_children()}
    return parent if names <= _FACTORS and name in names else None


# ---------------------------------------------------------------- finding


def find(network: nn.Module, example: Inputs) -> tuple[list[Option], list[LeftAlone]]:
    """Return every fold of a network, in the order in which they are to be carried out.

    Each option's costs are those after the options before it. All of them together are carried out
    on copies and the outputs compared: in float64, wherever the network runs in it, and in its own
    type. A fold that changes them, or breaks a forward that reads what is folded, is left alone.

    Args:
        network: Not modified. Folded as it is in evaluation mode.
        example: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Returns:
        The options, and each batch norm and each pair of layers with nothing between that is left
        alone, with the reason.

    Raises:
        ModelError: If the network cannot be copied or run on the example.
    """
    found, left_alone = _find(network, example)
    return [option for option, _ in found], left_alone


_Found = tuple[Option, _Step]


def _find(network: nn.Module, example: Inputs) -> tuple[list[_Found], list[LeftAlone]]:
    versions = _versions(network, example)
    found, left_alone = _all_folds(versions[0], _computed_macs(network, example))
    for version in versions[1:]:
        found, rejected = _same_outputs(version, [], found, exact=False)
        left_alone += rejected
    return found, left_alone


_Version = tuple[nn.Module, Inputs, list[Tensor]]


def _versions(network: nn.Module, example: Inputs) -> list[_Version]:
    """Return the network in float64, if it runs so, and in its own type, with input and outputs."""
    own = evaluation_copy(network)
    found: list[_Version] = [(own, example, _outputs(own, example))]
    types = {tensor.dtype for tensor in own.state_dict().values() if isinstance(tensor, Tensor)}
    if not types & {torch.float32, torch.float16, torch.bfloat16}:
        return found
    try:
        double = copy_network(own).double()
        inputs = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, example
        )
        found.insert(0, (double, inputs, _outputs(double, inputs)))
    except (ModelError, RuntimeError, TypeError):
        return found
    return found


def _computed_macs(network: nn.Module, example: Inputs) -> dict[str, int]:
    """Return the MACs of layers' parametrizations, which a fold makes an end of."""
    computed = [n for n, m in network.named_modules() if nn.utils.parametrize.is_parametrized(m)]
    if not computed:
        return {}
    layers = trace_layers(network, example).layers
    return {
        name: sum(layer.macs for layer in layers if layer.name.startswith(f"{name}."))
        for name in computed
    }


@dataclass(frozen=True)
class _Candidate:
    """A site and the folds of it to try, the best first, or why there is none."""

    site: str
    folds: tuple[_Fold | str, ...]


def _candidates(scene: _Scene) -> Iterator[_Candidate]:
    """Yield every batch norm, and every layer that alone feeds another one."""
    for name, module in scene.network.named_modules():
        if is_batch_norm(module):
            yield _norm_candidate(scene, name, module)
        elif isinstance(module, _LAYERS):
            following = scene.neighbours.only_consumer(name).name
            if following is not None and isinstance(scene.module(following), _LAYERS):
                into, site = _larger_first(scene, name, following)
                yield _Candidate(site, (_Fold("merge", site, into),))


def _norm_candidate(scene: _Scene, name: str, norm: nn.Module) -> _Candidate:
    reason = why_no_affine(norm)
    if reason is not None:
        return _Candidate(name, (reason,))
    if len(scene.neighbours.calls_of(name)) != 1:
        return _Candidate(name, (scene.neighbours.only_producer(name).reason,))
    before = scene.neighbours.only_producer(name)
    after = scene.neighbours.only_consumer(name)
    return _Candidate(
        name,
        (
            _no_layer_before(scene, name)
            or (_Fold("norm-before", name, before.name) if before.name else before.reason),
            _no_layer_after(scene, name)
            or (_Fold("norm-after", name, after.name) if after.name else after.reason),
        ),
    )


def _no_layer_before(scene: _Scene, name: str) -> str | None:
    """Say what makes a module's input if that is no convolution, in words that many sites share."""
    value = scene.neighbours.input_of(name)
    if value is None or value.module is None or value.operation is None:
        return None
    maker = scene.module(value.module)
    if isinstance(maker, _LAYERS):
        return None
    return f"{_called(maker, value.operation)} makes its input"


def _no_layer_after(scene: _Scene, name: str) -> str | None:
    """Say what reads a module's output if that is no convolution, or more than one reader."""
    value = scene.neighbours.output_of(name)
    if value is None or not value.readings:
        return None
    if len({(reading.module, reading.call) for reading in value.readings}) > 1:
        return "its output is read more than once"
    reading = value.readings[0]
    reader = scene.module(reading.module)
    if isinstance(reader, _LAYERS):
        return None
    return f"{_called(reader, reading.operation)} reads its output"


def _called(module: nn.Module, operation: str) -> str:
    """Return a layer's kind, or the operation in the forward of a module with children."""
    return f"`{operation}`" if any(True for _ in module.children()) else type(module).__name__


def _larger_first(scene: _Scene, first: str, second: str) -> tuple[str, str]:
    layer = scene.module(second)
    small = why_unknown(layer) is not None or acts_in_place(layer)
    return (first, second) if small else (second, first)


def _all_folds(version: _Version, computed: dict[str, int]) -> tuple[list[_Found], list[LeftAlone]]:
    """Fold round by round, and compare outputs after each, until nothing is left to fold."""
    original, example, _ = version
    done: list[_Found] = []
    refused: dict[str, LeftAlone] = {}
    while True:
        network = _carried_out(copy_network(original), [step for _, step in done])
        found, left_alone = _round(_look(network, example, values=True), computed, refused)
        if not found:
            return done, left_alone
        done, rejected = _same_outputs(version, done, found, exact=True)
        refused |= {item.site: item for item in rejected}


def _round(
    scene: _Scene, computed: dict[str, int], refused: dict[str, LeftAlone]
) -> tuple[list[_Found], list[LeftAlone]]:
    """Return folds that do not build on one another, and what cannot be folded."""
    touched: set[str] = set()
    found: list[_Found] = []
    left_alone: list[LeftAlone] = []
    for candidate in _candidates(scene):
        if candidate.site in refused:
            left_alone.append(refused[candidate.site])
            continue
        chosen = _first_possible(scene, candidate, touched)
        if isinstance(chosen, LeftAlone):
            left_alone.append(chosen)
        elif chosen is not None:
            found.append((_option(scene, chosen, computed), _step(scene, chosen)))
            touched |= {chosen.site, chosen.into}
    return found, left_alone


def _first_possible(
    scene: _Scene, candidate: _Candidate, touched: set[str]
) -> _Fold | LeftAlone | None:
    """Return the first fold that is exact, or why none is; ``None`` to look again later."""
    reasons = []
    for fold in candidate.folds:
        if isinstance(fold, str):
            reasons.append(fold)
            continue
        if touched & {fold.site, fold.into}:
            return None
        reason = _why_not(scene, fold)
        if reason is None:
            return fold
        reasons.append(reason)
    if len(set(reasons)) == 1:
        return LeftAlone(site=candidate.site, reason=reasons[0])
    return LeftAlone(site=candidate.site, reason=f"{reasons[0]}, and {reasons[-1]}")


def _option(scene: _Scene, fold: _Fold, computed: dict[str, int]) -> Option:
    before, after = _costs(scene, fold)
    extra = sum(
        computed.get(name, 0)
        for name in (fold.site, fold.into)
        if nn.utils.parametrize.is_parametrized(scene.module(name))
    )
    return Option(
        site=fold.site,
        rewrite="fold",
        settings={"form": fold.form, "into": fold.into},
        before=before + Cost(params=0, macs=extra),
        after=after,
        occupies=(fold.site, fold.into),
        error=0.0,
        harm=0.0,
    )


# ---------------------------------------------------------------- checking


def _same_outputs(
    version: _Version, kept: list[_Found], found: list[_Found], *, exact: bool
) -> tuple[list[_Found], list[LeftAlone]]:
    """Return those folds, with those kept so far, that leave the outputs as they were."""
    return keeping(
        kept,
        found,
        lambda chosen: _why_changed(version, [step for _, step in chosen], exact=exact),
        lambda candidate: candidate[0].site,
    )


def _why_changed(version: _Version, steps: list[_Step], *, exact: bool) -> str | None:
    network, example, expected = version
    if not steps:
        return None
    # Decisions, such as which boxes to keep, may turn on a rounding: compared is what leads there.
    decides = not all(tensor.is_floating_point() for tensor in expected)
    try:
        folded = _carried_out(copy_network(network), steps)
        if decides:
            sites = [step.second for step in steps if _has(folded, step.second)]
            expected = _outputs(network, example, sites)
            given = _outputs(folded, example, sites)
        else:
            given = _outputs(folded, example)
    except OneByOneError as error:
        return f"the network does not run without it: {error}"
    if decides and not exact:
        return None
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in expected]:
        return "the outputs have other shapes without it"
    for before, after in zip(expected, given, strict=True):
        difference = _difference(before, after)
        if not difference <= TOLERANCES.get(before.dtype, 0.0):
            return f"the outputs differ without it, by {difference:.1e} of the largest"
    return None


def _carried_out(network: nn.Module, steps: Sequence[_Step]) -> nn.Module:
    """Fold a network, in place, as found."""
    for step in steps:
        network = _carry_out(network, step)
    return network


def _outputs(
    network: nn.Module, example: Inputs, sites: Sequence[str] | None = None
) -> list[Tensor]:
    """Return copies of what a network gives, or what the modules of these names in it give."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        seen.extend(tensor.clone() for tensor in tensors_in(output))

    handles = [network.get_submodule(name).register_forward_hook(keep) for name in sites or ()]
    with seeded(0, device_of(example)), hooks_removed(handles):
        output = run(network, example)
    return seen if sites is not None else [tensor.clone() for tensor in tensors_in(output)]


def _has(network: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in network.named_modules())


def _difference(before: Tensor, after: Tensor) -> float:
    """Return the largest difference relative to the largest value; NaN where only one has it."""
    if not before.numel():
        return 0.0
    wide = torch.complex128 if before.is_complex() else torch.float64
    before, after = before.to(wide), after.to(wide)
    same = (before == after) | (before.isnan() & after.isnan())
    apart = torch.where(same, torch.zeros_like(before), before - after).abs()
    largest = before[before.isfinite()].abs()
    scale = float(largest.max()) if largest.numel() else 0.0
    return float(apart.max()) / max(scale, 1e-300)


# ---------------------------------------------------------------- rewriting


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
        structure_only: Whether the weights are not the network's yet: then a fold that only some
            weights allow is not refused.

    Raises:
        PlanError: If the fold does not fit the network; says why.
        ModelError: If the network cannot be run.
    """
    nothing = Cost(params=0, macs=0)
    option = Option(site=site, rewrite="fold", settings=settings, before=nothing, after=nothing)
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
        options: Read for ``site`` and ``settings``, in this order.
        structure_only: As for :func:`rewrite`.

    Raises:
        PlanError: If a fold does not fit the network; says why.
        ModelError: If the network cannot be run.
    """
    work = copy_network(network)
    scene: _Scene | None = None
    touched: set[str] = set()
    for option in options:
        fold = _read(work, option)
        if scene is None or touched & {fold.site, fold.into}:
            scene = _look(evaluation_copy(work), example, values=not structure_only)
            touched = set()
        reason = _why_not(scene, fold)
        if reason is not None:
            raise PlanError(
                f"The plan's site {fold.site!r} cannot be folded into {fold.into!r}: {reason}."
            )
        work = _carry_out(work, _step(scene, fold))
        # A chain of factors of which one is left gives it its own name.
        touched |= {fold.site, fold.into, fold.into.rpartition(".")[0]}
    return work


def _read(network: nn.Module, option: Option) -> _Fold:
    form, into = option.settings.get("form"), option.settings.get("into")
    if form not in FORMS or not isinstance(into, str):
        raise PlanError(
            f"The settings of {option.site!r} must have a `form`, one of {', '.join(FORMS)}, and "
            f"`into`, the name of a layer, got {option.settings}."
        )
    for name in (option.site, into):
        try:
            network.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"The plan's site {name!r} must be a layer of the network, but {error}."
            ) from error
    return _Fold(str(form), option.site, into)


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
    inputs = as_inputs(model, example)
    found, left_alone = _find(model, inputs)
    options = [option for option, _ in found]
    plan = plan_of(model, inputs, options, left_alone, name=name)
    return _carried_out(copy_network(model), [step for _, step in found]), plan
