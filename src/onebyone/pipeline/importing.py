"""Networks from ONNX files as modules of layers, proven against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from onebyone.core.arguments import checked
from onebyone.core.errors import MissingExtraError, ModelError, OptionError
from onebyone.core.read_files import printable, reason_of
from onebyone.core.records import InputSpec, ModelSource, TensorSpec
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.onnx_import import Imported, OnnxFile, read, read_file
from onebyone.networks.zoo import Loaded
from onebyone.runtimes.output_check import difference

Shapes = list[tuple[int, ...]]
# Largest rounding of a value between 0 and 1 in float32, however small the value is.
ROUNDED = 2e-6
# Sizes that are tried, one after the other, where a file leaves them free.
_TRIED = ((224, 224), (64, 64), (48, 320), (32, 128), (256, 256), (640, 640), (16, 16))


@checked
@ordinary_torch()
def import_onnx(path: str | Path, /, *, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """Return the network of an ONNX file as a module of layers, which can be rewritten.

    Its outputs are compared with ONNX Runtime's on random inputs of one and of two examples. The
    file is not modified, and no code of it is run. To run the file itself, give it to
    :func:`load_model`.

    Args:
        path: An ``.onnx`` file in float32, with its files of weights beside it.
        input_shape: Shape of an input with the batch in front, for a file that leaves sizes free.
            By default common sizes are tried.

    Returns:
        The network, on the CPU, in evaluation mode.

    Raises:
        ModelError: If the file is missing, unreadable or quantized, has an operator that is not
            supported, or gives other outputs in ONNX Runtime; says at which node.
        MissingExtraError: If the packages onnx and onnxruntime are not installed.
        OptionError: If ``input_shape`` is not a shape of the file's input.
    """
    return imported(Path(path), input_shape=input_shape).model


def imported(path: Path, *, input_shape: tuple[int, ...] | str | None = None) -> Loaded:
    """Return a network like :func:`import_onnx`, with its source and its inputs."""
    try:
        return _imported(path, input_shape)
    except ModelError as error:
        name = printable(path)
        if name in str(error):
            raise
        raise ModelError(f"{name} cannot be read as a network: {error}") from error


def _imported(path: Path, input_shape: tuple[int, ...] | str | None) -> Loaded:
    file = read_file(path)
    asked = None if input_shape is None else _asked(file, input_shape)
    session = _session(file)
    shapes = _shapes(file, session, asked)
    found = read(file, shapes)
    _prove(found, session, shapes)
    options = {} if input_shape is None else {"input_shape": _text(shapes[0])}
    source = ModelSource(name=path.stem, spec=str(path), options=options, sha256=file.sha256)
    known = asked is not None or all(None not in each.sizes[1:] for each in file.inputs)
    return Loaded(
        model=found.network, source=source, inputs=_inputs(found, shapes) if known else None
    )


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------- shapes of inputs


def _asked(file: OnnxFile, given: tuple[int, ...] | str) -> tuple[int, ...]:
    """Return the shape of the only input as the caller gives it.

    Raises:
        OptionError: If it is none, or not one that the file takes.
    """
    advice = "such as (1, 3, 224, 224), or 1x3x224x224"
    try:
        sizes = given.replace(",", "x").split("x") if isinstance(given, str) else given
        shape = tuple(int(size) for size in sizes)
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(f"`input_shape` must be positive sizes, {advice}, got {given!r}.")
    if len(file.inputs) != 1:
        raise OptionError(
            f"`input_shape` must be left out for {printable(file.path)}, which has "
            f"{len(file.inputs)} inputs. Fix their sizes in the file."
        )
    own = file.inputs[0].sizes
    fits = len(own) == len(shape) and all(
        size is None or size == wanted for size, wanted in zip(own[1:], shape[1:], strict=True)
    )
    if not fits:
        raise OptionError(
            f"`input_shape` must be one that {printable(file.path)} takes, {_declared(own)}, got "
            f"{given!r}."
        )
    return (own[0] or 1, *shape[1:]) if own else ()


def _declared(sizes: Sequence[int | None]) -> str:
    return "×".join("?" if size is None else str(size) for size in sizes) or "a scalar"


def _shapes(file: OnnxFile, session: Any, asked: tuple[int, ...] | None) -> Shapes:
    """Return a shape for each input, of one example, that ONNX Runtime takes.

    Raises:
        ModelError: If it takes none of those that are tried.
    """
    tried = _candidates(file) if asked is None else [[asked]]
    if len(tried) == 1:
        _try(file, session, tried[0])
        return tried[0]
    for shapes in tried:
        with suppress(ModelError):
            _try(file, session, shapes)
            return shapes
    listed = ", ".join(_text(shapes[0]) for shapes in tried)
    own = _declared(file.inputs[0].sizes)
    raise ModelError(
        f"{printable(file.path)} leaves sizes of its input free, {own}, and ONNX Runtime takes "
        f"none of those that were tried: {listed}. Give one that it takes: --model-option "
        f"input_shape=1x3x48x320 (in Python: input_shape=(1, 3, 48, 320))."
    )


def _candidates(file: OnnxFile) -> list[Shapes]:
    if all(None not in each.sizes[1:] for each in file.inputs):
        return [[tuple(size or 1 for size in each.sizes) for each in file.inputs]]
    found: list[Shapes] = []
    for pair in _TRIED:
        shapes = [
            tuple(
                size or (1 if axis == 0 else pair[0 if axis < len(each.sizes) - 1 else 1])
                for axis, size in enumerate(each.sizes)
            )
            for each in file.inputs
        ]
        if shapes not in found:
            found.append(shapes)
    return found


def _try(file: OnnxFile, session: Any, shapes: Shapes) -> None:
    _run_file(file, session, _drawn(file, shapes, batch=None))


def _inputs(found: Imported, shapes: Shapes) -> InputSpec | None:
    """Return what one example is; ``None`` if an input has no batch or a name of its own."""
    tensors = found.file.inputs
    if any(not shape for shape in shapes):
        return None
    types = [cast("Any", str(each.dtype).removeprefix("torch.")) for each in tensors]
    single = [(1, *shape[1:]) for shape in shapes]
    if len(single) == 1:
        return InputSpec.of_shape(single[0], dtype=types[0])
    specs = tuple(
        TensorSpec(name=name, shape=shape, dtype=dtype)
        for name, shape, dtype in zip(found.arguments, single, types, strict=True)
    )
    return InputSpec(tensors=specs, call=f"({', '.join(found.arguments)})")


def _drawn(file: OnnxFile, shapes: Shapes, *, batch: int | None, positive: bool = False) -> Any:
    """Return random inputs by name; integers are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for each, shape in zip(file.inputs, shapes, strict=True):
        sizes = shape if batch is None or not shape else (batch, *shape[1:])
        if each.dtype.is_floating_point:
            drawn = torch.randn(sizes, generator=generator, dtype=torch.float32).to(each.dtype)
            drawn = drawn.abs() if positive else drawn
        else:
            drawn = torch.randint(0, 2, sizes, generator=generator).to(each.dtype)
        made[each.name] = drawn
    return made


