"""The line from pictures to their explanation: prepare, activate, draw, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from onebyone import __version__
from onebyone.activation import Activation, class_activation, feature_maps
from onebyone.data import Data
from onebyone.errors import OneByOneError, OptionError, OutputError
from onebyone.explaining.drawing import (
    Drawn,
    Evidence,
    draw_classes,
    draw_layer,
    file_name,
    shown_channels,
)
from onebyone.explaining.page import render_explanation
from onebyone.explaining.preparation import Known, Prepared, find_preparation, prepare
from onebyone.explaining.record import (
    Explanation,
    ImageExplanation,
    LayerMaps,
)
from onebyone.models import Loaded
from onebyone.records import ModelSource, check_folder, write_text
from onebyone.report.maps import encode_png
from onebyone.runs import is_run, load_original, load_source
from onebyone.sites import as_network

Progress = Callable[[int, int, str], None]

RECORD = "explain.json"
PAGE = "explain.html"
BATCH = 8  # images a pass: all their maps are in memory at once


@dataclass(frozen=True)
class Explained:
    """An explanation, and the maps that its pictures were drawn from.

    Attributes:
        record: Prints as a table.
        maps: For each image the maps of its top classes, ``(k, height, width)``; see
            :class:`onebyone.activation.Activation`.
    """

    record: Explanation
    maps: tuple[Tensor, ...]

    def __str__(self) -> str:
        return str(self.record)


def explain(
    model: nn.Module | Loaded | str | Path,
    images: Sequence[str | Path | Image.Image] | str | Path | Image.Image,
    *,
    out: str | Path | None = None,
    top: int = 3,
    layer: str | None = None,
    weights: str | Path | None = None,
    original: nn.Module | Callable[[], nn.Module] | None = None,
    original_weights: str | Path | None = None,
    data: str | Data | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Explained:
    """Show where in images a network sees their classes, and what its layers make of them.

    Class maps are exact where the network averages maps of its classes or of its features, and
    Grad-CAM for any other; see :func:`onebyone.activation.class_activation`.

    Args:
        model: A network, not modified; what :func:`onebyone.load_model` takes; or what
            :func:`onebyone.runs.load_source` gives.
        images: Files that Pillow reads, or opened pictures.
        out: Folder for a page, PNG files and a record; nothing is written without.
        top: Classes for each image.
        layer: Name of a layer whose maps are shown too; for a run of ``shrink`` before and after.
        weights: Where ``model`` is a name: a file, or ``"pretrained"``.
        original: The network that a run was made from, where that was a module in memory.
        original_weights: File of the original's weights, to show a layer before its rewrite.
        data: What the network was trained on, for the size, the normalization and the classes'
            names; by default what the run's record says of it.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        size: Height and width in pixels that pictures are brought to.
        classes: Names of the classes.
        command: The command line, for the record.
        progress: Told of the images done.

    Raises:
        OptionError: If there are no images, or how they become inputs is not known.
        DataError: If a picture cannot be read. Nothing is then written.
        UnknownNameError: If there is no such network or layer.
        ModelError: If the network gives no class scores and no layer is asked for.
        OutputError: If the folder has other files than an explanation's, or cannot be written.
    """
    given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    if not given:
        raise OptionError("`images` must be a picture or more, got none.")
    folder = None if out is None else check_folder(Path(out), RECORD, "explanation")
    loaded = _loaded(model, weights, original)
    spec = loaded.source.spec
    run = Path(spec) if spec is not None and is_run(spec) else None
    known = find_preparation(
        loaded.model,
        loaded.source,
        folder=run,
        data=data,
        mean=mean,
        std=std,
        size=size,
        input_shape=loaded.input_shape,
    )
    if classes is not None:
        known = Known(known.preparation, tuple(classes))
    prepared = [prepare(image, known.preparation) for image in given]
    before = _before(layer, run, original, original_weights)
    asked = _Asked(loaded.model, known, top, layer, before)
    parts = _parts(asked, prepared, progress)
    record = Explanation(
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=loaded.source,
        method=parts.method,
        layer=parts.layer,
        map_shape=parts.map_shape,
        preparation=known.preparation,
        images=tuple(parts.images),
        command=tuple(command),
    )
    if folder is not None:
        _write(record, parts.drawn, folder)
    return Explained(record, tuple(parts.maps))


def _loaded(
    model: nn.Module | Loaded | str | Path,
    weights: str | Path | None,
    original: nn.Module | Callable[[], nn.Module] | None,
) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if not isinstance(model, str | Path):
        model = as_network(model)
        source = ModelSource(name=type(model).__name__, spec=None)
        return Loaded(model, source, getattr(model, "input_shape", None))
    return load_source(model, weights=weights, original=original)


@dataclass(frozen=True)
class _Before:
    """The original of a run, or why there is none to show."""

    network: nn.Module | None
    reason: str


def _before(
    layer: str | None,
    run: Path | None,
    original: nn.Module | Callable[[], nn.Module] | None,
    weights: str | Path | None,
) -> _Before:
    if layer is None or run is None:
        return _Before(None, "")
    if not (run / "plan.json").exists():
        return _Before(None, "The run trained its network and rewrote nothing.")
    try:
        return _Before(load_original(run, weights=weights, original=original), "")
    except OneByOneError as error:
        if weights is not None:
            raise
        return _Before(None, f"Not compared with the original. {error}")


# ---------------------------------------------------------------- each image


@dataclass(frozen=True)
class _Asked:
    """What is to be shown of a network."""

    network: nn.Module
    known: Known
    top: int
    layer: str | None
    before: _Before


@dataclass
class _Parts:
    """What is gathered batch by batch."""

    images: list[ImageExplanation]
    maps: list[Tensor]
    drawn: Drawn
    method: str = ""
    layer: str = ""
    map_shape: tuple[int, ...] = ()


def _parts(asked: _Asked, prepared: Sequence[Prepared], progress: Progress | None) -> _Parts:
    parts = _Parts([], [], Drawn())
    network = asked.network
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    for start in range(0, len(prepared), BATCH):
        batch = prepared[start : start + BATCH]
        inputs = torch.stack([each.tensor for each in batch]).to(dtype)
        activation = _activation(network, inputs, asked.top, asked.layer)
        layers = _layers(asked, inputs)
        if activation is not None:
            parts.method, parts.layer = activation.method, activation.layer
            parts.map_shape = tuple(activation.maps.shape[2:])
        for place, picture in enumerate(batch):
            evidence = None
            if activation is not None:
                evidence = Evidence.of(activation, place, asked.known.classes)
                parts.maps.append(evidence.maps)
            name = file_name(start + place + 1, picture.path)
            parts.images.append(_image(picture, name, evidence, layers[place], parts.drawn))
        if progress is not None:
            progress(start + len(batch), len(prepared), "images")
    return parts


def _activation(
    network: nn.Module, inputs: Tensor, top: int, layer: str | None
) -> Activation | None:
    try:
        return class_activation(network, inputs, top=top)
    except OneByOneError:
        # A network that is no classifier has layers to look at all the same.
        if layer is None:
            raise
        return None


@dataclass(frozen=True)
class _Layer:
    """A layer's maps of one image, ``(channels, height, width)``, after and before."""

    name: str
    after: Tensor
    before: Tensor | None
    reason: str


