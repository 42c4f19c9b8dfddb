"""Inspects whether a layer computes what its class does.

The class is not enough. A forward may be set on the instance, a method of the class may be
replaced, hooks may be registered, or the weight may be of another type.
:mod:`onebyone.rewrites.plain` measures what inspection cannot find.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Types of weights that layers compute with directly.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A class that overrides one of these may do anything before and after its forward.
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattribute__")
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
# The methods in which torch's classes compute.
_METHODS = ("forward", "_conv_forward", "_output_padding")


def why_not_its_class(module: nn.Module) -> str | None:
    """Return why a layer may not compute what its class does, in words, or ``None`` if it does.

    Examples:
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> why_not_its_class(conv) is None
        True
        >>> conv.forward = lambda x: x
        >>> why_not_its_class(conv)
        'has a forward of its own, set on the instance'
    """
    return (
        why_called_otherwise(module)
        or ("has hooks, which a rewrite would lose" if has_hooks(module) else None)
        or _why_weights(module)
    )


def why_called_otherwise(module: nn.Module) -> str | None:
    """Return why a module's call may not be its class's forward, in words, or ``None`` if it is."""
    kind = type(module)
    for name in vars(module):
        if callable(getattr(kind, name, None)) and name not in ("extra_repr", "__repr__"):
            return f"has a {name} of its own, set on the instance"
    for name in _CALLS:
        own = getattr(kind, name)
        if own is not getattr(nn.Module, name) and not _is_torchs(own):
            return f"is a {kind.__name__}, whose class overrides {name}"
    replaced = _replaced_methods(kind)
    return f"is a {kind.__name__}, whose {replaced} was replaced" if replaced else None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks for its forward or backward pass."""
    return any(vars(module).get(kind) for kind in _HOOKS)


def _replaced_methods(kind: type[nn.Module]) -> str:
    """Return the methods of torch's classes that someone replaced, as text; empty if none."""
    replaced = [
        name
        for base in kind.__mro__
        if base.__module__.startswith("torch.nn.")
        for name in _METHODS
        if name in vars(base) and not _is_torchs(vars(base)[name])
    ]
    return ", ".join(replaced)


def _is_torchs(function: object) -> bool:
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename.startswith(_TORCH)


def _why_weights(module: nn.Module) -> str | None:
    for name in ("weight", "bias"):
        if isinstance(vars(module).get(name), Tensor):
            return f"has a {name} that is not a parameter"
    for name, tensor in module.named_parameters():
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"has a {name} of type {type(tensor).__name__}"
        if tensor.is_quantized or tensor.dtype not in _DTYPES:
            return f"has a {name} of {str(tensor.dtype).removeprefix('torch.')}"
    return None
