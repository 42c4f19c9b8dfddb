"""Probes: how far a network's outputs move when one of its modules is replaced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.prefix_cache import ResumedPasses
from onebyone.core.errors import ModelError
from onebyone.core.records import LayerCost
from onebyone.core.settings.planning import Effort
from onebyone.core.tensor_trees import (
    Inputs,
    batch_size,
    concatenated,
    has_batch,
    lists_pictures,
    map_tensors,
    tensors_in,
)
from onebyone.networks.outputs import Outputs, comparable
from onebyone.networks.surgery import lay_channels_last, run
from onebyone.planning.harm import Measured


class Limits(NamedTuple):
    """What probes may cost; in MACs, not in seconds, so that every machine makes the same plan.

    Attributes:
        options: Of a site, whose harm is measured, at most. The harm of the others is interpolated.
            It is wrong by a factor of about two, or of a hundred if an option removes channels that
            the network needs.
        examples: Of a probe.
        macs: Of all probes together. There are fewer options before there are fewer examples than
            enough.
        cheap: MACs of the probes of a site that may always be spent, on more options.
    """

    options: int
    examples: int
    macs: float
    cheap: float


MOST_OPTIONS = 60  # of a site, that go to the solver
# Options are worth more than examples. Plans of ResNet-20, mean of three seeds: with 5 options of a
# site on 128 examples and with 2 on 8 the outputs move equally far; with all options on 32 examples
# they move 8, 21 and 24 % less at 60, 50 and 40 % of the MACs, and 3 % less at 32 %. Plans of NiN
# are the same or, with few examples, a little worse (benchmarks/plan_quality.py).
LIMITS: dict[Effort, Limits] = {
    "quick": Limits(options=2, examples=8, macs=6e11, cheap=1e8),
    "normal": Limits(options=MOST_OPTIONS, examples=32, macs=1.5e12, cheap=1e9),
    "thorough": Limits(options=MOST_OPTIONS, examples=256, macs=8e12, cheap=6e10),
}
FEWEST_OPTIONS = 2
ENOUGH_EXAMPLES = 16
FEWEST_EXAMPLES = 8
# At a temperature of 1, a few examples make up most of the divergence of a network that is sure of
# its answers, and which ones is chance. At this one nearly all count.
TEMPERATURE = 4.0
LEAST_DIVERGENCE = 1e-300
# Examples are chosen among so many times as many: half of them the ones whose divergence is the
# greatest for the same error, and half drawn from the others, which count for as many as they are.
POOL = 4


@dataclass(frozen=True)
class _Batch:
    """Inputs, and what the mean over them counts for in the mean over all."""

    inputs: Inputs
    weight: float


@dataclass(frozen=True)
class Counts:
    """How many options of a site are measured, and on how many examples.

    Attributes:
        options: Of each site, at least, where it has so many.
        examples: Of a probe.
        macs_from: What each layer and all that run after it cost together, for one input.
        cheap: MACs of the probes of a site that may always be spent.
    """

    options: int
    examples: int
    macs_from: Mapping[str, int]
    cheap: float

    @classmethod
    def of(
        cls, layers: Mapping[str, LayerCost], names: Sequence[str], data: int, effort: Effort
    ) -> Counts:
        """Return what the limits of an effort allow.

        Args:
            layers: By name, in order of execution.
            names: Of those that will be replaced.
            data: Examples that there are.
            effort: Names the limits.
        """
        most, macs_from = LIMITS[effort], _macs_from(layers)
        each = max(sum(macs_from[name] for name in names), 1)
        enough = min(ENOUGH_EXAMPLES, data)
        options = min(most.options, max(FEWEST_OPTIONS, int(most.macs / (enough * each))))
        affordable = max(FEWEST_EXAMPLES, int(most.macs / (options * each)))
        return cls(options, min(most.examples, affordable, data), macs_from, most.cheap)

    def at(self, site: str) -> int:
        """Return how many options of a site are measured, at most."""
        each = max(self.examples * self.macs_from[site], 1)
        return max(self.options, int(self.cheap / each))

    def macs(self, sites: Iterable[str]) -> int:
        """Return what the probes of sites cost, where these have options enough."""
        return sum(self.at(site) * self.examples * self.macs_from[site] for site in sites)


class Probes:
    """Measures how far the outputs move with one module replaced, on a few examples.

    Args:
        network: In evaluation mode. Laid out channels last; else changed only while it runs.
        data: The calibration data that the examples are chosen from.
        meaning: What the outputs mean.
        names: Of the modules that will be replaced, in order of execution.
        counts: How many options and examples there are.

    Raises:
        ModelError: If the network cannot be run.
    """

    def __init__(
        self,
        network: nn.Module,
        data: CalibrationData,
        meaning: Meaning,
        names: Sequence[str],
        counts: Counts,
    ) -> None:
        self._meaning, self.counts = meaning, counts
        batches = _chosen(network, data, meaning, self.counts.examples)
        self._weights = [batch.weight for batch in batches]
        if any(tensor.ndim == 4 for tensor in tensors_in(batches[0].inputs)):
            # As the inputs are laid out; weights of another layout are turned at each call.
            lay_channels_last(network)
        self._passes = ResumedPasses(network, [batch.inputs for batch in batches], names)
        self._temperature = meaning.temperature(self._passes.reference[0], TEMPERATURE)

    def harm_with(self, site: str, new: nn.Module) -> Measured:
        """Return how far the outputs move with one module replaced.

        Raises:
            ModelError: If the network does not run with it, or its outputs are not finite.
        """
        softened, each, weights = 0.0, [], []
        triples = zip(
            self._weights, self._passes.reference, self._passes.outputs(site, new), strict=True
        )
        for weight, *pair in triples:
            before, after = map_tensors(Tensor.double, pair)
            apart = self._meaning.divergence(before, after)
            each.append(apart)
            weights.append(torch.full_like(apart, weight / len(apart)))
            loss = self._meaning.imitation_loss(before, after, self._temperature)
            softened += weight * max(float(loss), 0.0)
        apart, share = torch.cat(each), torch.cat(weights)
        divergence = float((share * apart).sum())
        if not math.isfinite(softened + divergence):
            raise ModelError("its outputs are then NaN or infinite.")
        error = float((share * (apart - divergence)).norm())
        return Measured(softened, divergence, error / max(divergence, LEAST_DIVERGENCE))


def _macs_from(layers: Mapping[str, LayerCost]) -> dict[str, int]:
    """Return what each layer and all that run after it cost together, for one input."""
    found, total = {}, 0
    for name, layer in reversed(list(layers.items())):
        total += layer.macs
        found[name] = total
    return found


def _chosen(
    network: nn.Module, data: CalibrationData, meaning: Meaning, count: int
) -> list[_Batch]:
    """Return the examples of the probes, those that decide the divergence among them."""
    pool = data.first(POOL * count)
    batches = list(pool.batches())
    if len(pool) > count and not any(map(lists_pictures, batches)):
        each = [meaning.sensitivity(_outputs(network, inputs)) for inputs in batches]
        sensitivity = torch.cat(each).cpu()
        if float(sensitivity.max()) > float(sensitivity.min()):
            return _stratified(batches, sensitivity, count, data.seed)
    batches = list(data.first(count).batches())
    return _weighted([(batches, 1.0)])


def _stratified(
    batches: Sequence[Inputs], sensitivity: Tensor, count: int, seed: int
) -> list[_Batch]:
    """Return the most sensitive examples, and as many of the others, which stand for all these."""
    n, half = len(sensitivity), count // 2
    order = sensitivity.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n - half, generator=generator)[: count - half]
    parts = ((order[:half], half / n), (order[half:][drawn], 1 - half / n))
    size = batch_size(batches[0])
    return _weighted(
        [
            ([_gathered(batches, some) for some in torch.split(rows.sort().values, size)], share)
            for rows, share in parts
            if len(rows)
        ]
    )


def _weighted(parts: Sequence[tuple[Sequence[Inputs], float]]) -> list[_Batch]:
    """Return batches, those of each part with weights that add up to its share."""
    found = []
    for batches, share in parts:
        n = sum(map(batch_size, batches))
        found += [_Batch(inputs, share * batch_size(inputs) / n) for inputs in batches]
    return found


def _outputs(network: nn.Module, inputs: Inputs) -> Outputs:
    return comparable(run(network, inputs), network, batch_size(inputs))


def _gathered(batches: Sequence[Inputs], rows: Tensor) -> Inputs:
    """Return examples of several batches as one batch.

    Args:
        batches: The inputs.
        rows: Rising places of the examples among those of all batches.
    """
    found, start = [], 0
    for inputs in batches:
        size = batch_size(inputs)
        mine = rows[(rows >= start) & (rows < start + size)] - start
        if len(mine):
            found.append(_rows_of(inputs, mine))
        start += size
    joined: Inputs = concatenated(found)
    return joined


def _rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    size = batch_size(inputs)
    taken: Inputs = map_tensors(
        lambda tensor: tensor[rows.to(tensor.device)] if has_batch(tensor, size) else tensor, inputs
    )
    return taken
