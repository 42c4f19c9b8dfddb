"""The runtimes for NVIDIA GPUs only: CUDA graphs and TensorRT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, device_of, fresh, only_tensor
from onebyone.networks.surgery import repeatable, writes_into_inputs
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.eager import computing, ready_copy

# CUDA needs some runs on another stream before a capture, because libraries allocate in these.
WARM_UP = 3


def prepare_cuda_graph(model: nn.Module, example: Inputs, precision: str = "float32") -> Prepared:
    """Capture the eager kernels once and replay them, which avoids Python's cost per launch."""
    need_device(example, "cuda", "cuda-graph")
    network, example = ready_copy(model, example, precision, channels_last=True)
    return computing(lambda: _captured(network, example), example, precision)()  # type: ignore[no-any-return]


def _captured(network: nn.Module, example: Inputs) -> Prepared:
    static, device = fresh(example), device_of(example)
    once = repeatable(network, static)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            once()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = once()

    def run() -> Any:
        graph.replay()
        return outputs

    # The graph only holds addresses, so the function keeps alive what the graph reads.
    return Prepared(_holding(run, once, network, static), {"layout": "channels last"})


def _holding(function: Any, *kept: object) -> Any:
    def run(_kept: tuple[object, ...] = kept) -> Any:
        return function()

    return run


def prepare_tensorrt(model: nn.Module, example: Tensor, precision: str = "float32") -> Prepared:
    """Compile with Torch-TensorRT."""
    need_device(example, "cuda", "tensorrt")
    import torch_tensorrt  # noqa: PLC0415 - an extra

    network, laid = ready_copy(model, example, precision)
    example = only_tensor(laid, "The runtime 'tensorrt'")
    writes = writes_into_inputs(network, example)
    try:
        engine = torch_tensorrt.compile(
            network,
            ir="dynamo",
            inputs=[example],
            enabled_precisions={example.dtype},
            disable_tf32=precision != "tf32",
        )
        engine(example.clone())
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be built by TensorRT: {error}"
        ) from error

    def run() -> Any:
        with torch.no_grad():
            return engine(example.clone() if writes else example)

    return Prepared(run)
