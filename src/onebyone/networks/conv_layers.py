"""Convolutions and linear layers as matrix products: a kernel times rows of input values.

At each output position a convolution multiplies its kernel with one row: the values under the
kernel. A transposed convolution is treated as a plain convolution over its input with zeros in
between (Dumoulin, Visin 2016, arXiv:1603.07285, section 4).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.networks.plain_layers import why_not_its_class

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# timm's supported subclasses, by module and name so that timm need not be imported. The first set
# pads to the input's size over the stride ("same"); the second standardizes its weight at each
# call.
_TIMM_PADDED = {
    ("timm.layers.conv2d_same", "Conv2dSame"),
    ("timm.layers.std_conv", "StdConv2dSame"),
    ("timm.layers.std_conv", "ScaledStdConv2dSame"),
}
_TIMM_STANDARDIZED = {
    ("timm.layers.std_conv", name)
    for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
}
_TIMM_LINEAR = ("timm.layers.linear", "Linear")


def why_unknown(module: nn.Module) -> str | None:  # noqa: PLR0911 - a reason a line
    """Return why a module is not supported, in words, or ``None`` if it is.

    Supported are torch's convolutions and linear layers, by exact type or with an unchanged
    forward, also with a parametrized weight (weight or spectral norm); and timm's subclasses that
    pad dynamically or standardize their weight. Each must also compute what its class says: see
    :func:`~onebyone.networks.plain_layers.why_not_its_class`.
    """
    kind = type(module).__name__
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has not been run yet, so it has no weight"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is a torch.jit module, which cannot be changed"
    if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torchao.")):
        return f"{kind} is quantized"
    if is_linear(module):
        return why_not_its_class(module) or _why_other_shape(module)
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return f"{kind} is neither a convolution nor a linear layer that is understood"
    if _identity(module) in _TIMM_PADDED | _TIMM_STANDARDIZED:
        return why_not_its_class(module) or _why_other_shape(module)
    base = _base(module)
    # A subclass may compute its weight or its padding in its own forward.
    if type(module).forward is not base.forward:
        return f"{kind} has a forward of its own"
    if not is_transposed(module) and type(module)._conv_forward is not base._conv_forward:  # noqa: SLF001
        return f"{kind} computes its convolution in its own way"
    return why_not_its_class(module) or _why_other_shape(module)


def _why_other_shape(module: nn.Module) -> str | None:
    """Return how the weight's shape differs from the attributes, such as after pruning."""
    shape, weight = shape_of(module), weight_of(module)
    sizes = cast("nn.Conv2d", module).kernel_size if not isinstance(module, nn.Linear) else ()
    channels = (shape.out, shape.group_channels)
    if shape.transposed:
        channels = (shape.channels, shape.group_out)
    wanted = (*channels, *sizes)
    if tuple(weight.shape) == wanted:
        return None
    found, said = ("×".join(map(str, each)) for each in (weight.shape, wanted))
    return f"its weight is {found}, but its attributes say {said}"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or a subclass known to compute the same."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _identity(module) == _TIMM_LINEAR


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution."""
    return isinstance(module, _TRANSPOSED)


def _identity(module: nn.Module) -> tuple[str, str]:
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        # torch makes a subclass on the fly.
        kind = kind.__bases__[0]
    return kind.__module__, kind.__name__


def _base(module: nn.Module) -> type[Any]:
    return next(kind for kind in (*_CONVOLUTIONS, *_TRANSPOSED) if isinstance(module, kind))


# ---------------------------------------------------------------- the kernel


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer.

    Attributes:
        channels: Input channels.
        out: Output channels.
        groups: Number of groups that both are divided into.
        taps: Positions of the kernel (9 for a 3×3).
        transposed: Whether it is a transposed convolution.
    """

    channels: int
    out: int
    groups: int
    taps: int
    transposed: bool = False

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one group."""
        return self.out // self.groups

    @property
    def values(self) -> int:
        """Input values that one output value depends on."""
        return self.group_channels * self.taps


def shape_of(module: nn.Module) -> Shape:
    """Return the sizes of a supported layer."""
    if isinstance(module, nn.Linear):
        return Shape(module.in_features, module.out_features, 1, 1)
    layer = cast("nn.Conv2d", module)
    return Shape(
        layer.in_channels,
        layer.out_channels,
        layer.groups,
        math.prod(layer.kernel_size),
        is_transposed(module),
    )


def sides_of(module: nn.Module) -> tuple[int, int] | None:
    """Return height and width of a 2-d kernel if both are above 1, else ``None``."""
    size = () if is_linear(module) else cast("nn.Conv2d", module).kernel_size
    return (size[0], size[1]) if len(size) == 2 and min(size) > 1 else None


def kernel_of(module: nn.Module) -> Tensor:
    """Return a layer's kernel of shape ``(groups, out, in, positions)``, in float64 on the CPU.

    Channels are those of one group. Positions are in the order of the rows that :func:`input_rows`
    returns; the kernel of a transposed convolution is flipped for that.
    """
    shape = shape_of(module)
    weight = effective_weight(module).detach().to(device="cpu", dtype=torch.float64)
    if not shape.transposed:
        return weight.reshape(shape.groups, shape.group_out, shape.group_channels, shape.taps)
    weight = weight.reshape(shape.groups, shape.group_channels, shape.group_out, shape.taps)
    return weight.transpose(1, 2).flip(3)


def set_kernel(module: nn.Module, kernel: Tensor) -> None:
    """Write a kernel ``(groups, out, in, positions)`` into a plain layer, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_transposed(module):
        kernel = kernel.flip(3).transpose(1, 2)
    with torch.no_grad():
        weight.copy_(kernel.reshape(weight.shape))


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a layer's bias ``(out,)`` in float64 on the CPU, or ``None``."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return None
    return bias.detach().to(device="cpu", dtype=torch.float64)


