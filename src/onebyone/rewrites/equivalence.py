"""The proof that a rewrite keeps the function: outputs compared in the precision that tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from onebyone.core.errors import ModelError
from onebyone.core.randomness import seeded
from onebyone.core.records import LeftAlone, Option, Plan
from onebyone.core.tensor_trees import Inputs, device_of, tensors_in
from onebyone.networks.examples import inputs_of
from onebyone.networks.held import made_once
from onebyone.networks.surgery import (
    copy_network,
    evaluation_copy,
    hooks_removed,
    run,
)
from onebyone.profiling.trace import trace_layers

T = TypeVar("T")

# Largest difference of the outputs, relative to the largest output, that rounding may cause.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
# A network in float64 may still compute parts in float32. Inputs that differ by so little show how
# far that moves its outputs, and a difference of so many times as much is rounding too, if it is no
# larger than this.
NUDGE = 1e-14
NUDGES = 100
MOST_ROUNDING = 1e-4


@dataclass(frozen=True)
class Version:
    """A network in one precision, with the inputs that it is compared on.

    Attributes:
        network: In evaluation mode. Run, never modified.
        inputs: One or more.
        sites: Modules whose outputs are compared in place of the network's.
        doubled: Whether the network is a copy in float64 of one of another type.
    """

    network: nn.Module
    inputs: tuple[Inputs, ...]
    sites: tuple[str, ...] | None = None
    doubled: bool = False

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What the network gives for all inputs."""
        return self.outputs_of(self.network)

    @cached_property
    def not_plain(self) -> dict[str, str | None]:
        """Why layers are not plain ones, of those that were looked at; ``None`` where they are."""
        return {}

    @property
    def decides(self) -> bool:
        """Whether the network gives decisions, such as which boxes to keep.

        They may turn on a rounding.
        """
        return not all(tensor.is_floating_point() for tensor in self.outputs)

    def at(self, sites: Sequence[str]) -> Version:
        """Return the same version, of which what modules give is compared."""
        return replace(self, sites=tuple(sites))

    def like(self, network: nn.Module) -> nn.Module:
        """Return a copy of another network, in evaluation mode and of this version's type."""
        copied = evaluation_copy(network)
        return copied.double() if self.doubled else copied

    def outputs_of(self, network: nn.Module) -> list[Tensor]:
        """Return copies of all tensors that another network gives for the same inputs.

        Raises:
            ModelError: If it does not run.
        """
        return [tensor for each in self.inputs for tensor in _outputs(network, each, self.sites)]

    def why_changed(self, network: nn.Module, *, within: float | None = None) -> str | None:
        """Return how another network's outputs differ, or ``None`` where by rounding at most.

        Args:
            network: Of this version's type. Not modified.
            within: The largest difference that its rounding explains, relative to the largest
                output; by the outputs' type if not given.

        Raises:
            ModelError: If it does not run.
        """
        given = self.outputs_of(network)
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in self.outputs]:
            return "the outputs have other shapes"
        for before, after in zip(self.outputs, given, strict=True):
            apart = difference(before, after)
            most = max(TOLERANCES.get(before.dtype, 0.0), within or 0.0)
            if not (apart <= most or self._is_rounding(apart)):
                return f"the outputs differ by {apart:.1e} of the largest"
        return None

    def _is_rounding(self, apart: float) -> bool:
        return apart <= MOST_ROUNDING and apart <= NUDGES * self._rounding

    @cached_property
    def _rounding(self) -> float:
        """How far outputs move for inputs that differ by next to nothing, where that shows."""
        if not any(tensor.dtype == torch.float64 for tensor in self.outputs):
            return 0.0
        nudged = replace(self, inputs=tuple(_mapped(each, _nudged) for each in self.inputs))
        pairs = zip(self.outputs, nudged.outputs_of(self.network), strict=True)
        return max((difference(a, b) for a, b in pairs if a.shape == b.shape), default=0.0)


def _nudged(tensor: Tensor) -> Tensor:
    return tensor * (1 + NUDGE * torch.ones_like(tensor))


def difference(before: Tensor, after: Tensor) -> float:
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


def version_of(network: nn.Module, example: Inputs) -> Version:
    """Return the first of :func:`versions_of`; the same each time for a held network.

    Args:
        network: Not modified.
        example: An input of the network.

    Raises:
        ModelError: If it cannot be copied or run on the example.
    """

    def make() -> tuple[Version, Inputs]:
        return _version_of(network, example), example  # while it is kept, its `id` is its own

    return made_once(network, ("version", id(example)), make)[0]


def _version_of(network: nn.Module, example: Inputs) -> Version:
    own = Version(evaluation_copy(network), (example,))
    assert own.outputs is not None  # it runs
    if not _is_narrow(own.network):
        return replace(own, inputs=(example, *_noises(own.network, example)))
    double = _in_double(own.network, example)
    return Version(evaluation_copy(network), (example,)) if double is None else double


