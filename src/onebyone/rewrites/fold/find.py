"""Every fold of a network that keeps its outputs, found round by round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from onebyone.core.errors import OneByOneError
from onebyone.core.records import Cost, LeftAlone, Option
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.conv_layers import why_unknown
from onebyone.networks.surgery import copy_network
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.equivalence import Version, keeping, versions_of
from onebyone.rewrites.fold.carry_out import OrderedFold, carried_out, ordered
from onebyone.rewrites.fold.merge_layers import acts_in_place, is_batch_norm, why_no_affine
from onebyone.rewrites.fold.scene import LAYERS, Fold, Scene, costs_of, look_at, why_not


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
    found, left_alone = find_with_steps(network, example)
    return [option for option, _ in found], left_alone


_Found = tuple[Option, OrderedFold]


def find_with_steps(network: nn.Module, example: Inputs) -> tuple[list[_Found], list[LeftAlone]]:
    """Return :func:`find`'s folds, each with what carrying it out needs."""
    versions = versions_of(network, example)
    found, left_alone = _all_folds(versions[0], _computed_macs(network, example))
    for version in versions[1:]:
        found, rejected = _same_outputs(version, [], found, exact=False)
        left_alone += rejected
    return found, left_alone


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
    folds: tuple[Fold | str, ...]


def _candidates(scene: Scene) -> Iterator[_Candidate]:
    """Yield every batch norm, and every layer that alone feeds another one."""
    for name, module in scene.network.named_modules():
        if is_batch_norm(module):
            yield _norm_candidate(scene, name, module)
        elif isinstance(module, LAYERS):
            following = scene.neighbours.only_consumer(name).name
            if following is not None and isinstance(scene.module(following), LAYERS):
                into, site = _larger_first(scene, name, following)
                yield _Candidate(site, (Fold("merge", site, into),))


def _norm_candidate(scene: Scene, name: str, norm: nn.Module) -> _Candidate:
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
            or (Fold("norm-before", name, before.name) if before.name else before.reason),
            _no_layer_after(scene, name)
            or (Fold("norm-after", name, after.name) if after.name else after.reason),
        ),
    )


def _no_layer_before(scene: Scene, name: str) -> str | None:
    """Say what makes a module's input if that is no convolution, in words that many sites share."""
    value = scene.neighbours.input_of(name)
    if value is None or value.module is None or value.operation is None:
        return None
    maker = scene.module(value.module)
    if isinstance(maker, LAYERS):
        return None
    return f"{_called(maker, value.operation)} makes its input"


def _no_layer_after(scene: Scene, name: str) -> str | None:
    """Say what reads a module's output if that is no convolution, or more than one reader."""
    value = scene.neighbours.output_of(name)
    if value is None or not value.readings:
        return None
    if len({(reading.module, reading.call) for reading in value.readings}) > 1:
        return "its output is read more than once"
    reading = value.readings[0]
    reader = scene.module(reading.module)
    if isinstance(reader, LAYERS):
        return None
    return f"{_called(reader, reading.operation)} reads its output"


def _called(module: nn.Module, operation: str) -> str:
    """Return a layer's kind, or the operation in the forward of a module with children."""
    return f"`{operation}`" if any(True for _ in module.children()) else type(module).__name__


def _larger_first(scene: Scene, first: str, second: str) -> tuple[str, str]:
    layer = scene.module(second)
    small = why_unknown(layer) is not None or acts_in_place(layer)
    return (first, second) if small else (second, first)


def _all_folds(version: Version, computed: dict[str, int]) -> tuple[list[_Found], list[LeftAlone]]:
    """Fold round by round, and compare outputs after each, until nothing is left to fold."""
    original, example = version.network, version.inputs[0]
    done: list[_Found] = []
    refused: dict[str, LeftAlone] = {}
    while True:
        network = carried_out(copy_network(original), [step for _, step in done])
        found, left_alone = _round(look_at(network, example, values=True), computed, refused)
        if not found:
            return done, left_alone
        done, rejected = _same_outputs(version, done, found, exact=True)
        refused |= {item.site: item for item in rejected}


def _round(
    scene: Scene, computed: dict[str, int], refused: dict[str, LeftAlone]
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
            found.append((_option(scene, chosen, computed), ordered(scene, chosen)))
            touched |= {chosen.site, chosen.into}
    return found, left_alone


def _first_possible(
    scene: Scene, candidate: _Candidate, touched: set[str]
) -> Fold | LeftAlone | None:
    """Return the first fold that is exact, or why none is; ``None`` to look again later."""
    reasons = []
    for fold in candidate.folds:
        if isinstance(fold, str):
            reasons.append(fold)
            continue
        if touched & {fold.site, fold.into}:
            return None
        reason = why_not(scene, fold)
        if reason is None:
            return fold
        reasons.append(reason)
    if len(set(reasons)) == 1:
        return LeftAlone(site=candidate.site, reason=reasons[0])
    return LeftAlone(site=candidate.site, reason=f"{reasons[0]}, and {reasons[-1]}")


def _option(scene: Scene, fold: Fold, computed: dict[str, int]) -> Option:
    before, after = costs_of(scene, fold)
    extra = sum(
        computed.get(name, 0)
        for name in (fold.site, fold.into)
        if nn.utils.parametrize.is_parametrized(scene.module(name))
    )
    return Option.of(
        "fold",
        {"form": fold.form, "into": fold.into},
        site=fold.site,
        before=before + Cost(params=0, macs=extra, bytes=0),
        after=after,
        occupies=(fold.site, fold.into),
        error=0.0,
        harm=0.0,
    )


def _same_outputs(
    version: Version, kept: list[_Found], found: list[_Found], *, exact: bool
) -> tuple[list[_Found], list[LeftAlone]]:
    """Return those folds, with those kept so far, that leave the outputs as they were."""
    return keeping(
        kept,
        found,
        lambda chosen: _why_changed(version, [step for _, step in chosen], exact=exact),
        lambda candidate: candidate[0].site,
    )


def _why_changed(version: Version, steps: list[OrderedFold], *, exact: bool) -> str | None:
    if not steps:
        return None
    try:
        folded = carried_out(copy_network(version.network), steps)
        if version.decides:
            # Compared is what leads to the decisions.
            version = version.at([step.second for step in steps if _has(folded, step.second)])
            reason = version.why_changed(folded) if exact else None
        else:
            reason = version.why_changed(folded)
    except OneByOneError as error:
        return f"the network does not run without it: {error}"
    return None if reason is None else f"without it {reason}"


def _has(network: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in network.named_modules())
