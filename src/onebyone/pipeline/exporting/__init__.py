"""Exports networks to files for other runtimes; loads and compares each file before keeping it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.core.arguments import OneOf, checked
from onebyone.core.errors import (
    ExportError,
    MissingExtraError,
    ModelError,
    OptionError,
    UnknownNameError,
)
from onebyone.core.records import DataInfo, InputSpec, Plan
from onebyone.core.shared_state import warnings_ignored
from onebyone.core.tensor_trees import (
    Inputs,
    batch_size,
    first_examples,
    repeated,
    spec_of,
    tensors_in,
)
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.write_files import check_folder, write_text, written_together
from onebyone.data import Data, as_split
from onebyone.networks.examples import Example, given_example, inputs_of
from onebyone.networks.surgery import as_network, evaluation_copy, in_type_of, run
from onebyone.pipeline.exporting.failure import why_it_failed
from onebyone.pipeline.exporting.formats import BATCH, DYNAMIC, FORMATS, Format, Source
from onebyone.pipeline.exporting.loaders import loader_of
from onebyone.pipeline.exporting.record import ExportCheck, ExportRecord, Preprocessing
from onebyone.profiling.trace import trace_layers
from onebyone.quantizing import Quantized, quantize
from onebyone.runtimes import outputs_of
from onebyone.runtimes.output_check import SAME_OUTPUTS, OutputDifference, difference

__all__ = ["FORMATS", "ExportCheck", "ExportRecord", "Preprocessing", "export"]

# Number of inputs to compare the written file on.
CHECKED = 8
# Pixels added to height and width to test whether a network accepts other sizes. Networks that
# halve the size five times and add the results need multiples of 32.
LARGER = (32, 64)
INT8_FORMATS = ("onnx", "openvino", "executorch")
# Allowed difference in int8, as a share of the outputs' standard deviation. If a sum lies halfway
# between two steps, a runtime may round to the other one. And OpenVINO adds to a convolution's sums
# before it rounds them.
SAME_STEPS = 0.25


@checked
@ordinary_torch()
def export(
    model: nn.Module | Quantized,
    folder: str | Path,
    *,
    formats: Sequence[str] = ("onnx",),
    data: object = None,
    input_shape: tuple[int, ...] | None = None,
    example: object = None,
    preprocessing: Preprocessing | DataInfo | None = None,
    plan: Plan | None = None,
    name: str | None = None,
    precision: str = "float32",
    calibration: object = None,
) -> ExportRecord:
    """Export a network for other runtimes; keep a file only if it gives the same outputs there.

    The batch size is free, and so are height and width if the network accepts other sizes. Each
    file comes with a short loader that needs only the file's runtime. The folder also gets
    ``preprocessing.json`` and ``export.json``.

    Args:
        model: Not modified. Of a :class:`onebyone.quantizing.Quantized` its integers are written.
        folder: Created if it does not exist. Files of the same names are replaced, all at the
            end: after an error the folder is unchanged.
        formats: ``safetensors`` (weights only), ``onnx``, ``pt2``, ``openvino``, ``executorch``.
        data: Real inputs to compare on: an :class:`onebyone.data.Data` (its test part is used), a
            split, a tensor ``(n, …)`` or a mapping of keyword arguments. The default is random
            inputs.
        input_shape: Shape of the input with the batch in front; required without data or an
            example. The file's batch size is free anyway.
        example: In place of ``input_shape``: a tensor, a tuple of positional arguments or a mapping
            of keyword arguments, whose values are then compared on. A file's inputs have the names
            of the arguments; numbers and other values beside tensors are fixed in it.
        preprocessing: How pictures become inputs; default: taken from the data.
        plan: Written beside the weights.
        name: Name for the network; default: its class.
        precision: ``float32``, or ``int8`` (only ``onnx``, ``openvino`` and ``executorch``). For
            int8, the file's outputs are compared with those of the simulated int8 network, and
            ``int8.json`` and ``int8.safetensors`` are written too.
        calibration: Unlabelled inputs for int8, as for :func:`onebyone.quantizing.quantize`;
            default: the training part of ``data``. Without data, shape and example, outputs are
            compared on these inputs.

    Raises:
        UnknownNameError: If there is no format of a given name.
        MissingExtraError: If the runtime that checks a format's file is not installed.
        OptionError: If there is nothing to take an input from.
        ExportError: If a file cannot be written, or gives other outputs; nothing is kept.
        OutputError: If the folder cannot be written.
    """
    asked = (formats,) if isinstance(formats, str) else formats
    chosen = [_find_format(item) for item in dict.fromkeys(asked)]
    if not chosen:
        raise OptionError(f"`formats` must name at least one of {', '.join(FORMATS)}, got none.")
    OneOf(("float32", "int8"))("precision", precision)
    given = model if isinstance(model, Quantized) else None
    if given is not None:
        model, precision = given.network, "int8"
    if calibration is not None and precision != "int8":
        raise OptionError("`calibration` must be left out for float32: only int8 uses it.")
    out = check_folder(folder)
    model = as_network(model)
    name = name or (type(model).__name__ if given is None else given.record.network)
    shown = calibration if data is None and input_shape is None and example is None else data
    inputs, words = _inputs(model, shown, input_shape, example)
    spec = _spec(model, inputs)
    _check_taken(spec, chosen, precision)
    network = evaluation_copy(model, device="cpu")
    quantized = None
    if precision == "int8":
        _check_int8_formats(chosen)
        quantized = given or _quantized(network, data, calibration, name)
        network = quantized.network
    sizes = _shapes(network, inputs)
    tolerance = SAME_OUTPUTS if quantized is None else SAME_STEPS
    source = Source(network.requires_grad_(requires_grad=False), inputs, spec, tolerance)
    info = _preprocessing(preprocessing, data, spec)
    with written_together(out) as aside:
        checks = tuple(_checked(item, source, sizes, aside, words) for item in chosen)
        record = ExportRecord(
            network=name,
            inputs=spec,
            checks=checks,
            preprocessing=info,
            precision="float32" if quantized is None else "int8",
            params=_weights(network, quantized),
            macs=trace_layers(network, first_examples(inputs, 1)).macs,
        )
        for item in chosen:
            write_text(aside / f"load_{item}.py", loader_of(item, spec))
        info.save(aside / "preprocessing.json")
        record.save(aside / "export.json")
        if quantized is not None:
            quantized.save(aside)
        if plan is not None:
            plan.save(aside / "plan.json")
    return record


def _check_taken(spec: InputSpec, formats: Sequence[str], precision: str) -> None:
    """Check that each format takes a network's inputs."""
    if precision == "int8":
        spec.single("Int8")
    for item in formats:
        if not FORMATS[item].takes_trees:
            spec.single(f"The format {item!r}")