def versions_of(network: nn.Module, example: Inputs) -> list[Version]:
    """Return a network in float64, if it runs so, and in its own type.

    In float64 it is compared on noise like the example as well: an example may be blank, or all
    alike.

    Args:
        network: Not modified.
        example: An input of the network.

    Raises:
        ModelError: If it cannot be copied or run on the example.
    """
    own = Version(evaluation_copy(network), (example,))
    assert own.outputs is not None  # it runs
    if not _is_narrow(own.network):
        return [replace(own, inputs=(example, *_noises(own.network, example)))]
    try:
        copied = copy_network(own.network)
    except ModelError:
        return [own]
    double = _in_double(copied, example)
    return [own] if double is None else [double, own]


def _is_narrow(network: nn.Module) -> bool:
    """Whether a network has values of less than 64 bits."""
    types = {tensor.dtype for tensor in network.state_dict().values() if _is_tensor(tensor)}
    return bool(types & {torch.float32, torch.float16, torch.bfloat16})


def _in_double(network: nn.Module, example: Inputs) -> Version | None:
    """Return a version in float64 of a network, modified; ``None`` if it does not run so."""
    try:
        double = Version(network.double(), (_mapped(example, _doubled),), doubled=True)
        assert double.outputs is not None
    except (ModelError, RuntimeError, TypeError):
        return None
    noises = _noises(double.network, double.inputs[0])
    return replace(double, inputs=(*double.inputs, *noises))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double()


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return inputs with their floating-point tensors changed."""
    changed: Inputs = tree_map_only(
        Tensor, lambda t: change(t) if t.is_floating_point() else t, inputs
    )
    return changed


def _noises(network: nn.Module, example: Inputs) -> Iterator[Inputs]:
    """Yield an input of noise like the example, if the network runs on it."""
    if not any(tensor.is_floating_point() for tensor in tensors_in(example)):
        return
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = float(tensor.double().std(correction=0)) if tensor.numel() else 0.0
        level = float(tensor.double().mean()) if spread > 0 else 0.0
        return (drawn * (spread or 1.0) + level).to(tensor)

    found = _mapped(example, noise)
    try:
        run(network, _mapped(found, torch.clone))
    except ModelError:
        return
    yield found


def _outputs(network: nn.Module, inputs: Inputs, sites: Sequence[str] | None) -> list[Tensor]:
    """Return copies of what a network gives, or what the modules of these names in it give."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        seen.extend(tensor.clone() for tensor in tensors_in(output))

    handles = [network.get_submodule(name).register_forward_hook(keep) for name in sites or ()]
    # A forward may write into its input, and draw random numbers.
    with seeded(0, device_of(inputs)), hooks_removed(handles):
        output = run(network, _mapped(inputs, torch.clone))
    return seen if sites is not None else [tensor.clone() for tensor in tensors_in(output)]


def keeping(
    kept: Sequence[T],
    found: Sequence[T],
    why_changed: Callable[[Sequence[T]], str | None],
    site: Callable[[T], str],
) -> tuple[list[T], list[LeftAlone]]:
    """Return the candidates that together leave the outputs as they were, and why not the others.

    Sought by halves, for most networks have none of the others.

    Args:
        kept: Candidates that are carried out already.
        found: Those to try.
        why_changed: Says of candidates carried out together why the outputs changed.
        site: Says where a candidate is.
    """
    accepted = list(kept)
    rejected: list[LeftAlone] = []
    waiting = [list(found)] if found else []
    while waiting:
        group = waiting.pop()
        reason = why_changed([*accepted, *group])
        if reason is None:
            accepted += group
        elif len(group) == 1:
            rejected.append(LeftAlone(site=site(group[0]), reason=reason))
        else:
            half = len(group) // 2
            waiting += [group[half:], group[:half]]
    return accepted, rejected


def plan_of(
    model: nn.Module,
    inputs: Inputs,
    options: Sequence[Option],
    left_alone: Sequence[LeftAlone],
    *,
    name: str | None,
) -> Plan:
    """Return the plan of options that harm nothing, without a budget.

    Args:
        model: Not modified; a copy is run for its cost.
        inputs: An input.
        options: All are chosen.
        left_alone: What is not rewritten, and why.
        name: What to call the network; its class by default.
    """
    before = trace_layers(model, inputs).cost
    after = before
    for option in options:
        after = after - option.saved
    return Plan(
        network=name or type(model).__name__,
        inputs=inputs_of(model, inputs),
        budgets=(),
        before=before,
        after=after,
        choices=tuple(options),
        left_alone=tuple(left_alone),
        harm=0.0,
    )