# ---------------------------------------------------------------- the proof


def _session(file: OnnxFile, model: bytes | None = None) -> Any:
    """Return a session of ONNX Runtime for a file, or for a model made from it."""
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", f"Reading {printable(file.path)}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # sizes that it does not take are tried
    if model is not None:  # of all values none must be fused away
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            str(file.path) if model is None else model,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it prints
        )
    except Exception as error:  # the runtime's own classes
        raise ModelError(
            f"ONNX Runtime must be able to read {printable(file.path)}, but it cannot: "
            f"{reason_of(error)}."
        ) from error


def _run_file(file: OnnxFile, session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    # A file may name an input that nothing reads, which a session leaves out.
    wanted = {each.name for each in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    try:
        return [torch.from_numpy(np.array(each)) for each in session.run(None, feed)]
    except Exception as error:  # the runtime's own classes
        shapes = ", ".join(_text(tuple(each.shape)) for each in inputs.values())
        raise ModelError(
            f"ONNX Runtime must be able to run {printable(file.path)} on {shapes}, but it cannot: "
            f"{reason_of(error)}."
        ) from error


def _run_network(found: Imported, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = found.network(*(tensor.clone() for tensor in inputs.values()))
    return list(output) if isinstance(output, tuple) else [output]


def _prove(found: Imported, session: Any, shapes: Shapes) -> None:
    """Check that a network gives the file's outputs for one example, and for two at once.

    Raises:
        ModelError: If it does not; names the first node whose value differs.
    """
    file = found.file
    inputs = _drawn(file, shapes, batch=None)
    wanted = _run_file(file, session, inputs)
    if not all(bool(each.isfinite().all()) for each in wanted):
        inputs = _drawn(file, shapes, batch=None, positive=True)
        wanted = _run_file(file, session, inputs)
    try:
        own = _run_network(found, inputs)
    except Exception as error:
        raise ModelError(
            f"{printable(file.path)} was read, but its network cannot be run in PyTorch: "
            f"{reason_of(error)}. Please report this with the file."
        ) from error
    _check(found, inputs, wanted, own, "")
    if all(shape for shape in shapes):
        _prove_batch(found, session, shapes)


def _prove_batch(found: Imported, session: Any, shapes: Shapes) -> None:
    file = found.file
    fixed = any(each.sizes[0] for each in file.inputs)
    batch = 2 * shapes[0][0]
    inputs = _drawn(file, shapes, batch=batch)
    if fixed:
        halves = [
            _run_file(file, session, {name: part.chunk(2)[half] for name, part in inputs.items()})
            for half in range(2)
        ]
    try:
        own = _run_network(found, inputs)
    except Exception as error:
        raise ModelError(
            f"{printable(file.path)} must compute any number of examples at once, but its graph "
            f"fails for {batch}: {reason_of(error)}. Export it with a free batch "
            f"(`dynamic_shapes` or `dynamic_axes` of torch.onnx.export)."
        ) from error
    if not fixed:
        wanted = _run_file(file, session, inputs)
    else:
        wanted = [
            _joined(first, second, each) for first, second, each in zip(*halves, own, strict=True)
        ]
    _check(found, inputs, wanted, own, f" of {batch} examples", named=not fixed)


def _joined(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Return the outputs of two examples as one, along the dimension that has grown."""
    grown = [
        axis
        for axis, (size, twice) in enumerate(zip(first.shape, like.shape, strict=False))
        if twice == 2 * size
    ]
    return torch.cat([first, second], grown[0] if grown else 0) if first.dim() else first


def _check(
    found: Imported,
    inputs: Mapping[str, Tensor],
    wanted: list[Tensor],
    own: list[Tensor],
    of: str,
    *,
    named: bool = True,
) -> None:
    why = _why_different(wanted, own, [False] * len(own))
    if why is None:
        return
    # The outputs of a sigmoid may lie near 0 alone: then all values before them are compared.
    where = _first_different(found, inputs) if named else ""
    limited = _why_different(wanted, own, _bounded(found, found.file.outputs)) is None
    if limited and (where is None or not named):
        return
    raise ModelError(
        f"The network read from {printable(found.file.path)} must give the outputs of ONNX "
        f"Runtime, but on a random input{of} {why}{where or ''}. Please report this with the file; "
        f"give its PyTorch code as path/net.py:factory meanwhile."
    )


def _bounded(found: Imported, names: Sequence[str]) -> list[bool]:
    """Return of which values float32's rounding is absolute: those between 0 and 1."""
    nodes = [found.made.get(name) for name in names]
    return [
        node is not None
        and node.op == "call_module"
        and isinstance(found.network.get_submodule(str(node.target)), nn.Sigmoid | nn.Softmax)
        for node in nodes
    ]


def _why_different(
    wanted: Sequence[Tensor], own: Sequence[Tensor], bounded: Sequence[bool]
) -> str | None:
    shapes = [tuple(each.shape) for each in wanted], [tuple(each.shape) for each in own]
    if shapes[0] != shapes[1]:
        return f"they have the shapes {shapes[1]} instead of {shapes[0]}"
    for first, second, limited in zip(wanted, own, bounded, strict=True):
        gap = difference([_finite(first)], [_finite(second)])
        small = limited and gap.max_abs is not None and gap.max_abs <= ROUNDED
        if not gap.same and not small:
            return f"they differ by {gap}"
    return None


def _finite(tensor: Tensor) -> Tensor:
    # NaN and infinities become numbers, which must be in the same positions to be the same.
    return tensor.detach().to(torch.float64).nan_to_num(nan=1e30, posinf=2e30, neginf=-2e30)


def _first_different(found: Imported, inputs: Mapping[str, Tensor]) -> str | None:
    """Return the first node of the file whose value differs, in words.

    Returns:
        ``None`` if all values are the same; an empty text if they cannot be compared.
    """
    try:
        theirs = dict(_values_of_file(found, inputs))
        mine = _values_of_network(found, inputs)
    except Exception:  # noqa: BLE001 - it only says more about an error
        return ""
    for node in found.file.nodes:
        for name in node.outputs:
            value = mine.get(found.made.get(name))
            if name not in theirs or not isinstance(value, Tensor):
                continue
            if _why_different([theirs[name]], [value], _bounded(found, [name])) is not None:
                return f", first at the value {printable(name)!r} of the node {node}"
    return None


def _values_of_file(found: Imported, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.ModelProto()
    model.CopyFrom(found.file.model)
    known = {each.name for each in model.graph.output}
    names = [name for node in found.file.nodes for name in node.outputs if name in found.made]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = _session(found.file, model.SerializeToString())
    values = _run_file(found.file, session, inputs)
    yield from zip((each.name for each in model.graph.output), values, strict=True)


def _values_of_network(found: Imported, inputs: Mapping[str, Tensor]) -> dict[Any, Any]:
    values: dict[Any, Any] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Watching(found.network, garbage_collect_values=False, graph=found.graph).run(
            *(tensor.clone() for tensor in inputs.values())
        )
    return values


__all__ = ["import_onnx", "imported"]
