"""Networks by name: ``onebyone:``, ``torchvision:``, ``timm:``, or a factory in a Python file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from onebyone.core.errors import ModelError, OptionError, UnknownNameError, WeightsError
from onebyone.core.read_files import printable
from onebyone.core.records import InputSpec, ModelSource
from onebyone.core.user_files import (
    call_user_function,
    run_user_file,
    user_function,
    user_functions,
)
from onebyone.networks.examples import shaped
from onebyone.networks.zoo.article import classic, convolution_only, extra_nonlinearity
from onebyone.networks.zoo.nin import FORMS, nin
from onebyone.networks.zoo.plain import plain
from onebyone.networks.zoo.weights import load_weights

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Loaded:
    """A network, its source, and its inputs.

    Attributes:
        model: On the CPU, in evaluation mode.
        source: All that is needed to build it again.
        inputs: What one example is; ``None`` if it is not known.
    """

    model: nn.Module
    source: ModelSource
    inputs: InputSpec | None


@dataclass(frozen=True)
class _Own:
    """A network of this package, and the size of its default pictures."""

    make: Factory
    in_channels: int
    size: int


_ONEBYONE: dict[str, _Own] = {
    "classic": _Own(classic, 1, 28),
    "convolution-only": _Own(convolution_only, 1, 28),
    "extra-nonlinearity": _Own(extra_nonlinearity, 1, 28),
    "plain": _Own(plain, 1, 28),
    **{
        f"nin-{name}": _Own(partial(nin, name), form.in_channels, form.size)
        for name, form in FORMS.items()
    },
}

_LIBRARIES = ("onebyone", "torchvision", "timm")
_FILE_FORM = "path/net.py:FACTORY"
_PATH_FORMS = (_FILE_FORM, "path/net.onnx", "the folder of a run")

# Without this option these two warn about a future default and spend a minute initializing.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
}


def available(prefix: str) -> list[str]:
    """Return the names of all networks of a library, sorted.

    Args:
        prefix: ``onebyone``, ``torchvision`` or ``timm``.

    Raises:
        UnknownNameError: If the prefix is none of these.
    """
    if prefix == "onebyone":
        return sorted(_ONEBYONE)
    if prefix == "torchvision":
        import torchvision.models  # noqa: PLC0415  (takes a second; only for its own networks)

        return sorted(torchvision.models.list_models())
    if prefix == "timm":
        import timm  # noqa: PLC0415  (takes seconds; only for its own networks)

        return sorted(timm.list_models())
    raise UnknownNameError("library of models", prefix, _LIBRARIES)


def own_factory(name: str) -> Factory | None:
    """Return the function that makes a network of this package, or ``None``."""
    own = _ONEBYONE.get(name)
    return None if own is None else own.make


def build(spec: str, /, **options: Any) -> nn.Module:
    """Return a new network with random weights, in training mode, on the CPU.

    Args:
        spec: ``onebyone:NAME``, ``torchvision:NAME`` or ``timm:NAME`` (see :func:`available`), or
            ``path/net.py:FACTORY``, a function or class of a Python file. The file is run, with its
            folder first in the import path.
        options: Passed to the factory, such as ``num_classes=10``.

    Raises:
        UnknownNameError: If there is no such library, name, file or factory.
        OptionError: If the factory does not accept these options.
        ModelError: If the file or the factory fails (says on which line), or the factory does not
            return a module.
    """
    prefix, name = _split(spec)
    return _make(spec, prefix, name, options, pretrained=False)


def load(spec: str, /, *, weights: str | Path | None = None, **options: Any) -> Loaded:
    """Return a network with its weights, in evaluation mode, with its source and inputs.

    Args:
        spec: As for :func:`build`.
        weights: A ``.safetensors`` file, or a ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.tar``
            file of a state dict or a checkpoint; ``"pretrained"`` to download those that
            torchvision or timm recommends; ``"random"`` or ``None`` for random ones.
        options: Passed to the factory. Only ints, floats, strings and bools, which a record can
            store.

    Raises:
        UnknownNameError: As :func:`build`.
        OptionError: As :func:`build`; or if an option cannot be stored in a record.
        WeightsError: If the weights are missing, unreadable, not finite, for another network, or
            cannot be downloaded.
        ModelError: As :func:`build`; or if the module's ``input_shape`` is not a valid shape.
    """
    for name, value in options.items():
        if not isinstance(value, int | float | str | bool):
            raise OptionError(
                f"Options must be ints, floats, strings or bools, so that a run can build the "
                f"network again: `{name}` is a {type(value).__name__}. Write a factory in a file "
                f"that sets it, and give {_FILE_FORM}."
            )
    if not isinstance(weights, str | Path | None):
        raise OptionError(
            "`weights` must be the path of a file, 'pretrained', 'random' or None, got a "
            f"{type(weights).__name__}. Call `network.load_state_dict(...)` and pass the network "
            "itself, or save the state dict to a file."
        )
    prefix, name = _split(spec)
    pretrained = weights == "pretrained"
    model = _make(spec, prefix, name, options, pretrained=pretrained)
    if weights is not None and weights not in ("pretrained", "random"):
        load_weights(model, weights, network=spec)
    model.eval()
    source = ModelSource(
        name=name,
        spec=spec,
        options=dict(options),
        weights=None if weights is None else Path(weights).name,
    )
    sizes = _input_shape(spec, prefix, name, model, options)
    return Loaded(model=model, source=source, inputs=one_example(model, sizes))


def one_example(model: nn.Module, sizes: tuple[int, ...] | None) -> InputSpec | None:
    """Return the record of one example, from its shape without the batch; ``None`` for none."""
    return None if sizes is None else shaped(model, (1, *sizes))


def _split(spec: str) -> tuple[str, str]:
    """Split a spec at its last colon: into the library or the file's path, and the name."""
    prefix, colon, name = spec.rpartition(":")
    if not colon:
        absent = len(Path(spec).parts) > 1 and not Path(spec).exists()
        why = "looks like a run's folder, but nothing is there" if absent else ""
        raise UnknownNameError("model", spec, _completions(spec), why=why)
    if not prefix.endswith(".py") and prefix not in _LIBRARIES:
        raise UnknownNameError("library of models", prefix, (*_LIBRARIES, "path/net.py"))
    return prefix, name


