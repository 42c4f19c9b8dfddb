"""Two layers as one layer: a batch norm and its neighbour, or two convolutions in a row."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from onebyone.networks.conv_layers import (
    bias_of,
    effective_weight,
    is_pointwise,
    is_trained,
    is_transposed,
    kernel_of,
    padding_of,
    pads_dynamically,
    pointwise_like,
    set_kernel,
    shape_of,
    spatial_like,
    weight_of,
)

# Batch norms with buffers for weights, and those with an activation inside, by module and name so
# that neither library need be imported.
_FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_WITH_ACTIVATION = {
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.layers.norm_act", "SyncBatchNormAct"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


# ---------------------------------------------------------------- batch norms


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of any kind, foldable or not."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
        return True
    return _identity(module) in _FROZEN


def why_no_affine(norm: nn.Module) -> str | None:
    """Return why a batch norm is not one scale and one shift a channel, or ``None`` if it is."""
    kind = type(norm).__name__
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has not been run yet"
    known = _identity(norm) in _FROZEN | _WITH_ACTIVATION
    if not known and type(norm).forward not in _NORM_FORWARDS:
        return f"{kind} has a forward of its own"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "it keeps no running statistics, so that it depends on the batch"
    return None


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, each ``(channels,)``, of a batch norm in evaluation.

    In float64 on the CPU.
    """
    layer = cast("Any", norm)
    mean, variance = _exact(layer.running_mean), _exact(layer.running_var)
    scale = (variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * _exact(layer.weight)
    shift = -mean * scale
    return scale, shift if layer.bias is None else shift + _exact(layer.bias)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def rest_of(norm: nn.Module) -> nn.Module:
    """Return what is left of a batch norm whose scale and shift went elsewhere."""
    parts = OrderedDict(
        (name, child)
        for name, child in norm.named_children()
        if name in ("drop", "act") and type(child) is not nn.Identity
    )
    return nn.Sequential(parts) if parts else nn.Identity()


def _identity(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


# ---------------------------------------------------------------- two layers as one


@dataclass(frozen=True)
class Merge:
    """The layer that two layers in a row are.

    Attributes:
        like: The one of the two whose kernel size and padding it has.
        stride: ``None`` for a linear layer.
        groups: Into how many separate parts both layers can be divided.
        taps: Places of its kernel.
    """

    like: nn.Module
    channels: int
    out: int
    groups: int
    taps: int
    bias: bool
    factor: tuple[int, ...]
    first_is_pointwise: bool

    @property
    def weights(self) -> int:
        """Values of its kernel."""
        return self.out * (self.channels // self.groups) * self.taps

    @property
    def params(self) -> int:
        """Its parameters."""
        return self.weights + (self.out if self.bias else 0)


def merge_of(first: nn.Module, second: nn.Module, *, values: bool) -> Merge | str:
    """Return the layer that two layers in a row are, or why they are none.

    Args:
        first: A layer that is known.
        second: A layer that is known and takes the first one's output.
        values: Whether a bias that is zero counts as none.
    """
    reason = _why_not_of_a_kind(first, second)
    if reason is not None:
        return reason
    # A k×k kernel and then a 1×1 is always one kernel; a 1×1 and then a k×k, but for the border.
    first_is_pointwise = not acts_in_place(second)
    inner, outer = (first, second) if first_is_pointwise else (second, first)
    if not acts_in_place(inner):
        return "both have kernels of more than one place, or padding"
    reason = _why_no_stride(inner, outer, first_is_pointwise=first_is_pointwise)
    if reason is None and first_is_pointwise:
        reason = _why_not_at_border(first, second, values=values)
    if reason is not None:
        return reason
    a, b = shape_of(first), shape_of(second)
    return Merge(
        like=outer,
        channels=a.channels,
        out=b.out,
        groups=math.gcd(a.groups, b.groups),
        taps=max(a.taps, b.taps),
        bias=bias_of(first) is not None or bias_of(second) is not None,
        factor=() if isinstance(inner, nn.Linear) else tuple(cast("nn.Conv2d", inner).stride),
        first_is_pointwise=first_is_pointwise,
    )


def _why_not_of_a_kind(first: nn.Module, second: nn.Module) -> str | None:
    if axes_of(first) != axes_of(second):
        return "one is a linear layer or a convolution of other dimensions"
    weights = weight_of(first), weight_of(second)
    if weights[0].dtype != weights[1].dtype or weights[0].device != weights[1].device:
        return "they are of different types or on different devices"
    if is_trained(first) != is_trained(second):
        return "one is frozen and the other is trained"
    return None


def axes_of(layer: nn.Module) -> int:
    """Return how many axes a kernel moves along; none of a linear layer."""
    return 0 if isinstance(layer, nn.Linear) else len(cast("nn.Conv2d", layer).kernel_size)


def acts_in_place(layer: nn.Module) -> bool:
    """Whether each output place of a layer is made from one input place, and none from padding."""
    if isinstance(layer, nn.Linear):
        return True
    return is_pointwise(layer) and not is_transposed(layer) and not _pads(layer)


def _pads(layer: nn.Module) -> bool:
    if pads_dynamically(layer):
        return not is_pointwise(layer)
    return any(padding_of(layer))


def _why_no_stride(inner: nn.Module, outer: nn.Module, *, first_is_pointwise: bool) -> str | None:
    """Return why the stride of a 1×1 cannot go into its neighbour, or ``None`` where it can."""
    if isinstance(inner, nn.Linear) or set(cast("nn.Conv2d", inner).stride) == {1}:
        return None
    layer = cast("nn.Conv2d", outer)
    if is_transposed(outer) or pads_dynamically(outer) or isinstance(layer.padding, str):
        return "the stride of the 1×1 cannot be carried over to how the other one pads"
    if first_is_pointwise and _pads(outer) and layer.padding_mode != "zeros":
        return f"the 1×1 skips places that the padding ({layer.padding_mode}) of the other repeats"
    return None


def _why_not_at_border(first: nn.Module, second: nn.Module, *, values: bool) -> str | None:
    """Return why a 1×1's bias cannot go through what follows it, or ``None`` where it can."""
    bias = bias_of(first)
    if bias is None or (not values or not bool(bias.any())):
        return None
    return why_uneven(second)


def why_uneven(layer: nn.Module) -> str | None:
    """Return why a layer makes something else of a constant map at its border than inside."""
    if isinstance(layer, nn.Linear):
        return None
    convolution = cast("nn.ConvTranspose2d", layer)
    if is_transposed(layer):
        amounts = cast("Sequence[int]", convolution.padding)
        plain = {*convolution.stride, *convolution.kernel_size} == {1}
        if plain and not any((*amounts, *convolution.output_padding)):
            return None
        return "the places of a transposed convolution do not all meet the whole kernel"
    if convolution.padding_mode == "zeros" and _pads(layer):
        return "the zeros that the convolution pads with have no shift"
    return None


def merged(merge: Merge, first: nn.Module, second: nn.Module) -> nn.Module:
    """Return the one layer with its weights."""
    a = coarse(kernel_of(first), merge.groups)
    b = coarse(kernel_of(second), merge.groups)
    if merge.first_is_pointwise:
        kernel = torch.einsum("gomp,gmc->gocp", b, a[..., 0])
    else:
        kernel = torch.einsum("gom,gmcp->gocp", b[..., 0], a)
    new = _structure(merge)
    set_kernel(new, kernel)
    if merge.bias:
        carried, own = bias_of(first), bias_of(second)
        total = torch.zeros(merge.out, dtype=torch.float64) if own is None else own
        if carried is not None:
            through = b.sum(3)
            inner = carried.reshape(merge.groups, -1)
            total = total + torch.einsum("gom,gm->go", through, inner).flatten()
        _write_bias(new, total)
    trained = is_trained(first)
    new.requires_grad_(trained)
    if merge.bias and trained:
        biases = [m.bias for m in (first, second) if isinstance(m.bias, nn.Parameter)]
        cast("Any", new).bias.requires_grad = any(bias.requires_grad for bias in biases)
    return new


def _structure(merge: Merge) -> nn.Module:
    groups, bias = merge.groups, merge.bias
    if isinstance(merge.like, nn.Linear):
        return pointwise_like(merge.like, merge.channels, merge.out, bias=bias)
    new = spatial_like(merge.like, merge.channels, merge.out, groups=groups, bias=bias)
    if set(merge.factor) == {1}:
        return new
    layer = cast("Any", new)
    inside = merge.factor if merge.first_is_pointwise else (1,) * len(merge.factor)
    made: nn.Module = type(layer)(
        merge.channels,
        merge.out,
        layer.kernel_size,
        stride=_product(layer.stride, merge.factor),
        padding=_product(layer.padding, inside),
        dilation=_product(layer.dilation, inside),
        groups=groups,
        bias=bias,
        padding_mode=layer.padding_mode,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    return made


def _product(left: Any, right: Sequence[int]) -> Any:
    return tuple(a * b for a, b in zip(left, right, strict=True))


def coarse(kernel: Tensor, groups: int) -> Tensor:
    """Return a kernel ``(groups, out, in, places)`` over fewer groups, with zeros between."""
    fine, out, channels, taps = kernel.shape
    if fine == groups:
        return kernel
    parts = fine // groups
    wide = kernel.new_zeros(groups, parts, out, parts, channels, taps)
    each = torch.arange(parts)
    wide[:, each, :, each] = kernel.reshape(groups, parts, out, channels, taps).transpose(0, 1)
    return wide.reshape(groups, parts * out, parts * channels, taps)


def with_affine(layer: nn.Module, norm: nn.Module, *, before: bool) -> nn.Module:
    """Return a layer with a batch norm's scale and shift in it; the layer itself where it can."""
    scale, shift = affine_of(norm)
    kernel, bias = kernel_of(layer), bias_of(layer)
    groups = len(kernel)
    if before:
        kernel = kernel * scale.reshape(groups, -1, 1, 1)
        bias = shift if bias is None else scale * bias + shift
    else:
        carried = torch.einsum("gocp,gc->go", kernel, shift.reshape(groups, -1)).flatten()
        kernel = kernel * scale.reshape(groups, 1, -1, 1)
        bias = carried if bias is None else carried + bias
    biases = [p for p in (layer.bias, norm.bias) if isinstance(p, nn.Parameter)]
    trained = any(p.requires_grad for p in biases)
    new = layer
    if nn.utils.parametrize.is_parametrized(layer) or effective_weight(layer) is not layer.weight:
        # A weight that is computed at each call becomes a plain one.
        shape = shape_of(layer)
        if isinstance(layer, nn.Linear):
            new = pointwise_like(layer, shape.channels, shape.out, bias=True)
        else:
            new = spatial_like(layer, shape.channels, shape.out, groups=groups, bias=True)
        new.requires_grad_(is_trained(layer))
    set_kernel(new, kernel)
    _write_bias(new, bias)
    cast("Any", new).bias.requires_grad = trained
    return new


def _write_bias(layer: nn.Module, bias: Tensor) -> None:
    if isinstance(layer.bias, nn.Parameter):
        with torch.no_grad():
            layer.bias.copy_(bias)
        return
    weight = cast("Tensor", layer.weight)
    layer.bias = nn.Parameter(bias.to(device=weight.device, dtype=weight.dtype))
