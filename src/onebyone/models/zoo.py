"""Networks by name: ``onebyone:``, ``torchvision:``, ``timm:``, or a factory in a Python file."""

from __future__ import annotations

import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from onebyone.errors import ModelError, OptionError, UnknownNameError, WeightsError
from onebyone.models.article import classic, convolution_only, extra_nonlinearity
from onebyone.models.nin import FORMS, nin
from onebyone.models.weights import load_weights
from onebyone.records import ModelSource

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Loaded:
    """A network, where it came from, and what it takes.

    Attributes:
        model: On the CPU, in evaluation mode.
        source: Enough to build it again.
        input_shape: Shape of one input without the batch, such as ``(3, 224, 224)``; ``None``
            where it is not known.
    """

    model: nn.Module
    source: ModelSource
    input_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class _Own:
    """A network of this package, and the pictures it takes by default."""

    make: Factory
    in_channels: int
    size: int


_ONEBYONE: dict[str, _Own] = {
    "classic": _Own(classic, 1, 28),
    "convolution-only": _Own(convolution_only, 1, 28),
    "extra-nonlinearity": _Own(extra_nonlinearity, 1, 28),
    **{
        f"nin-{name}": _Own(partial(nin, name), form.in_channels, form.size)
        for name, form in FORMS.items()
    },
}

_LIBRARIES = ("onebyone", "torchvision", "timm")
_FILE_FORM = "path/net.py:FACTORY"

# Without it these two warn that they will initialize for a minute some day, and do it.
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


def build(spec: str, **options: Any) -> nn.Module:
    """Return a new network with random weights, in training mode, on the CPU.

    Args:
        spec: ``onebyone:NAME``, ``torchvision:NAME``, ``timm:NAME``, or ``path/net.py:FACTORY``: a
            function or class of a Python file. The file is run, with its folder first in the
            import path. See :func:`available` for the names.
        options: Passed on to the factory, such as ``num_classes=10``.

    Raises:
        UnknownNameError: If there is no such library, name, file or factory.
        OptionError: If the factory does not take these options.
        ModelError: If the file or the factory fails, or makes something else than a module: says
            on which line.
    """
    prefix, name = _split(spec)
    return _make(spec, prefix, name, options, pretrained=False)


def load(spec: str, *, weights: str | Path | None = None, **options: Any) -> Loaded:
    """Return a network with its weights, in evaluation mode, and what is known of it.

    Args:
        spec: As for :func:`build`.
        weights: A ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` file of a state dict;
            ``"pretrained"`` to download those that torchvision or timm recommends; ``"random"`` or
            ``None`` for new ones.
        options: Passed on to the factory; ints, floats, texts and bools, so that a record can
            keep them.

    Raises:
        UnknownNameError: As :func:`build`.
        OptionError: As :func:`build`; or if an option cannot be kept in a record.
        WeightsError: If the weights are missing, unreadable, not finite, those of another network,
            or cannot be downloaded.
        ModelError: As :func:`build`; or if the module's own ``input_shape`` is not one.
    """
    for name, value in options.items():
        if not isinstance(value, int | float | str | bool):
            raise OptionError(
                f"Options must be ints, floats, texts or bools, so that a run can build the "
                f"network again: `{name}` is a {type(value).__name__}. Write a factory in a file "
                f"that sets it, and give {_FILE_FORM}."
            )
    prefix, name = _split(spec)
    weights = None if weights == "random" else weights
    pretrained = weights == "pretrained"
    model = _make(spec, prefix, name, options, pretrained=pretrained)
    if weights is not None and not pretrained:
        load_weights(model, weights, network=spec)
    model.eval()
    source = ModelSource(
        name=name,
        spec=spec,
        options=dict(options),
        weights=None if weights is None else "pretrained" if pretrained else Path(weights).name,
    )
    return Loaded(
        model=model, source=source, input_shape=_input_shape(spec, prefix, name, model, options)
    )