def _completions(spec: str) -> list[str]:
    """Return full specs to suggest for a text without a colon."""
    if spec.endswith(".py"):
        module = run_user_file(Path(spec), raises=ModelError)
        return [f"{spec}:{name}" for name in user_functions(module)] or [_FILE_FORM]
    meant = [
        f"{library}:{name}"
        for library in _LIBRARIES
        for name in difflib.get_close_matches(spec, available(library), n=2, cutoff=0.8)
    ]
    forms = [*(f"{library}:NAME" for library in _LIBRARIES), *_PATH_FORMS]
    return meant or _files_like(Path(spec)) or forms


def _files_like(path: Path) -> list[str]:
    """Return the ONNX files beside where a path points whose names are like its own."""
    try:
        names = [file.name for file in path.parent.glob("*.onnx")]
    except (OSError, ValueError):
        return []
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.6)
    return [str(path.parent / name) for name in close]


def _make(
    spec: str, prefix: str, name: str, options: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    if prefix in {"torchvision", "timm"}:
        make = _torchvision if prefix == "torchvision" else _timm
        return make(spec, name, options, pretrained=pretrained)
    if pretrained:
        raise WeightsError(
            f"There are no pretrained weights to download for {spec}. Give a file of weights, or "
            f"train it: `onebyone train {spec} --data ...`."
        )
    if prefix == "onebyone":
        _check_known(prefix, name)
        make_own = _ONEBYONE[name].make
        _check_options(make_own, spec, options)
        return make_own(**options)
    return _from_file(spec, Path(prefix), name, options)


# ---------------------------------------------------------------- libraries


def check_known(spec: str) -> None:
    """Check that a library has the network that a spec names; a file's is not looked at.

    Raises:
        UnknownNameError: If there is none of that name, or no such library.
    """
    prefix, name = _split(spec)
    if prefix in _LIBRARIES:
        _check_known(prefix, name)


def _check_known(prefix: str, name: str) -> None:
    if prefix == "timm":
        import timm  # noqa: PLC0415  (takes seconds; only for its own networks)

        # Also older names, which it does not list. After a dot it names weights.
        known = timm.is_model(name.partition(".")[0])
    else:
        known = name in available(prefix)
    if not known:
        raise UnknownNameError(f"model of {prefix}", name, available(prefix))


def _torchvision(
    spec: str, name: str, options: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    import torchvision.models  # noqa: PLC0415  (takes a second; only for its own networks)

    _check_known("torchvision", name)
    builder = torchvision.models.get_model_builder(name)
    settings = dict(options)
    if not pretrained:
        settings = _TORCHVISION_OPTIONS.get(name, {}) | settings
        if "weights_backbone" in inspect.signature(builder).parameters:
            # Detection and segmentation networks download a backbone unless told not to.
            settings.setdefault("weights_backbone", None)
    with _library_errors(spec, options, pretrained=pretrained):
        model: nn.Module = builder(weights="DEFAULT" if pretrained else None, **settings)
    return model


def _timm(spec: str, name: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    import timm  # noqa: PLC0415  (takes seconds; only for its own networks)

    _check_known("timm", name)
    architecture, dot, _ = name.partition(".")
    if dot and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise UnknownNameError("model of timm", name, [architecture, *tagged])
    with _library_errors(spec, options, pretrained=pretrained):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return model


@contextmanager
def _library_errors(spec: str, options: Mapping[str, Any], *, pretrained: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # The libraries also raise it for a failed download.
        raise WeightsError(_download_advice(spec, error)) from error
    except (TypeError, ValueError) as error:
        if not options and not pretrained:
            raise ModelError(f"{spec} cannot be built: {error}") from error
        raise OptionError(
            f"{spec} cannot be built with {_shown(options)}"
            f"{' and pretrained weights' if pretrained else ''}: {error}"
        ) from error
    except Exception as error:
        if pretrained:
            raise WeightsError(_download_advice(spec, error)) from error
        raise ModelError(f"{spec} cannot be built with {_shown(options)}: {error}") from error


def _download_advice(spec: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"The pretrained weights of {spec} could not be loaded: {reason} They are downloaded once "
        f"and kept (torchvision under TORCH_HOME, timm under HF_HOME). Check the network or its "
        f"proxy, or download a file elsewhere and give its path as the weights."
    )


# ---------------------------------------------------------------- files


def _from_file(spec: str, path: Path, name: str, options: Mapping[str, Any]) -> nn.Module:
    factory = user_function(path, name, raises=ModelError)
    _check_options(factory, spec, options)
    model = call_user_function(factory, path, options, raises=ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"A factory must return an nn.Module: {name!r} of {printable(path)} returned a "
            f"{type(model).__name__}."
        )
    return model


# ---------------------------------------------------------------- options and shapes


def _check_options(factory: Callable[..., Any], spec: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # a builtin without a signature
    try:
        signature.bind(**options)
    except TypeError as error:
        taken = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise OptionError(
            f"{spec} cannot be called with {_shown(options)}: {error}. It takes: "
            f"{taken or 'no options'}."
        ) from error


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"


def _input_shape(
    spec: str, prefix: str, name: str, model: nn.Module, options: Mapping[str, Any]
) -> tuple[int, ...] | None:
    if prefix == "onebyone":
        own = _ONEBYONE[name]
        channels = options.get("in_channels", own.in_channels)
        size = options.get("size", own.size)
        return (channels, size, size)
    if prefix == "torchvision":
        return _torchvision_shape(name, model)
    if prefix == "timm":
        return _timm_shape(model, options)
    declared = getattr(model, "input_shape", None)
    if declared is None:
        return None
    if not (
        isinstance(declared, tuple | list)
        and declared
        and all(isinstance(size, int) and size > 0 for size in declared)
    ):
        raise ModelError(
            f"The `input_shape` of the module that {spec} made must be the shape of one input "
            f"without the batch, such as (3, 224, 224), got {declared!r}."
        )
    return tuple(declared)


def _torchvision_shape(name: str, model: nn.Module) -> tuple[int, ...] | None:
    import torchvision.models  # noqa: PLC0415  (takes a second; only for its own networks)

    if name not in torchvision.models.list_models(module=torchvision.models):
        return None  # video, detection, segmentation: no single size
    # A vision transformer accepts only its own size, which depends on the weights.
    size = getattr(model, "image_size", 299 if name == "inception_v3" else 224)
    return (3, size, size)


def _timm_shape(model: nn.Module, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    declared = config.get("input_size")
    if declared is None:
        return None
    channels, height, width = declared
    size = options.get("img_size")
    if isinstance(size, int):
        height = width = size
    return (options.get("in_chans", channels), height, width)