def weight_of(module: nn.Module) -> Tensor:
    """Return a layer's weight in evaluation mode, without changing the layer.

    In training mode a spectral norm updates itself each time its weight is read.
    """
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        computed = cast("nn.ModuleDict", module.parametrizations)["weight"]
        if any(part.training for part in computed.modules()):
            return cast("Tensor", copy.deepcopy(computed).eval()())
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def effective_weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer multiplies with, shaped as its parameter."""
    weight = weight_of(module)
    if _identity(module) not in _TIMM_STANDARDIZED:
        return weight
    # Its forward normalizes the weight, so the weight is recorded where it calls `F.conv2d`.
    layer = cast("nn.Conv2d", module)
    blank = weight.new_zeros(1, layer.in_channels, *layer.kernel_size)
    with torch.no_grad(), _WeightOfConvolution() as seen:
        layer(blank)
    assert isinstance(seen.weight, Tensor)
    return seen.weight


class _WeightOfConvolution(torch.overrides.TorchFunctionMode):
    """Records the weight of the convolution that is called in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: object = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is F.conv2d:
            self.weight = args[1]
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- layers of the same geometry


def is_trained(module: nn.Module) -> bool:
    """Return whether a layer's weight is trained; what replaces a frozen layer stays frozen."""
    return any(p.requires_grad for n, p in module.named_parameters() if not n.endswith("bias"))


def pointwise_like(
    module: nn.Module,
    channels: int,
    out: int,
    *,
    groups: int = 1,
    bias: bool,
    stride: Sequence[int] | None = None,
) -> nn.Module:
    """Return a new 1×1 layer (1-d, 2-d, 3-d, or linear) like ``module`` in kind, dtype and device.

    Args:
        module: The layer to follow. Not modified.
        channels: Input channels.
        out: Output channels.
        groups: Number of groups.
        bias: Whether it has a bias.
        stride: Along each axis; default 1.
    """
    options = _options(module)
    if isinstance(module, nn.Linear):
        return nn.Linear(channels, out, bias=bias, **options)
    axes = len(cast("nn.Conv2d", module).kernel_size)
    steps = tuple(stride or (1,) * axes)
    made: nn.Module = _CONVOLUTIONS[axes - 1](
        channels, out, 1, stride=cast("Any", steps), groups=groups, bias=bias, **options
    )
    return made


