"""The runtimes with PyTorch's own kernels: eager, channels-last, and packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError
from onebyone.core.precision import float32_in, has_bf16
from onebyone.core.tensor_trees import (
    Inputs,
    device_of,
    in_floats,
    map_tensors,
    only_tensor,
    tensors_in,
)
from onebyone.networks.surgery import evaluation_copy, lay_channels_last, repeatable
from onebyone.runtimes.base import PRECISIONS, Prepared, need_device
from onebyone.runtimes.output_check import difference, outputs_of
from onebyone.runtimes.packed.network import pack


def in_inference_mode(
    network: nn.Module, example: Inputs, precision: str = "float32"
) -> Callable[[], Any]:
    """Return a function that runs a network on inputs in inference mode."""
    once = repeatable(network, example)

    def forward() -> Any:
        with torch.inference_mode():
            return once()

    return computing(forward, example, precision)


def computing(forward: Callable[[], Any], example: Inputs, precision: str) -> Callable[[], Any]:
    """Return a function that computes float32 on a GPU in a given precision (float32 or TF32).

    Torch's setting changes only during a call. On a CPU there is nothing to set.
    """
    if device_of(example).type != "cuda" or precision not in ("float32", "tf32"):
        return forward

    def run() -> Any:
        with float32_in(precision):
            return forward()

    return run


def ready_copy(
    model: nn.Module, example: Inputs, precision: str = "float32", *, channels_last: bool = False
) -> tuple[nn.Module, Inputs]:
    """Return an evaluation copy on the example's device, and the example, in layout and type."""
    device = device_of(example)
    if precision == "tf32" and device.type != "cuda":
        raise OptionError(
            f"A runtime with :tf32 needs an input on a cuda device, but it is on {device}, "
            "where there is no TF32. Leave :tf32 out."
        )
    network = evaluation_copy(model, device=device)
    dtype = PRECISIONS[precision].dtype
    if dtype is not None:
        network, example = network.to(dtype), in_floats(example, dtype)
    if channels_last and any(tensor.ndim == 4 for tensor in tensors_in(example)):
        lay_channels_last(network)
        example = map_tensors(_laid_channels_last, example)
    return network, example


def _laid_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def prepare_eager(model: nn.Module, example: Inputs, precision: str = "float32") -> Prepared:
    """Run in eager PyTorch; with ``bf16``, weights and activations are in bf16."""
    return Prepared(in_inference_mode(*ready_copy(model, example, precision), precision))


def prepare_channels_last(
    model: nn.Module, example: Inputs, precision: str = "float32"
) -> Prepared:
    """Run with weights and activations in channels-last layout."""
    ready = ready_copy(model, example, precision, channels_last=True)
    return Prepared(in_inference_mode(*ready, precision))


def prepare_packed(model: nn.Module, example: Tensor) -> Prepared:
    """Run packed (:mod:`onebyone.runtimes.packed.network`); unpacked if packing changes outputs."""
    need_device(example, "cpu", "packed")
    return _packed(model, example, bf16=False)


def prepare_packed_bf16(model: nn.Module, example: Tensor) -> Prepared:
    """Run packed, in bf16.

    Raises:
        OptionError: If oneDNN has no bf16 kernels for this processor.
    """
    need_device(example, "cpu", "packed:bf16")
    if not has_bf16(example.device):
        raise OptionError(
            "The runtime 'packed:bf16' needs a processor with bf16 kernels in oneDNN (AVX-512 or "
            "newer), and this one has none. Use 'packed'."
        )
    return _packed(model, example, bf16=True)


def _packed(model: nn.Module, example: Tensor, *, bf16: bool) -> Prepared:
    network, laid = ready_copy(model, example, "bf16" if bf16 else "float32", channels_last=True)
    packed, done = pack(network, only_tensor(laid, "The runtime 'packed'"))
    plain = in_inference_mode(network, laid)
    try:
        forward = in_inference_mode(packed, laid)
        # In bf16 the outputs differ more than this anyway, so there is nothing to compare with.
        same = bf16 or difference(outputs_of(plain()), outputs_of(forward())).same
    except Exception as error:  # noqa: BLE001 - whatever packing broke, the unpacked network runs
        return Prepared(plain, {"packing": f"none: the packed network failed: {error}"})
    if not same:
        return Prepared(plain, {"packing": "none: the packed network gave other outputs"})
    return Prepared(forward, {"packing": str(done)})
