"""Copies of networks and the one place that edits a module tree."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from onebyone.errors import ModelError, OptionError, WeightsError
from onebyone.precision import float32_in

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def as_network(model: object, *, scripted: bool = False) -> nn.Module:
    """Return a network as it is read: of what ``torch.compile`` gave, the network inside.

    Args:
        model: What a user gave. Not modified.
        scripted: Whether a program of TorchScript will do, which can be run and no more.

    Raises:
        ModelError: If it is no module that will do, or one that has no weights yet.
    """
    # Torch's class for it is private, and takes seconds to import.
    inside = getattr(model, "_orig_mod", None)
    if isinstance(inside, nn.Module):
        return as_network(inside, scripted=scripted)
    must = "A network must be a torch.nn.Module"
    if not isinstance(model, nn.Module):
        cure = "Load it with `onebyone.load_model`"
        if isinstance(model, Mapping):
            cure = "If these are its weights, build the network and `load_state_dict` them"
        elif isinstance(model, type):
            cure = "Make an instance of it"
        raise ModelError(f"{must}, got {type(model).__name__}. {cure}.")
    if not scripted and isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{must} whose layers can be read and replaced, got a program of TorchScript. Give "
            "the network that it was made from."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ModelError(
                f"{must} with weights, but {name!r} has no shape yet. Call the network on an "
                "input once."
            )
        if tensor.is_meta:
            raise ModelError(
                f"{must} with weights, but {name!r} is on the meta device. Build the network on a "
                "real one, and load its weights."
            )
    return model


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network; the network itself is only read.

    Raises:
        ModelError: If the network cannot be copied, with the cause and what to do.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        cure = (
            "Free memory, or run where there is more"
            if _is_out_of_memory(error)
            else "Detach tensors that it keeps as attributes, and replace old-style weight norm by "
            "torch.nn.utils.parametrizations"
        )
        raise ModelError(
            f"The network must be deep-copyable, for it is never modified itself, but "
            f"copying {type(model).__name__} failed: {error}. {cure}."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError, told by its words alone.
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


def evaluation_copy(model: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """Return a deep copy in evaluation mode, on ``device`` if one is given."""
    duplicate = copy_network(model).eval()
    return duplicate if device is None else duplicate.to(device)


def in_evaluation_mode(model: nn.Module, *, device: torch.device | str = "cpu") -> nn.Module:
    """Return the network itself if it is in evaluation mode on ``device``, else such a copy."""
    wanted = torch.device(device)
    elsewhere = any(p.device != wanted for p in (*model.parameters(), *model.buffers()))
    if elsewhere or any(module.training for module in model.modules()):
        return evaluation_copy(model, device=wanted)
    return model


def as_device(device: torch.device | str) -> torch.device:
    """Return a device by its name.

    Raises:
        OptionError: If torch knows none of that name, or it is a GPU and there is none.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"The device must be one that torch knows, such as cpu or cuda, got {device!r}."
        ) from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"The device {wanted} must be there, but torch sees no GPU. Use cpu.")
    return wanted


def home_of(model: nn.Module) -> torch.device:
    """Return the device of a network's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def copy_beside(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a deep copy in evaluation mode, on the device of the inputs."""
    return evaluation_copy(model, device=device_of(inputs))


def device_of(inputs: Inputs) -> torch.device:
    """Return the device of the first tensor among a network's inputs."""
    return next((tensor.device for tensor in tensors_in(inputs)), torch.device("cpu"))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network on a tensor, on a tuple of arguments, or on keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network without gradients; its own exceptions become a ``ModelError``.

    On a GPU float32 is computed in full, not in TF32.

    Raises:
        ModelError: If the forward pass fails; says for which shapes and why.
    """
    try:
        with torch.no_grad(), float32_in("float32"):
            return call(model, inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors_in(inputs))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"The network {type(model).__name__} must run on an input of shape {shapes}, but it "
            f"failed: {reason.rstrip('.')}. Check the input's shape (the batch comes first), its "
            "channels and its type."
        ) from error


def floating_type(model: nn.Module) -> torch.dtype:
    """Return the type of a network's weights: that of its first floating-point parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return first.dtype


def in_type_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs in the type of a network's weights; integers as they are."""
    return inputs.to(floating_type(model)) if inputs.is_floating_point() else inputs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that dotted name; the empty name is the network itself.

    Raises:
        OptionError: If the network has no such module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise OptionError(
            f"The network {type(model).__name__} has no module named {name!r}: {error}."
        ) from error


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of a module, and return the network.

    Args:
        model: Modified in place, unless ``name`` is empty: pass a copy.
        name: Dotted name; empty for the network itself, which is then ``new``.
        new: The replacement. It takes over the mode (training or evaluation) of the old module.
    """
    old = module_at(model, name)
    new.train(old.training)
    if not name:
        return new
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    # Containers and plain modules alike keep their children here, so that order and names stay.
    parent._modules[child] = new  # noqa: SLF001
    return model


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return for the first name of each module all the names under which it is reachable."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def check_finite(model: nn.Module) -> None:
    """Check that every floating-point weight and buffer is finite.

    Raises:
        WeightsError: Naming the first tensor that is not, and how many of its values.
    """
    tensors: Iterable[tuple[str, object]] = model.state_dict().items()
    for name, tensor in tensors:
        # A module's extra state may be anything.
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise WeightsError(
                f"Weights must be finite, but {bad:,} of {tensor.numel():,} values of {name!r} are "
                f"NaN or infinite. Load weights from before the training diverged."
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's call, or the backward of it, calls more than its forward."""
    return any(vars(module).get(kind) for kind in _HOOKS)


@contextmanager
def hooks_removed(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks in ``handles`` on the way out, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_of_modules(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of modules, at each pass inside, in the mapping that is yielded.

    Args:
        network: Gets hooks, which are removed at the end.
        names: Of modules whose output is a tensor.
    """
    kept: dict[str, Tensor] = {}
    handles: list[Any] = []
    with hooks_removed(handles):
        for name in names:

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                kept[name] = output

            handles.append(module_at(network, name).register_forward_hook(keep))
        yield kept
