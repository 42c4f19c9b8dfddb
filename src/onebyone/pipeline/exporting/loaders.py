"""Short Python files that run an exported file without this package."""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from onebyone.core.records import InputSpec

_WEIGHTS = '''"""Loads model.safetensors into its network: needs torch and safetensors."""

from pathlib import Path

from safetensors.torch import load_model


def load(network):
    """Load the weights into a torch.nn.Module of the same structure, and return it."""
    load_model(network, Path(__file__).parent / "model.safetensors")
    return network.eval()
'''
_ONE = Template(
    '''"""Runs $file; only needs $needs. Prepare inputs as preprocessing.json says."""

import json
from pathlib import Path

$imports

here = Path(__file__).parent
$load


def run(inputs):
    """Return the outputs for float32 inputs of shape (batch, …)."""
    return $call


if __name__ == "__main__":
    inputs = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))["inputs"]
    shape = inputs["tensors"][0]["shape"]
    outputs = run($zeros)
    print($show)
'''
)
_SEVERAL = Template(
    '''"""Runs $file; only needs $needs. Its inputs are described in preprocessing.json."""

import json
from pathlib import Path

$imports

here = Path(__file__).parent
$load


def run($names):
    """Return the outputs for inputs with the batch in front."""
    $body


if __name__ == "__main__":
    text = (here / "preprocessing.json").read_text(encoding="utf-8")
    tensors = json.loads(text)["inputs"]["tensors"]
    outputs = run(**{each["name"]: $zeros for each in tensors})
    print($show)
'''
)
_SHAPES = "[o.shape for o in outputs]"


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """What the loaders of a format say, for one tensor and for several inputs."""

    file: str
    needs: str
    imports: str
    load: str
    call: str
    several: str
    zeros: tuple[str, str]
    show: str = _SHAPES


_ARRAYS = ('np.zeros(shape, "float32")', 'np.zeros(each["shape"], each["dtype"])')
_TENSORS = (
    "torch.zeros(shape)",
    'torch.zeros(each["shape"], dtype=getattr(torch, each["dtype"]))',
)
_LOADERS = {
    "pt2": _Loader(
        file="model.pt2",
        needs="torch",
        imports="import torch",
        load='network = torch.export.load(here / "model.pt2").module()',
        call="network(inputs)",
        several="return network$call",
        zeros=_TENSORS,
        show="outputs.shape if hasattr(outputs, 'shape') else outputs",
    ),
    "onnx": _Loader(
        file="model.onnx",
        needs="onnxruntime",
        imports="import numpy as np\nimport onnxruntime",
        load='session = onnxruntime.InferenceSession(here / "model.onnx")',
        call='session.run(None, {"input": inputs})',
        several="given = $given\n"
        "    read = [each.name for each in session.get_inputs()]\n"
        "    return session.run(None, {name: given[name] for name in read})",
        zeros=_ARRAYS,
    ),
    "openvino": _Loader(
        file="model.xml and model.bin",
        needs="openvino",
        imports="from functools import lru_cache\n\nimport numpy as np\nimport openvino",
        load="# Full float32; without this OpenVINO chooses bf16 on some processors.\n"
        'options = {"INFERENCE_PRECISION_HINT": "f32"}\n'
        "core = openvino.Core()\n"
        'model = core.read_model(here / "model.xml")\n\n\n'
        "@lru_cache(maxsize=8)\n"
        "def network_for(*sizes):\n"
        '    """Return the network for one size of its inputs: faster than with free sizes."""\n'
        "    sized = model.clone()\n"
        "    sized.reshape(dict(sizes))  # leave this out if sizes are ever new\n"
        '    return core.compile_model(sized, "CPU", options)',
        call="list(network_for((0, inputs.shape))(inputs).values())",
        several="given = $given\n"
        "    read = [each.any_name for each in model.inputs]\n"
        "    sizes = ((name, given[name].shape) for name in read)\n"
        "    return list(network_for(*sizes)({name: given[name] for name in read}).values())",
        zeros=_ARRAYS,
    ),
    "executorch": _Loader(
        file="model.pte",
        needs="executorch",
        imports="import torch\nfrom executorch.runtime import Runtime",
        load='program = Runtime.get().load_program((here / "model.pte").read_bytes())\n'
        'method = program.load_method("forward")',
        call="method.execute([inputs])",
        several="",
        zeros=_TENSORS,
    ),
}


def loader_of(name: str, spec: InputSpec) -> str:
    """Return the text of a format's loader.

    Args:
        name: Of the format.
        spec: What the network takes.
    """
    if name == "safetensors":
        return _WEIGHTS
    loader = _LOADERS[name]
    shared = {
        "file": loader.file,
        "needs": loader.needs,
        "imports": loader.imports,
        "load": loader.load,
        "show": loader.show,
    }
    if spec.is_single:
        return _ONE.substitute(shared, call=loader.call, zeros=loader.zeros[0])
    names = [tensor.name for tensor in spec.tensors]
    given = ", ".join(f'"{each}": {each}' for each in names)
    body = Template(loader.several).substitute(call=spec.call, given=f"{{{given}}}")
    return _SEVERAL.substitute(shared, body=body, names=", ".join(names), zeros=loader.zeros[1])