def spatial_like(
    module: nn.Module,
    channels: int,
    out: int,
    *,
    groups: int = 1,
    bias: bool,
    axis: int | None = None,
) -> nn.Module:
    """Return a new plain layer of other widths with the geometry of ``module``.

    It keeps kernel size, stride, padding, padding mode, dilation and output padding, and dynamic
    padding. It drops a parametrization or standardization of the weight.

    Args:
        module: A convolution. Not modified.
        channels: Input channels.
        out: Output channels.
        groups: Number of groups.
        bias: Whether it has a bias.
        axis: The only axis that keeps the geometry; the others get kernel size 1 and stride 1. All
            axes if not given. One layer per axis, in sequence, covers the same input as ``module``.
    """
    layer = cast("Any", module)

    def along(sizes: Any, other: int) -> Any:
        if axis is None or isinstance(sizes, str):
            return sizes
        return tuple(size if at == axis else other for at, size in enumerate(sizes))

    kernel = along(layer.kernel_size, 1)
    options: dict[str, Any] = {
        "stride": along(layer.stride, 1),
        "dilation": along(layer.dilation, 1),
        "groups": groups,
        "bias": bias,
        **_options(module),
    }
    if pads_dynamically(module):
        from timm.layers.conv2d_same import Conv2dSame  # noqa: PLC0415 - heavy; loaded already

        place = {key: options.pop(key) for key in ("device", "dtype")}  # not known to timm 1.0.11
        return cast("nn.Module", Conv2dSame(channels, out, kernel, **options).to(**place))
    if is_transposed(module):
        options["output_padding"] = along(layer.output_padding, 0)
    options |= {"padding": along(layer.padding, 0), "padding_mode": layer.padding_mode}
    return cast("nn.Module", _base(module)(channels, out, kernel, **options))


def pads_dynamically(module: nn.Module) -> bool:
    """Return whether the padding depends on the input's size, as TensorFlow's ``SAME`` does."""
    return _identity(module) in _TIMM_PADDED and bool(getattr(module, "same_pad", True))


def _options(module: nn.Module) -> dict[str, Any]:
    weight = weight_of(module)
    return {"device": weight.device, "dtype": weight.dtype}


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a convolution's kernel size is 1."""
    return math.prod(cast("nn.Conv2d", module).kernel_size) == 1


# ---------------------------------------------------------------- rows


def input_rows(module: nn.Module, x: Tensor, *, places: Sequence[Tensor] | None = None) -> Tensor:
    """Return the values under the kernel at each output position.

    Args:
        module: A supported layer. Not modified.
        x: Its input, with or without a batch.
        places: Indices of output positions along each axis, each of shape ``(positions,)``, as
            :func:`choose_places` returns them; ``None`` for all.

    Returns:
        Rows of shape ``(rows, channels × kernel positions)``. The channels of a group are adjacent.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows if places is None else rows[places[0]]
    layer = cast("nn.Conv2d", module)
    axes = len(layer.kernel_size)
    x = x if x.ndim == axes + 2 else x.unsqueeze(0)
    view = _spread(module, x) if is_transposed(module) else pad(module, x)
    steps = (1,) * axes if is_transposed(module) else layer.stride
    for axis, (size, step, gap) in enumerate(
        zip(layer.kernel_size, steps, layer.dilation, strict=True)
    ):
        view = view.unfold(axis + 2, gap * (size - 1) + 1, step)[..., ::gap]
    # Its axes are now: batch, channels, the output's axes, the kernel's axes.
    view = view.flatten(2, axes + 1) if places is None else _at(view, places)
    return view.transpose(1, 2).reshape(view.shape[0] * view.shape[2], -1)


def output_rows(module: nn.Module, y: Tensor, *, places: Sequence[Tensor] | None = None) -> Tensor:
    """Return a layer's output as rows ``(rows, out)``, in the order of :func:`input_rows`."""
    if isinstance(module, nn.Linear):
        rows = y.reshape(-1, y.shape[-1])
        return rows if places is None else rows[places[0]]
    axes = len(cast("nn.Conv2d", module).kernel_size)
    y = y if y.ndim == axes + 2 else y.unsqueeze(0)
    chosen = y.flatten(2) if places is None else _at(y, places)
    return chosen.transpose(1, 2).reshape(-1, y.shape[1])


