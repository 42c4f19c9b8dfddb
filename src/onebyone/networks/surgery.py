"""Copies and runs networks, and replaces modules in the module tree."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from onebyone.core.errors import ModelError, OneByOneError, OptionError, WeightsError
from onebyone.core.precision import float32_in
from onebyone.core.tensor_trees import Inputs, device_of, fresh, in_floats, tensors_in
from onebyone.core.torch_state import users_defaults
from onebyone.core.user_code import frames_of, users_fault
from onebyone.networks.copies import true_copy


def as_network(model: object, *, scripted: bool = False, finite: bool = True) -> nn.Module:
    """Check a user's network and return it; for a ``torch.compile`` wrapper, the network inside.

    Args:
        model: What the user passed. Not modified.
        scripted: Whether TorchScript, which can only be run, is allowed.
        finite: Whether its weights must be finite.

    Raises:
        ModelError: If it is not such a module, has no weights yet, or has a compiled part.
        WeightsError: If a weight is not finite.
    """
    # Checked by name: torch's class for it is private and takes seconds to import.
    if type(model).__module__.startswith("torch._dynamo"):
        inside = getattr(model, "_orig_mod", None)
        return as_network(inside, scripted=scripted, finite=finite)
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
            f"{must} whose layers can be read and replaced, got a TorchScript program. Give "
            "the network that it was made from."
        )
    _check_complete(model, must)
    if finite:
        check_finite(model)
    return model


def _check_complete(model: nn.Module, must: str) -> None:
    """Check that a network has weights, and no part that nothing can reach into."""
    for name, module in model.named_modules():
        # Compiled code keeps the layers that it was made of, and may pass over hooks.
        if type(module).__module__.startswith("torch._dynamo"):
            raise ModelError(
                f"{must} without compiled parts, whose layers can be neither watched nor replaced, "
                f"but {name!r} is wrapped by torch.compile. Put its `_orig_mod` in its place, and "
                "compile the result."
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
                "real device, and load its weights."
            )


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network with each module in its mode.

    Args:
        model: Not modified.

    Raises:
        ModelError: If the network cannot be copied, or a copy would use parts of the original;
            says why and what to do.
    """
    return true_copy(model)


