"""Export formats: how to write a network, load it in its runtime, and load it as a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from onebyone.core.errors import ModelError
from onebyone.networks.surgery import evaluation_copy, run, writes_into_inputs
from onebyone.networks.zoo import load_weights, save_weights
from onebyone.runtimes.executorch import load_executorch, to_executorch
from onebyone.runtimes.onnx import onnxruntime_session
from onebyone.runtimes.openvino import compile_openvino, openvino_core, runner, settings
from onebyone.runtimes.output_check import SAME_OUTPUTS

Loaded = Callable[[Tensor], Any]

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
# Sets of free dimensions, from most to least. The first that can be written and gives the same
# outputs is kept.
DYNAMIC: tuple[tuple[str, ...], ...] = ((BATCH, HEIGHT, WIDTH), (BATCH,), ())


@dataclass
class Source:
    """The network to export, and its graphs, each traced once.

    Attributes:
        network: The network.
        example: Inputs ``(batch, …)`` for tracing.
        tolerance: Largest difference of a file's outputs from the network's, as a share of their
            standard deviation.
        programs: The traced graphs, by their free dimensions.
    """

    network: nn.Module
    example: Tensor
    tolerance: float = SAME_OUTPUTS
    programs: dict[tuple[str, ...], ExportedProgram] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The dimensions of the input that can be free."""
        return DYNAMIC[0] if self.example.ndim == 4 else (BATCH,)

    def program(self, dynamic: tuple[str, ...]) -> ExportedProgram:
        """Return the graph with these dimensions free."""
        if dynamic not in self.programs:
            network = self.network
            if writes_into_inputs(network, self.example[:1]):
                network = _OnCopies(network)
            shapes = dict.fromkeys(_places(dynamic), Dim.AUTO) or None
            # torch.export treats a batch of 1 as a constant, so the example is repeated.
            example = self.example.repeat_interleave(2, 0)[:2] if dynamic else self.example[:1]
            exported = torch.export.export(
                network, (example,), dynamic_shapes=None if shapes is None else (shapes,)
            )
            _check_free(exported, dynamic)
            # They would be saved in the file: the user's pictures, several times its size.
            exported.example_inputs = None
            self.programs[dynamic] = exported
        return self.programs[dynamic]


