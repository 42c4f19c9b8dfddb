"""What runs on NVIDIA's devices alone: CUDA graphs, and TensorRT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import ModelError
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.eager import computing, ready_copy

# CUDA wants a few runs on another stream before a capture: libraries allocate in the first ones.
WARM_UP = 3


def prepare_cuda_graph(model: nn.Module, example: Tensor, precision: str = "float32") -> Prepared:
    """Capture the eager kernels once and replay them: no launch costs a call of Python."""
    need_device(example, "cuda", "cuda-graph")
    network, example = ready_copy(model, example, precision, channels_last=True)
    return computing(lambda: _captured(network, example), example, precision)()  # type: ignore[no-any-return]


def _captured(network: nn.Module, example: Tensor) -> Prepared:
    static = example.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            network(static)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = network(static)

    def run() -> Any:
        graph.replay()
        return outputs

    # The graph holds addresses alone: what it reads must live as long as it does.
    return Prepared(_holding(run, network, static), {"layout": "channels last"})


def _holding(function: Any, *kept: object) -> Any:
    def run(_kept: tuple[object, ...] = kept) -> Any:
        return function()

    return run


def prepare_tensorrt(model: nn.Module, example: Tensor, precision: str = "float32") -> Prepared:
    """Compile with Torch-TensorRT."""
    need_device(example, "cuda", "tensorrt")
    import torch_tensorrt  # noqa: PLC0415 - an extra

    network, example = ready_copy(model, example, precision)
    try:
        engine = torch_tensorrt.compile(
            network,
            ir="dynamo",
            inputs=[example],
            enabled_precisions={example.dtype},
            disable_tf32=precision != "tf32",
        )
        engine(example)
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be built by TensorRT: {error}"
        ) from error

    def run() -> Any:
        with torch.no_grad():
            return engine(example)

    return Prepared(run)