def evaluation_copy(model: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """Return a deep copy in evaluation mode, on ``device`` if one is given.

    Raises:
        ModelError: As :func:`copy_network`, and if a module does not go into evaluation mode.
    """
    duplicate = copy_network(model)
    # A user may override these, so their return value is not used.
    try:
        duplicate.eval()
    except Exception as error:
        raise users_fault(
            error,
            "A network must go into evaluation mode by `eval()`",
            "Let it call that of torch.nn.Module; instead of an exported program, give the network "
            "that it was made from",
            what=f"{type(model).__name__}.eval()",
        ) from error
    if device is not None:
        duplicate.to(device)
    for name, module in duplicate.named_modules():
        if module.training:
            of = f"the module {name!r} of {type(model).__name__}" if name else type(model).__name__
            raise ModelError(
                f"A network must go into evaluation mode by `eval()`, but {of} stays in training "
                "mode. Let its `train` and `eval` call those of torch.nn.Module."
            )
    return duplicate


def in_evaluation_mode(model: nn.Module, *, device: torch.device | str = "cpu") -> nn.Module:
    """Return the network itself if it is in evaluation mode on ``device``, else a copy that is."""
    wanted = torch.device(device)
    elsewhere = any(p.device != wanted for p in (*model.parameters(), *model.buffers()))
    if elsewhere or any(module.training for module in model.modules()):
        return evaluation_copy(model, device=wanted)
    return model


def as_device(device: torch.device | str) -> torch.device:
    """Return a device by its name.

    Raises:
        OptionError: If torch does not know the device, or it is a GPU and there is none.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"The device must be one that torch knows, such as cpu or cuda, got {device!r}."
        ) from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"The device {wanted} must exist, but torch sees no GPU. Use cpu.")
    return wanted


def home_of(model: nn.Module) -> torch.device:
    """Return the device of a network's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def called(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return what a network gives for a tensor, a tuple of arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network on a tensor, a tuple of arguments, or keyword arguments, without copying them.

    Raises:
        ModelError: If its forward raises anything; gives the input shapes, the cause and the layer.
    """
    try:
        with users_defaults(device_of(inputs)):
            return called(model, inputs)
    except OneByOneError:
        raise
    except Exception as error:
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors_in(inputs))
        raise users_fault(
            error,
            f"The network {type(model).__name__} must run on an input of shape {shapes or 'none'}",
            "Check the input's shape (the batch comes first), its channels and its type",
            layer=_layer_in(model, error),
        ) from error


def _layer_in(model: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost module whose code an exception passed through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in frames_of(error):
        found = names.get(id(frame.f_locals.get("self")), found)
    return found


def run(model: nn.Module, inputs: Inputs, *, given_away: bool = False) -> Any:
    """Run a network without gradients; its own exceptions become a ``ModelError``.

    On a GPU, float32 is computed in full precision, not in TF32. A forward that draws random
    numbers from torch on the CPU gets the same ones each time, so two networks can be compared.

    Args:
        model: Runs in its present mode.
        inputs: Not modified, even if the network writes into its input.
        given_away: Whether the network may modify the inputs; they are then not copied.

    Raises:
        ModelError: As :func:`call`.
    """
    with torch.no_grad(), float32_in("float32"), same_draws():
        return call(model, inputs if given_away else fresh(inputs))


@contextmanager
def same_draws() -> Iterator[None]:
    """Seed torch's CPU generator with 0 in this context, and restore its state afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def writes_into_inputs(model: nn.Module, inputs: Inputs) -> bool:
    """Run a network once and return whether it writes into its inputs."""
    given = fresh(inputs)
    before = [tensor._version for tensor in tensors_in(given)]  # noqa: SLF001 - counts the writes
    run(model, given, given_away=True)
    return before != [tensor._version for tensor in tensors_in(given)]  # noqa: SLF001


def repeatable(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """Return a function that runs a network on inputs and can be called repeatedly, for timing.

    It copies the inputs at each call only if the network writes into them.

    Raises:
        ModelError: If the network does not run on these inputs.
    """
    if writes_into_inputs(model, inputs):
        return lambda: called(model, fresh(inputs))
    if isinstance(inputs, Tensor):
        return lambda: model(inputs)
    return lambda: called(model, inputs)


def lay_channels_last(model: nn.Module) -> None:
    """Convert the kernels of 2-D convolutions to ``channels_last``, in place.

    Torch's own ``to(memory_format=…)`` raises an error for 3-D convolutions.

    Args:
        model: Modified in place: pass a copy.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def floating_type(model: nn.Module) -> torch.dtype:
    """Return the type of a network's weights: that of its first floating-point parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return first.dtype


_In = TypeVar("_In", Tensor, Inputs)


def in_type_of(model: nn.Module, inputs: _In) -> _In:
    """Convert inputs to the type of a network's weights; integers are returned unchanged."""
    converted: _In = in_floats(inputs, floating_type(model))
    return converted


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a dotted name; the empty name is the network itself.

    Raises:
        OptionError: If the network has no such module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        known = [known for known, _ in model.named_modules() if known]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?"
        if not close:
            top = [known for known, _ in model.named_children()]
            more = ", …" if len(top) > 12 else ""
            hint = f"Its modules are {', '.join(top[:12])}{more}, and those inside."
        raise OptionError(
            f"The network {type(model).__name__} has no module named {name!r}. {hint}"
        ) from error


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace a module by ``new``, and return the network.

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
    # All modules keep their children here, so their order and names do not change.
    parent._modules[child] = new  # noqa: SLF001
    return model


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each module, by its first name."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def parameter_owners(model: nn.Module) -> Counter[int]:
    """Return how many modules have each parameter, by identity."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def check_finite(model: nn.Module) -> None:
    """Check that every weight and buffer is finite.

    A buffer may hold infinite values, as attention masks do, unless it belongs to a norm.

    Raises:
        WeightsError: If one is not; names the first tensor and counts its bad values.
    """
    norms = (nn.modules.batchnorm._NormBase,)  # noqa: SLF001
    for module_name, module in model.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]  # noqa: SLF001
        for key, tensor in tensors:
            if tensor is None or tensor.is_meta or not _may_be_infinite(tensor):
                continue
            mask = key in module._buffers and not isinstance(module, norms)  # noqa: SLF001
            values = tensor.detach()
            if values.dtype.itemsize == 1:  # float8 has no isnan or isfinite
                values = values.float()
            wrong = values.isnan() if mask else ~values.isfinite()
            if bad := int(wrong.sum()):
                name = f"{module_name}.{key}" if module_name else key
                raise WeightsError(
                    f"Weights must be finite, but {bad:,} of {tensor.numel():,} values of {name!r} "
                    "are NaN or infinite. Load weights from before the training diverged."
                )


def _may_be_infinite(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_quantized


def first_nonfinite_layer(model: nn.Module, inputs: Inputs) -> str | None:
    """Return the first layer that turns finite inputs into NaN or infinite values, or ``None``.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: Finite inputs of the network.

    Returns:
        Its dotted name; empty if it is the network's own forward.

    Raises:
        ModelError: If the network cannot be copied or run on these inputs.
    """
    network = evaluation_copy(model, device=device_of(inputs))
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and _all_finite((args, kwargs)) and not _all_finite(output):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in network.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    # Submodules finish before their parents, so the innermost one is found.
    with hooks_removed(handles):
        run(network, inputs)
    return found[0] if found else None


def _all_finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(value) if _may_be_infinite(t))


@contextmanager
def hooks_removed(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks in ``handles`` at the end of the context, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_of_modules(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of modules at each pass in this context, in the mapping it yields.

    Args:
        network: Gets hooks, which are removed at the end.
        names: Names of modules whose output is a tensor.
    """
    kept: dict[str, Tensor] = {}
    handles: list[Any] = []
    with hooks_removed(handles):
        for name in names:

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                kept[name] = output.clone()  # an in-place activation may follow

            handles.append(module_at(network, name).register_forward_hook(keep))
        yield kept


@contextmanager
def replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put modules in the places of those of the same names, and put the old ones back at the end.

    Args:
        network: Changed while in this context.
        modules: By name. They take over the mode of those that they replace.

    Yields:
        The network; if a name is empty, the module of that name in its place.
    """
    own = {name: module_at(network, name) for name in modules}
    changed = network
    try:
        for name, module in modules.items():
            changed = replace_module(changed, name, module)
        yield changed
    finally:
        for name, module in own.items():
            if name:
                replace_module(network, name, module)
