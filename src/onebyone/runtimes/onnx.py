"""Networks as ONNX, and ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import ModelError
from onebyone.runtimes.base import Prepared, need_device
from onebyone.sites import evaluation_copy


def to_onnx(model: nn.Module, example: Tensor, *, traced: bool = False) -> bytes:
    """Return a network as an ONNX file's content, for inputs of the example's shape.

    Args:
        model: Not modified.
        example: An input ``(batch, …)``.
        traced: Use torch's older exporter, which takes a hundredth of the time for a few layers
            and fails on more networks.

    Raises:
        ModelError: If it cannot be exported; says why.
    """
    network = evaluation_copy(model, device="cpu")
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own inner workings, which its user cannot change.
            warnings.simplefilter("ignore")
            if traced:
                stream: Any = io.BytesIO()  # it takes one, though its types say otherwise
                torch.onnx.export(
                    network, (example.cpu(),), stream, input_names=["input"], dynamo=False
                )
                return bytes(stream.getvalue())
            program = torch.onnx.export(
                network, (example.cpu(),), input_names=["input"], dynamo=True, verbose=False
            )
        assert program is not None
        serialized: bytes = program.model_proto.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be exported to ONNX: {error}"
        ) from error
    return serialized


def layers_to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """Return a few layers in a row as an ONNX file's content, by whichever exporter is quicker.

    Raises:
        ModelError: If they cannot be exported; says why.
    """
    try:
        return to_onnx(model, example, traced=True)
    except ModelError:
        return to_onnx(model, example)


def prepare_onnxruntime(model: nn.Module, example: Tensor) -> Prepared:
    """Run in ONNX Runtime's CPU provider."""
    return _prepared(to_onnx(model, example), example)


def prepare_layers_onnxruntime(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few layers in a row."""
    return _prepared(layers_to_onnx(model, example), example)


def _prepared(content: bytes, example: Tensor) -> Prepared:
    need_device(example, "cpu", "onnxruntime")
    session = onnxruntime_session(content)
    feed = {session.get_inputs()[0].name: example.numpy()}
    return Prepared(
        lambda: session.run(None, feed),
        {
            "provider": "CPUExecutionProvider",
            "threads": str(torch.get_num_threads()),
            "spinning": "within calls",
        },
    )


def onnxruntime_session(model: bytes | str) -> Any:
    """Return a session on the CPU with torch's number of threads, of a file or its content."""
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads of a session spin on after a call, and of several sessions that are run in turns one
    # is then left without a core while it computes: twice the time. Within calls they spin still.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors alone: its warnings are about its own optimizer
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
