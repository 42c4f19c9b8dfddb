"""Explains images: prepares them, computes class maps, draws them and writes the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from onebyone.calibration.infer_task import Known as TellsOfTask
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.arguments import checked
from onebyone.core.errors import ModelError, OneByOneError, OptionError
from onebyone.core.measures import Classes, Labels
from onebyone.core.records import ModelSource
from onebyone.core.task import find_task
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.version import __version__
from onebyone.core.write_files import check_folder, write_bytes, write_text, written_together
from onebyone.data import Data, as_split
from onebyone.evaluation.class_maps import Activation, class_activation, feature_maps
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
from onebyone.explaining.record import Explanation, ImageExplanation, LayerMaps
from onebyone.networks.surgery import as_network, floating_type
from onebyone.networks.zoo import Loaded
from onebyone.networks.zoo.load import one_example
from onebyone.pipeline.loading import Original, load_original, load_source
from onebyone.pipeline.run_folder import is_run
from onebyone.report.pictures import encode_png

Progress = Callable[[int, int, str], None]

RECORD = "explain.json"
PAGE = "explain.html"
BATCH = 8  # images in one forward pass: all their maps are in memory at once


@dataclass(frozen=True)
class Explained:
    """An explanation, and the maps that its pictures were drawn from.

    Attributes:
        record: Prints as a table.
        maps: For each image the maps of its top classes, ``(k, height, width)``; see
            :class:`onebyone.evaluation.class_maps.Activation`.
    """

    record: Explanation
    maps: tuple[Tensor, ...]

    def __str__(self) -> str:
        return str(self.record)


@checked
@ordinary_torch()
def explain(
    model: nn.Module | Loaded | str | Path,
    images: Sequence[str | Path | Image.Image] | str | Path | Image.Image,
    *,
    out: str | Path | None = None,
    top: int = 3,
    layer: str | None = None,
    weights: str | Path | None = None,
    original: Original | None = None,
    original_weights: str | Path | None = None,
    data: str | Data | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    task: TaskLike | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Explained:
    """Show where in images a network sees their classes, and the maps of its layers.

    Class maps are exact if the network averages maps of its classes or of its features; otherwise
    they are Grad-CAM's. See :func:`onebyone.evaluation.class_maps.class_activation`.

    Args:
        model: A network, not modified; what :func:`onebyone.load_model` takes; or what
            :func:`onebyone.pipeline.loading.load_source` gives.
        images: Files that Pillow reads, or opened pictures.
        out: Folder for a page, PNG files and a record. By default nothing is written.
        top: Classes for each image.
        layer: Name of a layer whose maps are shown too; for a run of ``shrink`` before and after.
        weights: If ``model`` is a name: a file, or ``"pretrained"``.
        original: As for :func:`onebyone.load_model`.
        original_weights: File of the original's weights, to show a layer before its rewrite.
        data: The network's training data, for the size, the normalization and the class names. By
            default the run's record gives these.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        size: Height and width in pixels that pictures are resized to.
        classes: Names of the classes.
        task: What the outputs mean, as for :func:`onebyone.plan`. By default a run's record gives
            it. Only classes and labels have probabilities and maps.
        command: The command line, for the record.
        progress: Called with the number of images done.

    Raises:
        OptionError: If there are no images, or the preparation of inputs is not known.
        DataError: If a picture cannot be read. Nothing is then written.
        UnknownNameError: If there is no such network or layer.
        ModelError: If the network gives no class scores, or its task has no classes, and ``layer``
            is not given.
        OutputError: If the folder has files other than an explanation's, or cannot be written.
    """
    given = _given(images)
    folder = (
        None if out is None else check_folder(out, owner="an earlier explanation's", marks=[RECORD])
    )
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
        inputs=loaded.inputs,
    )
    if classes is not None:
        known = Known(known.preparation, tuple(classes))
    prepared = [prepare(image, known.preparation) for image in given]
    before = _before(layer, run, original, original_weights)
    meaning = _meaning(loaded, known, prepared, task)
    asked = _Asked(loaded.model, known, top, layer, before, meaning)
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
        task=None if meaning is None else meaning.info(),
    )
    if folder is not None:
        _write(record, parts.drawn, folder)
    return Explained(record, tuple(parts.maps))


def _given(images: Any) -> list[str | Path | Image.Image]:
    given = list(images) if isinstance(images, list | tuple) else [images]
    if not given:
        raise OptionError("`images` must have at least one picture, got none.")
    odd = next((each for each in given if not isinstance(each, str | Path | Image.Image)), None)
    if odd is not None or images is None:
        raise OptionError(
            "`images` must be paths of files or opened pictures, got a "
            f"{type(odd).__name__}. Convert an array with PIL.Image.fromarray(array)."
        )
    return given


def _loaded(
    model: nn.Module | Loaded | str | Path,
    weights: str | Path | None,
    original: Original | None,
) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if not isinstance(model, str | Path):
        model = as_network(model)
        source = ModelSource(name=type(model).__name__, spec=None)
        return Loaded(model, source, one_example(model, getattr(model, "input_shape", None)))
    return load_source(model, weights=weights, original=original)


@dataclass(frozen=True)
class _Before:
    """The original of a run, or why there is none to show."""

    network: nn.Module | None
    reason: str


def _before(
    layer: str | None,
    run: Path | None,
    original: Original | None,
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
    """The requested explanation of a network."""

    network: nn.Module
    known: Known
    top: int
    layer: str | None
    before: _Before
    meaning: Meaning | None


@dataclass
class _Parts:
    """The parts of an explanation, collected batch by batch."""

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
        activation = _activation(asked, inputs)
        layers = _layers(asked, inputs)
        if activation is not None:
            parts.method, parts.layer = activation.method, activation.layer
            parts.map_shape = tuple(activation.maps.shape[2:])
        for place, picture in enumerate(batch):
            evidence = None
            if activation is not None:
                evidence = Evidence.of(
                    activation, place, asked.known.classes, _shares(asked.meaning)
                )
                parts.maps.append(evidence.maps)
            name = file_name(start + place + 1, picture.path)
            parts.images.append(_image(picture, name, evidence, layers[place], parts.drawn))
        if progress is not None:
            progress(start + len(batch), len(prepared), "images")
    return parts


def _meaning(
    loaded: Loaded, known: Known, prepared: Sequence[Prepared], task: TaskLike | None
) -> Meaning | None:
    """Return what the outputs mean; ``None`` if they are not one tensor.

    Raises:
        UnknownNameError: If there is no such task.
    """
    if task is not None:
        task = find_task(task)
    dtype = floating_type(loaded.model)
    inputs = torch.stack([each.tensor for each in prepared[:BATCH]]).to(dtype)
    certain = TellsOfTask.of(loaded.source, classes=len(known.classes))
    try:
        return meaning_of(loaded.model, as_split(inputs), task, known=certain)
    except ModelError:
        return None  # its outputs are not a tensor, but its layers can still be shown


# Tasks whose outputs are not scores of classes.
_WITHOUT_CLASSES = ("regression", "restoration", "embedding")


def _shares(meaning: Meaning | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function from scores to probabilities, or ``None`` if the task has none."""
    measure = None if meaning is None else meaning.task.measure
    if isinstance(measure, Classes):
        return lambda scores: scores.softmax(dim=0)
    return Tensor.sigmoid if isinstance(measure, Labels) else None


