"""Whether a processor sums products of 8-bit numbers exactly, read from it and tried out."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

# What processors call their instructions for sums of 8-bit products in 32 bits.
# source: Linux, arch/x86/include/asm/cpufeatures.h and arch/arm64/include/uapi/asm/hwcap.h
_INSTRUCTIONS = (
    "avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm", "sve2",
)  # fmt: skip
_CHANNELS = 64
_EXPECTED = 200


def eight_bit_instructions(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Return the processor's instructions that sum 8-bit products in 32 bits, in order.

    Args:
        cpuinfo: The text of ``/proc/cpuinfo``; this machine's by default. None are known where
            there is no such file.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
    return tuple(name for name in _INSTRUCTIONS if name in flags)


@cache
def saturates_here() -> bool | None:
    """Return whether ONNX Runtime saturates sums of 8-bit products; ``None`` without it.

    A convolution whose pairs of products exceed 16 bits is run: processors without dot-product
    instructions add them in 16 bits, and then its outputs are about half of what is exact.
    """
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return None
    from onebyone.runtimes.onnx import onnxruntime_session  # noqa: PLC0415 - needs an extra

    content, inputs = largest_products()
    outputs = onnxruntime_session(content).run(None, {"input": inputs})[0]
    return saturated(outputs)


def saturated(outputs: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bool:
    """Return whether outputs of :func:`largest_products` are not what is exact."""
    return bool((outputs != _EXPECTED).any())


def largest_products() -> tuple[bytes, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Return an ONNX file's content, a convolution of the largest weights, and its inputs.

    Each output is exactly 200.
    """
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - an extra

    total = 255 * 127 * _CHANNELS
    constants = {
        "input_scale": np.float32(1),
        "input_zero": np.uint8(0),
        "weight": np.full((_CHANNELS, _CHANNELS, 1, 1), 127, np.int8),
        "weight_scale": np.float32(1),
        "weight_zero": np.int8(0),
        "output_scale": np.float32(total / _EXPECTED),
        "output_zero": np.uint8(0),
    }
    inputs = np.full((1, _CHANNELS, 4, 4), 255, np.uint8)
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["input", *constants], ["output"])],
        "largest_products",
        [helper.make_tensor_value_info("input", TensorProto.UINT8, inputs.shape)],
        [helper.make_tensor_value_info("output", TensorProto.UINT8, inputs.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content, inputs
