"""A head: the calls between the last map and the scores, and which layers may be among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU,
    nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Identity, nn.Dropout, nn.AlphaDropout,
)  # fmt: skip


class NotFound(Exception):  # noqa: N818 - a finding, not an error
    """There is no chain to rewrite; the message says why."""


@dataclass(frozen=True)
class Call:
    """A call in the chain, of a module or of a function.

    Attributes:
        role: ``average``: a global average; ``mean``: one that gives a vector; ``pool``: a pooling
            that changes nothing at this size; ``flatten``; ``permute``; ``dropout``; ``linear``;
            ``step``: what is between linear layers.
        caller: Name of the module whose forward makes the call.
        op: The fx node's.
        target: The fx node's: a module's name, a function, or a method's name.
        module: What is called, or a module that does what the function does.
        alone: Whether this is the only call of a module that has one name only.
    """

    role: str
    caller: str
    op: str
    target: Any
    module: nn.Module | None = None
    alone: bool = False

    @property
    def name(self) -> str:
        """The name of the module that is called; empty for a function."""
        return str(self.target) if self.op == "call_module" else ""


@dataclass(frozen=True)
class Chain:
    """The calls from a map to the scores.

    Attributes:
        calls: In order; the last is the last linear layer's.
        opened: Names of the modules that the chain is inside of.
        channels: Of the map that goes in.
        height: Of that map, in pixels.
        width: Of that map, in pixels.
        order: Dimensions by which the map is permuted before it is flattened, or ``None``.
        by_place: Whether what follows the chain treats each place of a map of scores alike.
        note: What a user should know, or nothing.
    """

    calls: tuple[Call, ...]
    opened: tuple[str, ...]
    channels: int
    height: int
    width: int
    order: tuple[int, ...] | None
    by_place: bool
    note: str

    @property
    def averaged(self) -> bool:
        """Whether the map is averaged over its pixels."""
        return any(call.role in ("average", "mean") for call in self.calls)


def is_understood_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or a subclass known to compute the same."""
    # timm's Linear differs from torch's only in how it is scripted.
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == (
        "timm.layers.linear",
        "Linear",
    )


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is known to treat each number alone, or each channel at a place."""
    kind = type(module)
    # timm's activations without weights are functions of single numbers.
    timms = kind.__module__.startswith("timm.layers.activations") and not list(module.parameters())
    return kind in ELEMENTWISE or timms


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a known normalization of vectors."""
    kind = type(module)
    return kind in (nn.BatchNorm1d, nn.LayerNorm) or (kind.__module__, kind.__name__) == (
        "timm.layers.norm",
        "LayerNorm",
    )