def _activation(asked: _Asked, inputs: Tensor) -> Activation | None:
    name = None if asked.meaning is None else asked.meaning.task.name
    try:
        if asked.meaning is not None and name in _WITHOUT_CLASSES:
            raise ModelError(
                f"A network to explain must give scores of classes or labels, but its task is "
                f"{name!r} ({asked.meaning.how}). Show a layer's maps instead (--layer), or give "
                "its `task` (--task)."
            )
        return class_activation(asked.network, inputs, top=asked.top)
    except OneByOneError:
        # The layers of a network that is not a classifier can still be shown.
        if asked.layer is None:
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
        # In float64, squares of float32 numbers do not underflow. Maps may be all zero.
        apart = (layer.after.double() - layer.before.double()).square().sum()
        size = float(layer.before.double().square().sum())
        error = float(apart) / (size or 1.0)
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
    """Write the files to a temporary folder, then replace an earlier explanation's files."""
    with written_together(folder) as aside:
        for name, pixels in drawn.pictures.items():
            write_bytes(aside / name, encode_png(pixels))
        write_text(aside / PAGE, render_explanation(record, drawn))
        record.save(aside / RECORD)
        _remove_earlier(folder)


def _remove_earlier(folder: Path) -> None:
    if not (folder / RECORD).exists():
        return
    for name in _files(Explanation.load(folder / RECORD)):
        if Path(name).name == name:  # an edited record must not delete files elsewhere
            (folder / name).unlink(missing_ok=True)


def _files(record: Explanation) -> list[str]:
    files: list[Any] = []
    for image in record.images:
        files += [image.seen_file, image.grid_file, *(each.file for each in image.classes)]
        if image.layer is not None:
            files += [image.layer.file, image.layer.before_file]
    return [file for file in files if file]