def _at(values: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the values at positions along the axes after batch and channels."""
    every = slice(None)
    chosen: Tensor = values[(every, every, *places)]  # type: ignore[index]  # not in torch's stubs
    return chosen


def output_places(module: nn.Module, y: Tensor) -> int:
    """Return the number of output positions of one example (of the whole batch if linear)."""
    if isinstance(module, nn.Linear):
        return y[..., 0].numel()
    return math.prod(y.shape[-len(cast("nn.Conv2d", module).kernel_size) :])


def choose_places(
    module: nn.Module, y: Tensor, count: int, generator: torch.Generator
) -> list[Tensor] | None:
    """Draw output positions, or return ``None`` if there are at most ``count``.

    Args:
        module: A supported layer.
        y: Its output; only its shape is used.
        count: Positions per example (per batch for a linear layer).
        generator: On the CPU; draws without replacement.
    """
    total = output_places(module, y)
    if total <= count:
        return None
    drawn = torch.randperm(total, generator=generator)[:count].sort().values.to(y.device)
    if isinstance(module, nn.Linear):
        return [drawn]
    sizes = y.shape[-len(cast("nn.Conv2d", module).kernel_size) :]
    return list(torch.unravel_index(drawn, tuple(sizes)))


def padding_of(module: nn.Module) -> tuple[int, ...]:
    """Return a convolution's padding before and after each axis, the last axis first."""
    layer = cast("Any", module)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        # The user may have changed it after construction.
        return tuple(size for size in reversed(layer.padding) for _ in range(2))
    # torch stores the amounts for the other modes and for ``padding="same"``.
    return tuple(layer._reversed_padding_repeated_twice)  # noqa: SLF001


def pad(module: nn.Module, x: Tensor) -> Tensor:
    """Pad an input ``(batch, channels, …)`` as the convolution itself does."""
    layer = cast("Any", module)
    if pads_dynamically(module):
        amounts = _same_amounts(layer, x.shape[2:])
    else:
        amounts = list(padding_of(module))
    if not any(amounts):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, amounts, mode=mode)


def _same_amounts(layer: Any, sizes: Sequence[int]) -> list[int]:
    """Return TensorFlow's ``SAME`` padding, last axis first."""
    amounts: list[int] = []
    for size, kernel, step, gap in zip(
        sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        total = max((math.ceil(size / step) - 1) * step + (kernel - 1) * gap + 1 - size, 0)
        amounts = [total // 2, total - total // 2, *amounts]
    return amounts


def _spread(module: nn.Module, x: Tensor) -> Tensor:
    """Insert zeros between and around the inputs of a transposed convolution.

    On the result it is a plain convolution of stride 1.
    """
    layer = cast("nn.ConvTranspose2d", module)
    padding = cast("tuple[int, ...]", layer.padding)
    axes = len(layer.kernel_size)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in layer.stride))] = x
    amounts: list[int] = []
    for axis in range(axes):
        edge = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - padding[axis]
        # A negative amount crops.
        amounts = [edge, edge + layer.output_padding[axis], *amounts]
    return F.pad(wide, amounts)