def _split(spec: str) -> tuple[str, str]:
    """Return a spec's library, or its file's path, and the name after the last colon."""
    prefix, colon, name = spec.rpartition(":")
    if not colon:
        raise UnknownNameError("model", spec, _completions(spec))
    if not prefix.endswith(".py") and prefix not in _LIBRARIES:
        raise UnknownNameError("library of models", prefix, (*_LIBRARIES, "path/net.py"))
    return prefix, name


def _completions(spec: str) -> list[str]:
    """Return the full specs that a text without a colon may have meant."""
    if spec.endswith(".py"):
        return [f"{spec}:{name}" for name in _factories(_execute(Path(spec)))] or [_FILE_FORM]
    meant = [
        f"{library}:{name}"
        for library in _LIBRARIES
        for name in difflib.get_close_matches(spec, available(library), n=2, cutoff=0.8)
    ]
    return meant or [*(f"{library}:NAME" for library in _LIBRARIES), _FILE_FORM]


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
        if name not in _ONEBYONE:
            raise UnknownNameError("model of onebyone", name, _ONEBYONE)
        make_own = _ONEBYONE[name].make
        _check_options(make_own, spec, options)
        return make_own(**options)
    return _from_file(spec, Path(prefix), name, options)


# ---------------------------------------------------------------- libraries


def _torchvision(
    spec: str, name: str, options: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    import torchvision.models  # noqa: PLC0415  (takes a second; only for its own networks)

    names = available("torchvision")
    if name not in names:
        raise UnknownNameError("model of torchvision", name, names)
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

    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownNameError("model of timm", name, available("timm"))
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
        # Also what the libraries raise for a failed download.
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
        f"The pretrained weights of {spec} could not be had: {reason} They are downloaded once and "
        f"kept (torchvision under TORCH_HOME, timm under HF_HOME): check the network or its proxy; "
        f"or download a file elsewhere and give its path as the weights."
    )


# ---------------------------------------------------------------- files


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Reads the source each time, and leaves no compiled file in the user's folder."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        # Compiled files are matched by seconds and size: a quick edit would be missed. Without
        # these figures Python neither reads nor writes one.
        raise OSError(path)


def _from_file(spec: str, path: Path, name: str, options: Mapping[str, Any]) -> nn.Module:
    module = _execute(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = _factories(module) or [f"{path.name} defines no function and no class"]
        raise UnknownNameError(f"factory in {path}", name, names)
    _check_options(factory, spec, options)
    with _file_errors(path), _import_from(path.parent):
        model = factory(**options)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"A factory must return an nn.Module: {name!r} of {path} returned a "
            f"{type(model).__name__}."
        )
    return model


def _execute(path: Path) -> ModuleType:
    """Run a Python file as a module of its own."""
    if not path.is_file():
        folder = path.parent
        found = [str(file) for file in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        raise UnknownNameError("model file", str(path), found or [f"no .py file in {folder}"])
    # A name that no package has, one for each path; classes find their module by it.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_name = f"_onebyone_model_{path.stem}_{digest}"
    loader = _UncachedLoader(module_name, str(path))
    spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
    if spec is None:
        raise ModelError(f"{path} cannot be run as a Python file.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(module_name)
    sys.modules[module_name] = module
    try:
        with _file_errors(path), _import_from(path.parent):
            loader.exec_module(module)
    except ModelError:
        if before is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = before
        raise
    return module


def _factories(module: ModuleType) -> list[str]:
    """Return the public functions and classes that a file defines itself."""
    return sorted(
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    )


@contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    # As when the file is run as a script: it may import its neighbors.
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    # A file of models may raise anything, and a script may call sys.exit() when it is run.
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{_place(path, error)}: {type(error).__name__}: {_message(error)}"
        ) from error


def _place(path: Path, error: BaseException) -> str:
    """Return the file and the line of it where an error arose."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename or path}, line {error.lineno}"
    own = path.resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == own
    ]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _message(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error) or "(no message)"


# ---------------------------------------------------------------- options and shapes


def _check_options(factory: Callable[..., Any], spec: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # a builtin that does not tell what it takes
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
        return None  # videos, detection, segmentation: no one size
    # A vision transformer takes the size that it was built for, which depends on the weights.
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
