"""Loads networks from a run's folder, a file or a library.

A record is only data: it never decides which code runs or which file outside its folder is opened.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from onebyone.core.arguments import checked
from onebyone.core.errors import ModelError, OptionError, RecordError, WeightsError
from onebyone.core.read_files import why_no_folder
from onebyone.core.records import InputSpec, ModelSource, Origin, RunRecord
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import example_input
from onebyone.networks.hashing import hash_weights
from onebyone.networks.surgery import as_network, evaluation_copy
from onebyone.networks.zoo import Loaded, load, load_weights
from onebyone.networks.zoo.load import own_factory
from onebyone.pipeline.importing import imported
from onebyone.pipeline.run_folder import DEPLOYED, ORIGINAL, RECORD, WEIGHTS, is_run
from onebyone.quantizing import Quantized, load_quantized
from onebyone.rewrites import restructure
from onebyone.runtimes.files import SUFFIXES, FileNetwork, is_network_file, is_onnx_file

Original = nn.Module | Callable[[], nn.Module] | str


def needs_original(folder: str | Path) -> bool:
    """Whether a run's network can be built only if the caller gives the original network."""
    spec = _origin(RunRecord.load(Path(folder) / RECORD).source).spec
    return spec is None or not _NAME.match(spec)


@checked
@ordinary_torch()
def load_model(
    spec: str | Path,
    /,
    *,
    weights: str | Path | None = None,
    original: Original | None = None,
    **options: Any,
) -> nn.Module:
    """Return a network by name, from a file's factory, or from a run's folder.

    Args:
        spec: ``onebyone:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``path/net.py:factory``, or
            the folder of a run, for the rewritten network with its weights; or an ``.onnx``,
            ``.xml`` or ``.pte`` file, which runs in its own runtime. To rewrite the network
            of an ONNX file, read it by :func:`onebyone.import_onnx`.
        weights: A ``.safetensors`` or state-dict file, ``"pretrained"``, or ``None`` for new
            weights (for a run: the run's).
        original: For a run that started from a module in memory or from a file of Python or ONNX,
            which a record alone does not open: the module (not modified), a function that makes
            it, or a spec such as ``"net.py:make"`` or ``"net.onnx"``. For a run made from other
            runs: the original of the first one.
        options: Passed to the factory; for a run, to the factory of ``original``.

    Returns:
        The network, on the CPU, in evaluation mode.

    Raises:
        UnknownNameError: If there is no such network.
        WeightsError: If weights are missing, unreadable, or do not fit the network.
        OptionError: If a run needs ``original``.
        RecordError: If the folder has no readable run.
    """
    return load_deployable(spec, weights=weights, original=original, **options).model


@ordinary_torch()
def load_source(
    spec: str | Path,
    /,
    *,
    weights: str | Path | None = None,
    original: Original | None = None,
    **options: Any,
) -> Loaded:
    """Return a network with its source and its inputs, to be read, rewritten or trained.

    It is like :func:`load_model`, but the layers of an ONNX file are read; its only option is
    ``input_shape``, such as ``"1x3x48x320"``.
    """
    if is_run(spec):
        return _load_run(Path(spec), weights, _Named(original, options))
    if is_network_file(spec):
        _check_nothing_beside(spec, weights=weights, original=original)
        return _read_layers(Path(spec), options)
    if why_no_folder(Path(spec)) is None:
        raise RecordError(
            f"The folder {spec} must be a run's, with a {RECORD}, but it has none. "
            f"Give the folder that `onebyone shrink --out` or `onebyone train --out` wrote."
        )
    if Path(spec).name == RECORD:
        raise RecordError(
            f"A run is named by its folder: give {Path(spec).parent} in place of {spec}."
        )
    if original is not None:
        raise OptionError(f"`original` goes with the folder of a run, which {spec} is not.")
    loaded = load(str(spec), weights=weights, **options)
    return replace(loaded, model=as_network(loaded.model))


@ordinary_torch()
def load_deployable(
    spec: str | Path,
    /,
    *,
    weights: str | Path | None = None,
    original: Original | None = None,
    **options: Any,
) -> Loaded:
    """Return a network like :func:`load_source`, but a file as it runs in its runtime."""
    if is_run(spec) or not is_network_file(spec):
        return load_source(spec, weights=weights, original=original, **options)
    _check_nothing_beside(spec, weights=weights, original=original, options=options)
    network = FileNetwork(spec)
    source = ModelSource(name=network.path.name, spec=str(spec))
    return Loaded(model=network, source=source, inputs=network.inputs)


def _check_nothing_beside(spec: str | Path, **given: object) -> None:
    """Check that nothing is given beside a file that has it already.

    Raises:
        OptionError: If anything is.
    """
    for name, value in given.items():
        if value:
            raise OptionError(f"`{name}` must be left out for {spec}, a file with its weights.")