def _layers(asked: _Asked, inputs: Tensor) -> Sequence[_Layer | None]:
    name, before = asked.layer, asked.before
    if name is None:
        return [None] * len(inputs)
    after = feature_maps(asked.network, inputs, name).float()
    earlier, reason = None, before.reason
    if before.network is not None:
        try:
            earlier = feature_maps(before.network, inputs, name).float()
        except OneByOneError as error:
            reason = f"Not compared with the original. {error}"
    if earlier is not None and earlier.shape != after.shape:
        reason = f"The original's layer gives {'×'.join(map(str, earlier.shape[1:]))}."
        earlier = None
    return [
        _Layer(name, after[i], None if earlier is None else earlier[i], reason)
        for i in range(len(inputs))
    ]


def _image(
    picture: Prepared, name: str, evidence: Evidence | None, layer: _Layer | None, drawn: Drawn
) -> ImageExplanation:
    seen = f"{name}.png"
    drawn.pictures[seen] = picture.shown
    classes, grid = ((), "") if evidence is None else draw_classes(picture, name, evidence, drawn)
    return ImageExplanation(
        path=picture.path,
        classes=classes,
        seen_file=seen,
        grid_file=grid,
        layer=None if layer is None else _layer_maps(layer, name, drawn),
    )


def _layer_maps(layer: _Layer, name: str, drawn: Drawn) -> LayerMaps:
    shown = shown_channels(layer.after if layer.before is None else layer.before)
    file, before_file = draw_layer(layer.after, layer.before, shown, name, drawn)
    error = None
    if layer.before is not None:
        apart = (layer.after - layer.before).square().sum()
        error = float(apart / layer.before.square().sum().clamp_min(1e-12))
    return LayerMaps(
        layer=layer.name,
        shape=tuple(layer.after.shape),
        shown=shown,
        error=error,
        file=file,
        before_file=before_file,
        note=layer.reason,
    )


# ---------------------------------------------------------------- the folder


def _write(record: Explanation, drawn: Drawn, folder: Path) -> None:
    """Write the files aside, then put them into the folder in place of an earlier explanation's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            for name, pixels in drawn.pictures.items():
                (Path(aside) / name).write_bytes(encode_png(pixels))
            write_text(Path(aside) / PAGE, render_explanation(record, drawn))
            record.save(Path(aside) / RECORD)
            _remove_earlier(folder)
            for file in Path(aside).iterdir():
                file.replace(folder / file.name)
    except OSError as error:
        raise OutputError(f"Cannot write the explanation to {folder}: {error.strerror}.") from error


def _remove_earlier(folder: Path) -> None:
    if not (folder / RECORD).exists():
        return
    for name in _files(Explanation.load(folder / RECORD)):
        if Path(name).name == name:  # a record that was edited must not reach out of the folder
            (folder / name).unlink(missing_ok=True)


def _files(record: Explanation) -> list[str]:
    files: list[Any] = []
    for image in record.images:
        files += [image.seen_file, image.grid_file, *(each.file for each in image.classes)]
        if image.layer is not None:
            files += [image.layer.file, image.layer.before_file]
    return [file for file in files if file]