def _check_int8_formats(formats: Sequence[str]) -> None:
    for item in formats:
        if item not in INT8_FORMATS:
            raise OptionError(
                f"`formats` must be of {', '.join(INT8_FORMATS)} for int8, got {item!r}."
            )


def _quantized(network: nn.Module, data: object, calibration: object, name: str) -> Quantized:
    """Return the simulated int8 network, quantized on the calibration examples or the data."""
    examples = data if calibration is None else calibration
    if examples is None:
        raise OptionError(
            "`calibration` must be given for int8 without data, got None. Give inputs (--data)."
        )
    return quantize(network, examples, name=name)


def _weights(network: nn.Module, quantized: Quantized | None) -> int:
    """Return the number of weights of layers; biases and norms are left out."""
    integers = () if quantized is None else quantized.integers.values()
    return sum(each.numel() for each in (*network.parameters(), *integers) if each.ndim > 1)


def _find_format(name: str) -> str:
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    wanted = FORMATS[name]
    if importlib.util.find_spec(wanted.package) is None:
        raise MissingExtraError(wanted.package, wanted.extra or "", f"The format {name!r}")
    return name


def _inputs(
    model: nn.Module, data: object, input_shape: tuple[int, ...] | None, example: object
) -> tuple[Inputs, str]:
    if data is None:
        if input_shape is None and example is None:
            raise OptionError("`input_shape` must be given without data, got None.")
        given = given_example(model, input_shape=input_shape, example=example)
        if given.given is None:
            given = Example(given.spec.with_batch(CHECKED))
        inputs = given.on(model, "cpu")
        count = given.spec.batch
        kind = "random" if example is None else "given"
        return inputs, f"{count} {kind} input{'s' if count > 1 else ''}"
    split = data.test if isinstance(data, Data) else as_split(data)
    inputs, targets = next(iter(split.batches(CHECKED)))
    of = f" of {data.name}" if isinstance(data, Data) else ""
    plural = "s" if len(targets) > 1 else ""
    return in_type_of(model, inputs), f"{len(targets)} real input{plural}{of}"