def _read_layers(path: Path, options: Mapping[str, Any]) -> Loaded:
    """Return the network of an ONNX file as layers.

    Raises:
        ModelError: If it is a file of another kind, whose layers are not read.
        OptionError: If there is an option other than the shape of the input.
    """
    if not is_onnx_file(path):
        raise ModelError(
            f"The layers of {path} cannot be read: it only runs in {SUFFIXES[path.suffix]}, for "
            "`compare` and `bench`. Give the ONNX file or the PyTorch network that it was made "
            "from."
        )
    unknown = sorted(set(options) - {"input_shape"})
    if unknown:
        raise OptionError(
            f"An ONNX file has one option, input_shape, but got {unknown[0]!r} for {path}."
        )
    return imported(path, **options)


@ordinary_torch()
def load_original(
    folder: str | Path,
    /,
    *,
    weights: str | Path | None = None,
    original: Original | None = None,
    **options: Any,
) -> nn.Module:
    """Return the original network of a run, with its weights.

    Args:
        folder: The run's folder.
        weights: File of the original's weights, if they were too large to be kept in the run.
        original: As for :func:`load_model`.
        options: As for :func:`load_model`.

    Returns:
        The network, in evaluation mode.

    Raises:
        OptionError: If the run needs ``original``.
        WeightsError: If the weights are not in the run, or not the ones that it was made from.
        RecordError: If the folder has no readable run.
    """
    folder = Path(folder)
    record = RunRecord.load(folder / RECORD)
    network = _base_network(record.source, _Named(original, options), folder)
    file = _own_file(folder, ORIGINAL) if weights is None else Path(weights)
    if weights is None and not file.exists():
        raise WeightsError(
            f"The weights of the original, {record.source.weights or 'its own'}, are not in the "
            f"run {folder}: give their file."
        )
    load_weights(network, file, network=f"the original of {folder}")
    if record.weights is not None and hash_weights(network) != record.weights:
        raise WeightsError(
            f"The run {folder} was made from other weights than those in {file}: their SHA-256 "
            f"differs. Give the file that it was made from."
        )
    return network.eval()


@dataclass(frozen=True)
class _Named:
    """The original network of a run, as the caller gives it."""

    original: Original | None
    options: Mapping[str, Any]


def _load_run(folder: Path, weights: str | Path | None, named: _Named) -> Loaded:
    record = RunRecord.load(folder / RECORD)
    base = _base_network(record.source, named, folder)
    network = base if record.plan is None else restructure(base, record.plan)
    file = _own_file(folder, WEIGHTS) if weights is None else Path(weights)
    if weights is None and not file.exists():
        raise WeightsError(f"The run in {folder} has no {WEIGHTS}. {_why_no_weights(record)}.")
    load_weights(network, file, network=str(folder))
    network = network.eval()
    if weights is None and record.deployed is not None:
        network = load_deployed(folder, network).network
    source = ModelSource(
        name=folder.resolve().name,
        spec=str(folder),
        weights=file.name,
        origin=_origin_of_result(record, named),
        task=None if record.task is None or not record.task.known else record.task.name,
    )
    return Loaded(model=network, source=source, inputs=_inputs(record))


def load_deployed(folder: str | Path, network: nn.Module) -> Quantized:
    """Return a run's network in int8, from the integers in its folder.

    Args:
        folder: The run's.
        network: The run's network in float32, with its weights. Not modified.

    Raises:
        RecordError: If the integers are missing or of another network.
    """
    inputs = _inputs(RunRecord.load(Path(folder) / RECORD))
    assert inputs is not None, "a run in int8 has a plan"
    shape = inputs.with_batch(1).single("Int8").shape
    inside = _own_file(Path(folder), DEPLOYED)
    return load_quantized(network, inside, example_input(shape))


def _why_no_weights(record: RunRecord) -> str:
    status = record.status
    if status.state == "finished":
        return "It finished with one, so the folder is incomplete: copy all of it again"
    return f"It did not finish ({status.state} at {status.stage!r}): resume it by --resume"


def _origin(source: ModelSource) -> Origin:
    made = Origin(spec=source.spec, options=source.options, sha256=source.sha256)
    return source.origin or made


def _origin_of_result(record: RunRecord, named: _Named) -> Origin:
    """Return the origin of the network that a run made, from which it can be built."""
    origin = _origin(record.source)
    if isinstance(named.original, str):
        origin = replace(origin, spec=named.original, options=dict(named.options))
    if record.plan is None:
        return origin
    # The chosen options are enough to build it, so the front and the skipped sites are left out.
    chosen = replace(record.plan, front=(), left_alone=())
    return replace(origin, plans=(*origin.plans, chosen))


