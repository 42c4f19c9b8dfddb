"""PyTorch's own kernels: eager, with channels last, and with weights packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import OptionError
from onebyone.precision import float32_in, has_bf16
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.outputs import SAME_OUTPUTS, difference, outputs_of
from onebyone.runtimes.packing import pack
from onebyone.sites import evaluation_copy


def in_inference_mode(
    network: Callable[..., Any], example: Tensor, precision: str = "float32"
) -> Callable[[], Any]:
    """Return a function that runs a network on one input, without what training needs."""

    def forward() -> Any:
        with torch.inference_mode():
            return network(example)

    return computing(forward, example, precision)


def computing(forward: Callable[[], Any], example: Tensor, precision: str) -> Callable[[], Any]:
    """Return a function that computes float32 on a GPU as the precision says, whatever torch would.

    Between the calls torch is set as the caller had it; on a CPU nothing is to be set.
    """
    if not example.is_cuda or precision not in ("float32", "tf32"):
        return forward

    def run() -> Any:
        with float32_in(precision):
            return forward()

    return run


def ready_copy(
    model: nn.Module, example: Tensor, precision: str = "float32", *, channels_last: bool = False
) -> tuple[nn.Module, Tensor]:
    """Return an evaluation copy on the example's device, and the example, laid out and cast."""
    if precision == "tf32" and not example.is_cuda:
        raise OptionError(
            f"A runtime with :tf32 needs an input on a cuda device, but it is on {example.device}, "
            "where there is no TF32. Leave :tf32 out."
        )
    network = evaluation_copy(model, device=example.device)
    if precision == "bf16":
        network, example = network.to(torch.bfloat16), example.to(torch.bfloat16)
    if channels_last and example.ndim == 4:
        network = network.to(memory_format=torch.channels_last)
        example = example.contiguous(memory_format=torch.channels_last)
    return network, example


def prepare_eager(model: nn.Module, example: Tensor, precision: str = "float32") -> Prepared:
    """Run as PyTorch does by itself; with weights and activations in bf16 if that is asked for."""
    return Prepared(in_inference_mode(*ready_copy(model, example, precision), precision))


def prepare_channels_last(
    model: nn.Module, example: Tensor, precision: str = "float32"
) -> Prepared:
    """Run with weights and activations laid out with their channels last."""
    ready = ready_copy(model, example, precision, channels_last=True)
    return Prepared(in_inference_mode(*ready, precision))


def prepare_packed(model: nn.Module, example: Tensor) -> Prepared:
    """Run with the passes of :mod:`onebyone.runtimes.packing`; as it is where they change it."""
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
    packed, done = pack(network, laid)
    plain = in_inference_mode(network, laid)
    forward = in_inference_mode(packed, laid)
    if bf16:
        return Prepared(forward, {"packing": str(done)})
    try:
        same = difference(outputs_of(plain()), outputs_of(forward())).relative <= SAME_OUTPUTS
    except Exception as error:  # noqa: BLE001 - whatever the pass broke, the plain network runs
        return Prepared(plain, {"packing": f"none: the packed network failed: {error}"})
    if not same:
        return Prepared(plain, {"packing": "none: the packed network gave other outputs"})
    return Prepared(forward, {"packing": str(done)})
