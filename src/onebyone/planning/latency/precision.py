"""How networks are made ready to be timed in the precision that they are deployed in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from onebyone.core.errors import MissingExtraError, OptionError
from onebyone.core.records import Deployment
from onebyone.networks.surgery import copy_network
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.planning.survey import Survey
from onebyone.runtimes import RUNTIMES, Prepared, find_runtime
from onebyone.runtimes.base import Prepare, PrepareOnnx
from onebyone.runtimes.onnx import layers_to_onnx, to_onnx

FLOAT32, INT8, AUTO = "float32", "int8", "auto"
# Bytes of a weight in int8.
INT8_BYTES = 1


@dataclass(frozen=True)
class Preparing:
    """How networks are made ready to run where they are deployed.

    Attributes:
        whole: Of a whole network, as it is exported.
        layers: Of a few consecutive layers, which are timed by the hundred: a faster way.
        is_quick: Whether ``layers`` is another way than ``whole``.
        in_int8: Of a few layers of which those before a place stay float32; where precisions are
            mixed.
    """

    whole: Prepare
    layers: Prepare
    is_quick: bool
    in_int8: Callable[[nn.Module, Tensor, int], Prepared] | None = None


def preparing(deployment: Deployment) -> Preparing:
    """Return how networks are made ready in a deployment's runtime and precision."""
    runtime = find_runtime(deployment.runtime)
    if deployment.precision == FLOAT32:
        quick = runtime.prepare_layers
        return Preparing(runtime.on, quick or runtime.prepare, quick is not None)
    assert runtime.prepare_onnx is not None, "checked by `runtime_for`"
    run = runtime.prepare_onnx
    if deployment.precision == AUTO:
        quick = runtime.prepare_layers or runtime.prepare
        mixed = partial(_prepare_layers_int8, run)
        return Preparing(partial(prepare_int8, run), quick, is_quick=False, in_int8=mixed)
    return Preparing(partial(prepare_int8, run), partial(_prepare_layers_int8, run), is_quick=True)


def prepare_int8(
    run: PrepareOnnx, network: nn.Module, example: Tensor, *, float32: Collection[str] = ()
) -> Prepared:
    """Make a network in int8 ready to run, with scales that are of use for its time alone.

    Args:
        run: Of the runtime.
        network: Not modified.
        example: An input ``(batch, …)``.
        float32: Names of layers that stay float32.
    """
    from onebyone.quantizing.untrained import int8_form  # noqa: PLC0415 - only int8 needs it

    content = to_onnx(_distinct(network), example)
    return run(int8_form(content, float32=float32, inputs=example), example)


def _distinct(network: nn.Module) -> nn.Module:
    """Return a copy in which no two weights are the same.

    The exporter keeps one of equal weights, as new layers of a head may have, under one name.
    """
    drawn = torch.Generator().manual_seed(0)
    copied = copy_network(network)
    with torch.no_grad():
        for parameter in copied.parameters():
            values = torch.randn(parameter.shape, generator=drawn, dtype=torch.float32)
            parameter.copy_(0.05 * values)
    return copied


def _prepare_layers_int8(
    run: PrepareOnnx, network: nn.Module, example: Tensor, first: int = 0
) -> Prepared:
    from onebyone.quantizing.untrained import int8_form  # noqa: PLC0415 - only int8 needs it

    return run(int8_form(layers_to_onnx(network, example), first=first), example)


def runtime_for(precision: str, runtime: str | None) -> str | None:
    """Return the runtime that a plan is made for; int8 is always planned for one.

    Raises:
        OptionError: If the runtime does not run networks in this precision.
        MissingExtraError: If the package is missing that int8 networks are written with.
    """
    if precision == FLOAT32:
        return runtime
    able = [each.name for each in RUNTIMES.values() if each.prepare_onnx is not None]
    name = able[0] if runtime is None else runtime
    if find_runtime(name).prepare_onnx is None:
        raise OptionError(
            f"`precision` must be 'float32' in the runtime {name!r}, got {precision!r}: int8 is "
            f"planned for {' and '.join(able)}. Choose one of these (`--runtime {able[0]}`). "
            "`onebyone export --precision int8 --format executorch` writes any network for "
            "ExecuTorch."
        )
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("onnx", "onnx", "The precision int8")
    return name


def in_precision(found: Survey, deployment: Deployment | None) -> Survey:
    """Return options with the bytes of weights as they are deployed.

    In int8 the original keeps those of float32, of which budgets in percent are.
    """
    if deployment is None:
        return found
    if deployment.precision == FLOAT32:
        return found.in_floats_of(find_runtime(deployment.runtime).float_bytes)
    if deployment.precision == AUTO:
        return found  # each option says what its weights take
    small = found.in_floats_of(INT8_BYTES)
    unchanged = replace(found.before, bytes=weight_bytes(found.network, float_bytes=INT8_BYTES))
    return replace(small, before=found.before, unchanged=unchanged)