def _spec(model: nn.Module, inputs: Inputs) -> InputSpec:
    """Return the record of one example; its tensors have the names of the network's arguments."""
    if isinstance(inputs, Tensor):
        return spec_of(inputs[:1])
    spec = inputs_of(model, inputs)
    return spec.with_batch(1) if any(tensor.batched for tensor in spec.tensors) else spec


def _preprocessing(
    given: Preprocessing | DataInfo | None, data: object, spec: InputSpec
) -> Preprocessing:
    if given is None and isinstance(data, Data):
        given = data.info()
    if given is None:
        return Preprocessing(inputs=spec)
    if isinstance(given, Preprocessing):
        return given
    return Preprocessing(
        inputs=spec, mean=given.mean, std=given.std, crop=given.crop, classes=given.classes
    )


def _shapes(network: nn.Module, inputs: Inputs) -> Mapping[tuple[str, ...], list[Inputs]]:
    """Return the inputs to compare on, for each set of free dimensions that the network allows."""
    one = first_examples(inputs, 1)
    alone: dict[tuple[str, ...], list[Inputs]] = {(): [one]}
    run(network, one)
    if not isinstance(inputs, Tensor) and batch_size(inputs) == 1:
        inputs = repeated(one, 2)
    try:
        run(network, inputs)
    except ModelError:
        return alone
    batches = {(BATCH,): [one, inputs], **alone}
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return batches
    height, width = inputs.shape[2] + LARGER[0], inputs.shape[3] + LARGER[1]
    larger = F.interpolate(inputs[:2], size=(height, width), mode="nearest")
    try:
        run(network, larger)
    except ModelError:
        return batches
    return {DYNAMIC[0]: [one, inputs, larger], **batches}


def _checked(
    name: str,
    source: Source,
    sizes: Mapping[tuple[str, ...], list[Inputs]],
    aside: Path,
    words: str,
) -> ExportCheck:
    """Write one format with as many free dimensions as possible, and compare it."""
    form, failures = FORMATS[name], []
    for dynamic in form.dynamic:
        if dynamic not in sizes:
            failures.append("the network accepts no other sizes")
            continue
        try:
            gap = _write_and_compare(form, source, dynamic, sizes[dynamic], aside)
        except Exception as error:  # noqa: BLE001 - exporters fail in every way
            failures.append(why_it_failed(error))
            continue
        files = (form.file, *form.beside)
        fixed = ""
        if dynamic != DYNAMIC[0]:
            kept = ", ".join(size for size in source.sizes if size not in dynamic)
            why = failures[-1] if failures else "the format needs one fixed size"
            fixed = f"{kept} fixed: {'; '.join(why.splitlines()).rstrip('.')}." if kept else ""
        return ExportCheck(
            format=name,
            files=files,
            file_bytes=sum((aside / file).stat().st_size for file in files),
            runtime=form.package,
            version=importlib.metadata.version(form.package),
            dynamic=dynamic,
            inputs=words,
            shapes=tuple(
                tuple(tensor.shape) for batch in sizes[dynamic] for tensor in tensors_in(batch)
            ),
            difference=gap,
            tolerance=source.tolerance,
            fixed=fixed,
        )
    raise ExportError(
        f"The {name} file must give the network's outputs, but no file that could be written does: "
        f"{failures[-1].rstrip('.')}. Nothing was kept."
    )


def _write_and_compare(
    form: Format, source: Source, dynamic: tuple[str, ...], batches: list[Inputs], aside: Path
) -> OutputDifference:
    path = aside / form.file
    with warnings_ignored():
        # Exporters warn about their own internals, which users cannot change.
        form.write(source, dynamic, path)
        loaded = form.read(path, source.network, source.spec)
        gaps = [
            difference(outputs_of(run(source.network, batch)), outputs_of(loaded(batch)))
            for batch in batches
        ]
    worst = max(gaps, key=lambda gap: gap.size)
    if worst.size > source.tolerance:
        raise ExportError(
            f"its outputs differ by {worst}, and {source.tolerance:g} of the deviation is allowed"
        )
    return worst
