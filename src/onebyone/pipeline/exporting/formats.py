"""Export formats: how to write a network, and how to load it in its runtime."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from onebyone.core.errors import ModelError
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import (
    Inputs,
    arguments_of,
    batch_size,
    first_examples,
    repeated,
)
from onebyone.networks.exportable import OnCopies, growth_limited
from onebyone.networks.surgery import evaluation_copy, run, writes_into_inputs
from onebyone.networks.zoo import load_weights, save_weights
from onebyone.quantizing.signed import signed_form
from onebyone.runtimes.executorch import LoadedProgram, to_executorch
from onebyone.runtimes.onnx import arrays_for, onnxruntime_session
from onebyone.runtimes.openvino import compile_openvino, openvino_core, runner, settings
from onebyone.runtimes.output_check import SAME_OUTPUTS

Loaded = Callable[[Inputs], Any]

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
# Sets of free dimensions, from most to least. The first that can be written and gives the same
# outputs is kept.
DYNAMIC: tuple[tuple[str, ...], ...] = ((BATCH, HEIGHT, WIDTH), (BATCH,), ())


@dataclass
class Source:
    """The network to export, and its graphs, each traced once.

    Attributes:
        network: The network.
        example: Inputs for tracing, with the batch in front.
        spec: The record of one example, with the names that its tensors have in a file.
        tolerance: Largest difference of a file's outputs from the network's, as a share of their
            standard deviation.
        programs: The traced graphs, by their free dimensions.
    """

    network: nn.Module
    example: Inputs
    spec: InputSpec
    tolerance: float = SAME_OUTPUTS
    programs: dict[tuple[str, ...], ExportedProgram] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The dimensions of the input that can be free."""
        images = isinstance(self.example, Tensor) and self.example.ndim == 4
        return DYNAMIC[0] if images else (BATCH,)

    @property
    def names(self) -> list[str]:
        """The names that a file's inputs have."""
        return [tensor.name for tensor in self.spec.tensors]

    def program(self, dynamic: tuple[str, ...]) -> ExportedProgram:
        """Return the graph with these dimensions free."""
        if dynamic not in self.programs:
            network = self.network
            if writes_into_inputs(network, first_examples(self.example, 1)):
                network = OnCopies(network)
            example = self._traced_on(dynamic)
            args, named = arguments_of(example)
            free = self._free(network, example, dynamic) if dynamic else None
            with growth_limited(network):
                exported = torch.export.export(network, args, kwargs=named, dynamic_shapes=free)
            _check_free(exported, dynamic, self.spec)
            # They would be saved in the file: the user's pictures, several times its size.
            exported.example_inputs = None
            self.programs[dynamic] = exported
        return self.programs[dynamic]

    def _traced_on(self, dynamic: tuple[str, ...]) -> Inputs:
        """Return the example that the graph is traced on."""
        one: Inputs = first_examples(self.example, 1)
        if not dynamic:
            return one
        # torch.export treats a batch of 1 as a constant, so there are two examples.
        if isinstance(one, Tensor):
            return one.repeat_interleave(2, 0)
        two: Inputs = first_examples(self.example, 2)
        return two if batch_size(two) == 2 else repeated(one, 2)

    def _free(self, network: nn.Module, example: Inputs, dynamic: tuple[str, ...]) -> Any:
        """Return the free dimensions in the form of the network's arguments."""
        batched = iter(self.spec.tensors)

        def free(value: Any) -> Any:
            if isinstance(value, Tensor):
                return dict.fromkeys(_places(dynamic), Dim.AUTO) if next(batched).batched else None
            if isinstance(value, Mapping):
                return {key: free(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(map(free, value))
            return None

        if isinstance(example, Tensor):
            alone = free(example)
            return ((alone,),) if isinstance(network, OnCopies) else (alone,)
        if not isinstance(example, Mapping):
            return self._bound(network, tuple(map(free, example)), {})
        return self._bound(network, (), {name: free(value) for name, value in example.items()})

    @staticmethod
    def _bound(network: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return dict(inspect.signature(network.forward).bind(*args, **named).arguments)


def _places(dynamic: Sequence[str]) -> list[int]:
    return [place for name, place in ((BATCH, 0), (HEIGHT, 2), (WIDTH, 3)) if name in dynamic]


def _check_free(exported: ExportedProgram, dynamic: tuple[str, ...], spec: InputSpec) -> None:
    nodes = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    values = [nodes.get(name) for name in exported.graph_signature.user_inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    for tensor, known in zip(tensors, spec.tensors, strict=True):
        for place in _places(dynamic) if known.batched else ():
            if isinstance(tensor.shape[place], int):
                raise ModelError(
                    f"the graph fixes dimension {place} of its input to {tensor.shape[place]}"
                )


@dataclass(frozen=True)
class Format:
    """A way to write a network.

    Attributes:
        file: Name of its file.
        write: Writes the file with the given free dimensions.
        read: Loads the file in its runtime; of several inputs it needs the record.
        package: The distribution that loads it.
        extra: The extra that installs it, if it is optional.
        dynamic: The sets of free dimensions to try, largest first.
        beside: Other files that belong to it.
        takes_trees: Whether it takes several inputs.
    """

    file: str
    write: Callable[[Source, tuple[str, ...], Path], None]
    read: Callable[..., Loaded]  # (path, network, spec of the inputs)
    package: str = "torch"
    extra: str | None = None
    dynamic: tuple[tuple[str, ...], ...] = DYNAMIC
    beside: tuple[str, ...] = ()
    takes_trees: bool = True


def _write_safetensors(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    del dynamic
    save_weights(source.network, path)


def _read_safetensors(path: Path, network: nn.Module, _: InputSpec | None = None) -> Loaded:
    empty = evaluation_copy(network)
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.zero_()
    load_weights(empty, path)
    return partial(run, empty)


def _write_pt2(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    torch.export.save(source.program(dynamic), path)


def _read_pt2(path: Path, network: nn.Module, _: InputSpec | None = None) -> Loaded:
    del network
    return partial(run, torch.export.load(path).module())


def _onnx(source: Source, dynamic: tuple[str, ...]) -> bytes:
    program = torch.onnx.export(
        source.program(dynamic), dynamo=True, input_names=source.names, verbose=False
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _write_onnx(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    path.write_bytes(_onnx(source, dynamic))


def _read_onnx(path: Path, network: nn.Module, spec: InputSpec | None = None) -> Loaded:
    del network
    session = onnxruntime_session(str(path))
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, arrays_for(names, inputs, spec))


def _write_openvino(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    import openvino  # noqa: PLC0415 - an extra

    model = openvino_core().read_model(_onnx(source, dynamic))
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _read_openvino(path: Path, network: nn.Module, spec: InputSpec | None = None) -> Loaded:
    del network
    compiled = compile_openvino(str(path), settings("f32"))
    names = [each.get_any_name() for each in compiled.inputs]
    return lambda inputs: runner(compiled, [*arrays_for(names, inputs, spec).values()])()


def _write_executorch(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    signed = replace(source, network=signed_form(source.network), programs={})
    path.write_bytes(to_executorch(signed.program(dynamic)))


def _read_executorch(path: Path, network: nn.Module, _: InputSpec | None = None) -> Loaded:
    del network
    loaded: Any = LoadedProgram(path.read_bytes())  # takes one tensor
    return cast("Loaded", loaded)


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", _write_safetensors, _read_safetensors),
    "pt2": Format("model.pt2", _write_pt2, _read_pt2),
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        _read_onnx,
        package="onnxruntime",
        extra="onnx",
    ),
    "openvino": Format(
        "model.xml",
        _write_openvino,
        _read_openvino,
        package="openvino",
        extra="openvino",
        beside=("model.bin",),
    ),
    "executorch": Format(
        "model.pte",
        _write_executorch,
        _read_executorch,
        package="executorch",
        extra="executorch",
        dynamic=((),),  # it plans its memory for one size
        takes_trees=False,
    ),
}
