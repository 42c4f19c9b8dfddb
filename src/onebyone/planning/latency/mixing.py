"""What a plan that chooses precisions knows of a network besides its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from onebyone.core.records import Deployment, Option, Plan
from onebyone.planning.latency.conversions import conversion_ms
from onebyone.planning.latency.precision import prepare_int8
from onebyone.planning.mixed import joins_of, translated
from onebyone.quantizing.flow import Flow
from onebyone.rewrites import restructure
from onebyone.runtimes import Prepared, find_runtime


@dataclass(frozen=True)
class Mixing:
    """The flow between a network's layers, and what conversions take where it is to run.

    Attributes:
        flow: Of the network that was surveyed.
        deployment: Where it is to run.
    """

    flow: Flow
    deployment: Deployment

    @cached_property
    def _convert(self) -> Callable[[int], float]:
        tensors = [*self.flow.gives.values(), *(edge.values for edge in self.flow.edges)]
        return conversion_ms(tensors, self.deployment)

    def convert_ms(self, values: int) -> float:
        """Return what it takes to quantize and dequantize so many values of one input."""
        return self._convert(values)

    def leaving_ms(self, site: str) -> float:
        """Return what it takes to dequantize a layer's outputs."""
        return self.convert_ms(self.flow.gives.get(site, 0)) / 2

    @cached_property
    def joins(self) -> tuple[Option, ...]:
        """What is saved where two neighbors are both in int8."""
        return tuple(joins_of(self.flow, self.convert_ms))

    def translated(self, made: Plan, model: nn.Module) -> Plan:
        """Return a plan of rewrites of the original, with the layers that stay float32 apart."""
        return translated(made, model, tuple(self.flow.gives))

    def prepare(self, made: Plan, model: nn.Module, example: Any) -> Prepared:
        """Make a translated plan's network ready to run."""
        runtime, small = find_runtime(self.deployment.runtime), restructure(model, made)
        if made.precision == "float32":
            return runtime.on(small, example)
        assert runtime.prepare_onnx is not None, "checked by `runtime_for`"
        kept: Sequence[str] = [item.site for item in made.float32_layers]
        return prepare_int8(runtime.prepare_onnx, small, example, float32=kept)