def _base_network(source: ModelSource, named: _Named, folder: Path) -> nn.Module:
    """Return the original network of a run, with any weights."""
    origin = _origin(source)
    network = _first_network(origin, named, folder, source.name)
    for plan in origin.plans:
        network = restructure(network, plan)
    return network


def _first_network(origin: Origin, named: _Named, folder: Path, name: str) -> nn.Module:
    if named.options and not isinstance(named.original, str):
        raise OptionError(
            f"Options of a factory need a factory, but {folder} is a run: give `original` too, "
            f"such as 'net.py:make'."
        )
    if isinstance(named.original, nn.Module):
        # A copy: the run's weights must not be loaded into the caller's network.
        return evaluation_copy(as_network(named.original))
    if isinstance(named.original, str):
        if is_onnx_file(named.original):
            return _same_file(_read_layers(Path(named.original), named.options), origin, folder)
        return as_network(load(named.original, **named.options).model)
    if named.original is not None:
        return as_network(named.original())
    if origin.spec is None:
        raise OptionError(
            f"The run in {folder} was made from a module in memory, a {name}: give the module, or "
            f"a function that makes it, as `original`; on the command line give a factory in a "
            f"Python file as --original."
        )
    _check_trusted(origin, folder)
    options: dict[str, Any] = dict(origin.options)
    return as_network(load(origin.spec, **options).model)


def _same_file(loaded: Loaded, origin: Origin, folder: Path) -> nn.Module:
    """Return the network of an ONNX file, if it is the one that a run was made from.

    Raises:
        OptionError: If it is another file.
    """
    if origin.sha256 is not None and loaded.source.sha256 != origin.sha256:
        raise OptionError(
            f"The run in {folder} was made from another ONNX file than {loaded.source.spec}: their "
            f"SHA-256 differs. Give the file that it was made from, {origin.spec}."
        )
    return loaded.model


_NAME = re.compile(r"(onebyone|torchvision|timm):[A-Za-z0-9_.-]+\Z")
_WORD = re.compile(r"[A-Za-z0-9_.-]{0,64}\Z")  # neither a path nor an address
# Safe options of torchvision's and timm's factories: sizes, shares and names of layers.
_OPTIONS = frozenset({
    "act_layer", "attn_drop_rate", "aux_logits", "bn_size", "class_token", "depth",
    "drop_block_rate", "drop_path_rate", "drop_rate", "dropout", "embed_dim", "features_only",
    "global_pool", "groups", "growth_rate", "image_size", "img_size", "in_chans", "init_weights",
    "norm_layer", "num_classes", "num_heads", "num_init_features", "output_stride", "patch_size",
    "proj_drop_rate", "stochastic_depth_prob", "transform_input", "width_mult",
    "width_per_group",
})  # fmt: skip


def _check_trusted(origin: Origin, folder: Path) -> None:
    """Check that a record names a library's network with plain options only.

    Raises:
        OptionError: If it names anything else; says what the caller can give instead.
    """
    assert origin.spec is not None
    if not _NAME.match(origin.spec):
        raise OptionError(
            f"The run in {folder} was made from {origin.spec!r}. A record does not decide which "
            f"code is run or which file is opened. If you trust it, name it yourself: "
            f"--original {shlex.quote(origin.spec)} (in Python: original={origin.spec!r})."
        )
    known = _known_options(origin.spec)
    for name, value in origin.options.items():
        plain = isinstance(value, int | float) or bool(_WORD.match(value))
        if name not in known or not plain:
            given = shlex.quote(f"{name}={value}")
            raise OptionError(
                f"The run in {folder} was made with the option {name}={value!r}, which a record "
                f"does not set. If you trust it, name the network and its options yourself: "
                f"--original {origin.spec} --model-option {given} (in Python: "
                f"original={origin.spec!r}, {name}={value!r})."
            )


def _known_options(spec: str) -> Iterable[str]:
    library, _, name = spec.partition(":")
    if library != "onebyone":
        return _OPTIONS
    factory = own_factory(name)
    return () if factory is None else inspect.signature(factory).parameters


def _own_file(folder: Path, name: str) -> Path:
    """Return the path of a file of a run, which must be inside its folder.

    Raises:
        RecordError: If the file is a link to another folder.
    """
    file = folder / name
    if file.exists() and not file.resolve().is_relative_to(folder.resolve()):
        raise RecordError(
            f"{file} must be in the run's folder, but is a link to {file.resolve()}. If you "
            f"trust that file, give it as the weights yourself."
        )
    return file


def _inputs(record: RunRecord) -> InputSpec | None:
    if record.data is not None:
        return record.data.inputs
    return None if record.plan is None else record.plan.inputs.with_batch(1)