class _OnCopies(nn.Module):
    """Runs a network on a copy of its input, because a file must not modify its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, inputs: Tensor) -> Any:
        """Run the network."""
        return self.network(inputs.clone())


def _places(dynamic: Sequence[str]) -> list[int]:
    return [place for name, place in ((BATCH, 0), (HEIGHT, 2), (WIDTH, 3)) if name in dynamic]


def _check_free(exported: ExportedProgram, dynamic: tuple[str, ...]) -> None:
    name = exported.graph_signature.user_inputs[0]
    node = next(node for node in exported.graph.nodes if node.name == name)
    shape = node.meta["val"].shape
    for place in _places(dynamic):
        if isinstance(shape[place], int):
            raise ModelError(f"the graph fixes dimension {place} of its input to {shape[place]}")


@dataclass(frozen=True)
class Format:
    """A way to write a network.

    Attributes:
        file: Name of its file.
        write: Writes the file with the given free dimensions.
        read: Loads the file in its runtime.
        loader: A short Python file that runs it without this package.
        package: The distribution that loads it.
        extra: The extra that installs it, if it is optional.
        dynamic: The sets of free dimensions to try, largest first.
        beside: Other files that belong to it.
    """

    file: str
    write: Callable[[Source, tuple[str, ...], Path], None]
    read: Callable[[Path, nn.Module], Loaded]
    loader: str
    package: str = "torch"
    extra: str | None = None
    dynamic: tuple[tuple[str, ...], ...] = DYNAMIC
    beside: tuple[str, ...] = ()


def _write_safetensors(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    del dynamic
    save_weights(source.network, path)


def _read_safetensors(path: Path, network: nn.Module) -> Loaded:
    empty = evaluation_copy(network)
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.zero_()
    load_weights(empty, path)
    return partial(run, empty)


def _write_pt2(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    torch.export.save(source.program(dynamic), path)


def _read_pt2(path: Path, network: nn.Module) -> Loaded:
    del network
    return partial(run, torch.export.load(path).module())


def _onnx(source: Source, dynamic: tuple[str, ...]) -> bytes:
    program = torch.onnx.export(
        source.program(dynamic), dynamo=True, input_names=["input"], verbose=False
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _write_onnx(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    path.write_bytes(_onnx(source, dynamic))


def _read_onnx(path: Path, network: nn.Module) -> Loaded:
    del network
    session = onnxruntime_session(str(path))
    return lambda inputs: session.run(None, {session.get_inputs()[0].name: inputs.numpy()})


def _write_openvino(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    import openvino  # noqa: PLC0415 - an extra

    model = openvino_core().read_model(_onnx(source, dynamic))
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _read_openvino(path: Path, network: nn.Module) -> Loaded:
    del network
    compiled = compile_openvino(str(path), settings("f32"))
    return lambda inputs: runner(compiled, [inputs.numpy()])()


def _write_executorch(source: Source, dynamic: tuple[str, ...], path: Path) -> None:
    path.write_bytes(to_executorch(source.program(dynamic)))


def _read_executorch(path: Path, network: nn.Module) -> Loaded:
    del network
    return load_executorch(path.read_bytes())


_LOADER = '''"""Runs {file}; only needs {needs}. Prepare inputs as preprocessing.json says."""

import json
from pathlib import Path

{imports}

here = Path(__file__).parent
{load}


def run(inputs):
    """Return the outputs for float32 inputs of shape (batch, …)."""
    return {call}


if __name__ == "__main__":
    inputs = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))["inputs"]
    shape = inputs["tensors"][0]["shape"]
    outputs = run({zeros})
    print({show})
'''
_WEIGHTS_LOADER = '''"""Loads model.safetensors into its network: needs torch and safetensors."""

from pathlib import Path

from safetensors.torch import load_model


def load(network):
    """Load the weights into a torch.nn.Module of the same structure, and return it."""
    load_model(network, Path(__file__).parent / "model.safetensors")
    return network.eval()
'''
_NUMPY = {"zeros": 'np.zeros(shape, "float32")', "show": "[o.shape for o in outputs]"}

FORMATS: dict[str, Format] = {
    "safetensors": Format(
        "model.safetensors", _write_safetensors, _read_safetensors, _WEIGHTS_LOADER
    ),
    "pt2": Format(
        "model.pt2",
        _write_pt2,
        _read_pt2,
        _LOADER.format(
            file="model.pt2",
            needs="torch",
            imports="import torch",
            load='network = torch.export.load(here / "model.pt2").module()',
            call="network(inputs)",
            zeros="torch.zeros(shape)",
            show="outputs.shape if hasattr(outputs, 'shape') else outputs",
        ),
    ),
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        _read_onnx,
        _LOADER.format(
            file="model.onnx",
            needs="onnxruntime",
            imports="import numpy as np\nimport onnxruntime",
            load='session = onnxruntime.InferenceSession(here / "model.onnx")',
            call='session.run(None, {"input": inputs})',
            **_NUMPY,
        ),
        package="onnxruntime",
        extra="onnx",
    ),
    "openvino": Format(
        "model.xml",
        _write_openvino,
        _read_openvino,
        _LOADER.format(
            file="model.xml and model.bin",
            needs="openvino",
            imports="import numpy as np\nimport openvino",
            load="# Full float32; without this OpenVINO chooses bf16 on some processors.\n"
            'options = {"INFERENCE_PRECISION_HINT": "f32"}\n'
            'network = openvino.Core().compile_model(here / "model.xml", "CPU", options)',
            call="list(network(inputs).values())",
            **_NUMPY,
        ),
        package="openvino",
        extra="openvino",
        beside=("model.bin",),
    ),
    "executorch": Format(
        "model.pte",
        _write_executorch,
        _read_executorch,
        _LOADER.format(
            file="model.pte",
            needs="executorch",
            imports="import torch\nfrom executorch.runtime import Runtime",
            load='program = Runtime.get().load_program((here / "model.pte").read_bytes())\n'
            'method = program.load_method("forward")',
            call="method.execute([inputs])",
            zeros="torch.zeros(shape)",
            show="[o.shape for o in outputs]",
        ),
        package="executorch",
        extra="executorch",
        dynamic=((),),  # it plans its memory for one size
    ),
}
