"""Builds whole networks for a runtime, and times them in turns with the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from onebyone.core.errors import OneByOneError
from onebyone.core.records import Deployment, PlannedLatency
from onebyone.core.tensor_trees import Inputs
from onebyone.planning.latency.precision import FLOAT32, INT8, preparing
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.runtimes import Prepared, describe_machine, find_runtime

# Interleaved rounds in which a built network is compared with the original, and how often so many
# are added while the interval of the ratio is wider than this share of it.
ROUNDS = 15
MOST_TRIES = 4
WIDE = 0.03
# Of a series of rounds, at most.
SECONDS = 5.0
# The exporter that is quick for layers serves for networks of a front if the original takes the
# same time by it, within this share.
ALIKE = 0.03


@dataclass(frozen=True)
class Builder:
    """A way to make networks ready to run, and the original made ready by it.

    Attributes:
        prepare: In the precision that networks are deployed in.
        original: The original in float32.
        alone: The original in that precision; ``None`` where that is float32.
    """

    prepare: Callable[[nn.Module, Any], Prepared]
    original: Prepared
    alone: Prepared | None = None

    @property
    def unchanged(self) -> Prepared:
        """The original as it is deployed."""
        return self.original if self.alone is None else self.alone


class Builds:
    """The original network in a deployment, and how others are built and timed beside it.

    Args:
        model: The original. Not modified.
        example: Inputs with the deployment's batch, on its device.
        deployment: Where the networks run.

    Attributes:
        own: The runtime's own way to make networks ready.
        before_ms: The original's time in float32.
        unchanged_ms: Its time as it is deployed.
    """

    def __init__(self, model: nn.Module, example: Inputs, deployment: Deployment) -> None:
        self.model, self.example, self.deployment = model, example, deployment
        with threads(deployment.threads):
            self.own = self._own_builder()
        self._quick: Builder | None = None
        self.time_originals()

    def time_originals(self) -> None:
        """Time the original in float32, and as it is deployed: options save of that time."""
        contenders = {"before": self.own.original}
        if self.own.alone is not None:
            contenders["alone"] = self.own.alone
        with threads(self.deployment.threads):
            samples = interleave(
                contenders, rounds=ROUNDS, device=self.deployment.device, seconds=SECONDS
            )
        self.before_ms = float(np.median(samples.ms["before"]))
        unchanged = "alone" if self.deployment.precision == INT8 else "before"
        self.unchanged_ms = float(np.median(samples.ms[unchanged]))

    def quickest(self) -> Builder:
        """Return the quickest way to build networks by which the original takes its own time."""
        if self._quick is None:
            self._quick = self._found_quickest()
        return self._quick

    def _found_quickest(self) -> Builder:
        ways, own = preparing(self.deployment), self.own
        if not ways.is_quick or not isinstance(self.example, Tensor):
            return own
        with threads(self.deployment.threads):
            try:
                quick = ways.layers(self.model, self.example)
            except OneByOneError:
                return own
            samples = self._interleaved({"before": own.unchanged, "after": quick})
        if abs(samples.ratio("before", "after").value - 1) > ALIKE:
            return own
        if own.alone is None:
            return Builder(ways.layers, quick)
        return Builder(ways.layers, own.original, quick)

    def _own_builder(self) -> Builder:
        """Return the runtime's own way, as the network is deployed."""
        runtime, whole = find_runtime(self.deployment.runtime), preparing(self.deployment).whole
        original = runtime.on(self.model, self.example)
        if self.deployment.precision == FLOAT32:
            return Builder(whole, original)
        return Builder(whole, original, whole(self.model, self.example))

    def timed(self, after: Prepared, builder: Builder) -> Samples:
        """Time a network in turns with the original, made ready by the same builder."""
        contenders = {"before": builder.original}
        if builder.alone is not None:
            contenders["alone"] = builder.alone
        return self._interleaved({**contenders, "after": after})

    def _interleaved(self, contenders: Mapping[str, Prepared]) -> Samples:
        """Time networks in turns until the ratio of the first to the last is known well enough."""

        def series() -> Samples:
            return interleave(
                contenders,
                rounds=ROUNDS,
                device=self.deployment.device,
                seconds=SECONDS,
            )

        samples = series()
        for _ in range(MOST_TRIES - 1):
            ratio = samples.ratio("before", "after")
            if ratio.high - ratio.low <= WIDE * ratio.value:
                break
            samples = samples.followed_by(series())
        return samples

    def latency(
        self, samples: Samples, after_ms: float, *, corrections: int, share: float
    ) -> PlannedLatency:
        """Return what a network's samples say of it.

        Args:
            samples: From :meth:`timed`.
            after_ms: What was predicted for it.
            corrections: Networks that were built before it.
            share: Of the milliseconds saved in layers, what the network was taken to save.
        """
        runtime, batch = self.deployment.runtime, self.deployment.batch
        before = samples.timing("before", runtime=runtime, batch=batch)
        after = samples.timing("after", runtime=runtime, batch=batch)
        ratio = samples.ratio("before", "after", looks=MOST_TRIES)
        # The original took another time in these rounds than in those that the plan rests on.
        predicted = after_ms * before.median_ms / self.before_ms
        alone = alone_ratio = None
        if "alone" in samples.ms:
            alone = samples.timing("alone", runtime=runtime, batch=batch)
            alone_ratio = samples.ratio("alone", "after", looks=MOST_TRIES)
            if self.deployment.precision == INT8:
                predicted = after_ms * alone.median_ms / self.unchanged_ms
        return PlannedLatency(
            deployment=self.deployment,
            machine=describe_machine(self.deployment.device),
            before=before,
            after=after,
            ratio=ratio,
            predicted_ms=predicted,
            corrections=corrections,
            share=share,
            alone=alone,
            alone_ratio=alone_ratio,
        )
