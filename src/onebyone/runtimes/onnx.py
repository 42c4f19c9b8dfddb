"""Conversion to ONNX, and the runtime ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.records import InputSpec
from onebyone.core.shared_state import warnings_ignored
from onebyone.core.tensor_trees import Inputs, arguments_of, fresh, spec_of, to_device
from onebyone.networks.surgery import evaluation_copy
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.files import FileNetwork
from onebyone.runtimes.named_inputs import named_tensors


def to_onnx(model: nn.Module, example: Inputs, *, traced: bool = False) -> bytes:
    """Return the content of an ONNX file of a network, for inputs of the example's shapes.

    The file's inputs have the names of the tensors in the record of the example; numbers and other
    plain values are constants of the file.

    Args:
        model: Not modified. Of a :class:`FileNetwork` the file's content is returned as it is.
        example: What the network is called with.
        traced: Whether to use torch's older exporter. It takes a hundredth of the time for a few
            layers, but fails on more networks.

    Raises:
        ModelError: If it cannot be exported; says why.
    """
    if isinstance(model, FileNetwork):
        return model.content
    network = evaluation_copy(model, device="cpu")
    # Tracing runs the network, which may write into its inputs.
    args, named = arguments_of(fresh(to_device(example, "cpu")))
    names = [tensor.name for tensor in spec_of(example).tensors]
    try:
        with warnings_ignored():
            # The exporter warns about its own internals, which users cannot change.
            if traced:
                stream: Any = io.BytesIO()  # works, although its type annotations forbid it
                torch.onnx.export(network, args, stream, input_names=names, dynamo=False)
                return bytes(stream.getvalue())
            program = torch.onnx.export(
                network, args, kwargs=named, input_names=names, dynamo=True, verbose=False
            )
        assert program is not None
        serialized: bytes = program.model_proto.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be exported to ONNX: {error}"
        ) from error
    return serialized


def layers_to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """Return the content of an ONNX file of a few consecutive layers.

    Uses the older, faster exporter, and the newer one if that fails.

    Raises:
        ModelError: If they cannot be exported; says why.
    """
    try:
        return to_onnx(model, example, traced=True)
    except ModelError:
        return to_onnx(model, example)


def prepare_onnxruntime(model: nn.Module, example: Inputs) -> Prepared:
    """Run in ONNX Runtime's CPU provider."""
    return prepare_onnx_in_onnxruntime(to_onnx(model, example), example, call_of(model, example))


def prepare_layers_onnxruntime(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few consecutive layers."""
    return prepare_onnx_in_onnxruntime(layers_to_onnx(model, example), example)


def prepare_onnx_in_onnxruntime(
    content: bytes, example: Inputs, known: InputSpec | None = None
) -> Prepared:
    """Run the content of an ONNX file in ONNX Runtime's CPU provider.

    Args:
        content: The file's.
        example: What the network is called with.
        known: The call that the file was written for, if it is known.
    """
    need_device(example, "cpu", "onnxruntime")
    session = onnxruntime_session(content)
    feed = arrays_for([each.name for each in session.get_inputs()], example, known)
    return Prepared(
        lambda: session.run(None, feed),
        {
            "provider": "CPUExecutionProvider",
            "threads": str(torch.get_num_threads()),
            "spinning": "within calls",
        },
    )


def call_of(model: nn.Module, example: Inputs) -> InputSpec | None:
    """Return the call that a network's file is written for, as far as it is known.

    Args:
        model: A file knows its own; of others :func:`to_onnx` makes one for the example.
        example: What the network is called with.
    """
    return model.call if isinstance(model, FileNetwork) else spec_of(example)


def arrays_for(
    names: Sequence[str], example: Inputs, known: InputSpec | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a file's inputs.

    Args:
        names: Of the file's inputs. A network that does not read a tensor gives no input for it.
        example: What the network is called with, on the CPU.
        known: The call that the file was written for, if it is known.
    """
    return {name: each.numpy() for name, each in named_tensors(example, names, known).items()}


def onnxruntime_session(model: bytes | str) -> Any:
    """Return a CPU session with torch's number of threads, for an ONNX file or its content."""
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # By default a session's threads keep spinning after a call. If several sessions run in turn,
    # the spinning takes a core from the one that computes, which doubles its time. With this option
    # they spin only within calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only: its warnings are about its own optimizer
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
