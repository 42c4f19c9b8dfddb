"""Networks as files for other runtimes, each loaded there and compared before it is kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.data import Data, as_split
from onebyone.errors import (
    ExportError,
    MissingExtraError,
    ModelError,
    OptionError,
    OutputError,
    UnknownNameError,
)
from onebyone.exporting.formats import BATCH, DYNAMIC, FORMATS, Format, Source
from onebyone.exporting.record import ExportCheck, ExportRecord, Preprocessing
from onebyone.profiling import example_input
from onebyone.records import DataInfo, Plan, write_text
from onebyone.runtimes import outputs_of
from onebyone.runtimes.outputs import SAME_OUTPUTS, OutputDifference, difference
from onebyone.sites import as_network, evaluation_copy, run

__all__ = ["FORMATS", "ExportCheck", "ExportRecord", "Preprocessing", "export"]

# Inputs that the written file is compared on.
CHECKED = 8
# Pixels added to height and width to see whether a network takes other sizes: networks that halve
# the size five times and add the results want multiples of 32.
LARGER = (32, 64)


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    formats: Sequence[str] = ("onnx",),
    data: object = None,
    input_shape: tuple[int, ...] | None = None,
    preprocessing: Preprocessing | DataInfo | None = None,
    plan: Plan | None = None,
    name: str | None = None,
) -> ExportRecord:
    """Write a network for other runtimes; keep a file only if it gives the same outputs there.

    The batch is free, and so are height and width where the network takes other sizes. Beside
    each file lies a loader of a few lines that needs the file's runtime alone; beside all,
    ``preprocessing.json`` and ``export.json``.

    Args:
        model: Not modified.
        folder: Made if it does not exist. Files of the same names in it are replaced, all at the
            end: after an error it is as it was before.
        formats: ``safetensors`` (weights alone), ``onnx``, ``pt2``, ``openvino``, ``executorch``.
        data: Real inputs to compare on: an :class:`onebyone.data.Data`, of which the test part is
            taken, a split, or a tensor ``(n, …)``; random ones by default.
        input_shape: Shape of an input with the batch in front, needed where there is no data; the
            batch of the file is free all the same.
        preprocessing: How pictures become inputs; what the data says, by default.
        plan: Written beside the weights.
        name: What to call the network; its class by default.

    Raises:
        UnknownNameError: If there is no format of a given name.
        MissingExtraError: If the runtime of a format, which must check the file, is not installed.
        OptionError: If there is neither data nor an input shape.
        ExportError: If a file cannot be written, or gives other outputs; nothing is then left.
        OutputError: If the folder cannot be written.
    """
    asked = (formats,) if isinstance(formats, str) else formats
    chosen = [_find_format(item) for item in dict.fromkeys(asked)]
    if not chosen:
        raise OptionError(f"`formats` must name at least one of {', '.join(FORMATS)}, got none.")
    model = as_network(model)
    inputs, words = _inputs(model, data, input_shape)
    network = evaluation_copy(model, device="cpu")
    sizes = _shapes(network, inputs)
    source = Source(network.requires_grad_(requires_grad=False), inputs)
    info = _preprocessing(preprocessing, data, tuple(inputs.shape[1:]))
    with _aside(Path(folder)) as aside:
        checks = tuple(_checked(item, source, sizes, aside, words) for item in chosen)
        record = ExportRecord(
            network=name or type(model).__name__,
            input_shape=tuple(inputs.shape[1:]),
            checks=checks,
            preprocessing=info,
        )
        for item in chosen:
            write_text(aside / f"load_{item}.py", FORMATS[item].loader)
        info.save(aside / "preprocessing.json")
        record.save(aside / "export.json")
        if plan is not None:
            plan.save(aside / "plan.json")
    return record


def _find_format(name: str) -> str:
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    wanted = FORMATS[name]
    if importlib.util.find_spec(wanted.package) is None:
        raise MissingExtraError(wanted.package, wanted.extra or "", f"The format {name!r}")
    return name


def _inputs(
    model: nn.Module, data: object, input_shape: tuple[int, ...] | None
) -> tuple[Tensor, str]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if data is None:
        if input_shape is None:
            raise OptionError("`input_shape` must be given where there is no data, got None.")
        example = example_input(input_shape, dtype=dtype)
        inputs = example_input((CHECKED, *example.shape[1:]), dtype=dtype)
        return inputs, f"{CHECKED} random inputs"
    split = data.test if isinstance(data, Data) else as_split(data)
    images, _ = next(iter(split.batches(CHECKED)))
    of = f" of {data.name}" if isinstance(data, Data) else ""
    plural = "s" if len(images) > 1 else ""
    return images.to(dtype or images.dtype), f"{len(images)} real input{plural}{of}"


def _preprocessing(
    given: Preprocessing | DataInfo | None, data: object, shape: tuple[int, ...]
) -> Preprocessing:
    if given is None and isinstance(data, Data):
        given = data.info()
    if given is None:
        return Preprocessing(input_shape=shape)
    if isinstance(given, Preprocessing):
        return given
    return Preprocessing(
        input_shape=shape, mean=given.mean, std=given.std, crop=given.crop, classes=given.classes
    )


def _shapes(network: nn.Module, inputs: Tensor) -> Mapping[tuple[str, ...], list[Tensor]]:
    """Return for each set of free dimensions that the network allows the inputs to compare on."""
    alone: dict[tuple[str, ...], list[Tensor]] = {(): [inputs[:1]]}
    run(network, inputs[:1])
    try:
        run(network, inputs)
    except ModelError:
        return alone
    batches = {(BATCH,): [inputs[:1], inputs], **alone}
    if inputs.ndim != 4:
        return batches
    height, width = inputs.shape[2] + LARGER[0], inputs.shape[3] + LARGER[1]
    larger = F.interpolate(inputs[:2], size=(height, width), mode="nearest")
    try:
        run(network, larger)
    except ModelError:
        return batches
    return {DYNAMIC[0]: [inputs[:1], inputs, larger], **batches}


def _checked(
    name: str,
    source: Source,
    sizes: Mapping[tuple[str, ...], list[Tensor]],
    aside: Path,
    words: str,
) -> ExportCheck:
    """Write one format with as much free as can be, and compare it."""
    form, failures = FORMATS[name], []
    for dynamic in form.dynamic:
        if dynamic not in sizes:
            failures.append("the network takes no other sizes")
            continue
        try:
            gap = _write_and_compare(form, source, dynamic, sizes[dynamic], aside)
        except Exception as error:  # noqa: BLE001 - exporters fail in every way
            failures.append(_first_line(error))
            continue
        files = (form.file, *form.beside)
        fixed = ""
        if dynamic != DYNAMIC[0]:
            kept = ", ".join(size for size in source.sizes if size not in dynamic)
            why = failures[-1] if failures else "the format wants one size"
            fixed = f"{kept} fixed: {why.rstrip('.')}." if kept else ""
        return ExportCheck(
            format=name,
            files=files,
            file_bytes=sum((aside / file).stat().st_size for file in files),
            runtime=form.package,
            version=importlib.metadata.version(form.package),
            dynamic=dynamic,
            inputs=words,
            shapes=tuple(tuple(batch.shape) for batch in sizes[dynamic]),
            difference=gap,
            fixed=fixed,
        )
    raise ExportError(
        f"The {name} file must give what the network gives, and none that could be written does: "
        f"{failures[-1].rstrip('.')}. Nothing was kept."
    )


def _write_and_compare(
    form: Format, source: Source, dynamic: tuple[str, ...], batches: list[Tensor], aside: Path
) -> OutputDifference:
    path = aside / form.file
    with warnings.catch_warnings():
        # Exporters warn of their own inner workings, which their user cannot change.
        warnings.simplefilter("ignore")
        form.write(source, dynamic, path)
        loaded = form.read(path, source.network)
        gaps = [
            difference(outputs_of(run(source.network, batch)), outputs_of(loaded(batch)))
            for batch in batches
        ]
    worst = max(gaps, key=lambda gap: gap.relative)
    if not worst.relative <= SAME_OUTPUTS:
        raise ExportError(
            f"its outputs differ by {worst}, and {SAME_OUTPUTS:g} of the deviation is allowed"
        )
    return worst


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Give a folder beside the wanted one; move its files over if all goes well, else remove it."""
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"The output must be a folder, but {folder} is a file.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}.") from error
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir()):
            file.chmod(0o644)
            file.replace(folder / file.name)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
