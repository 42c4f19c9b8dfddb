"""The class of networks that were read from ONNX files."""

from __future__ import annotations

from typing import Any

from torch import nn


class OnnxNetwork(nn.Module):
    """A network of ordinary layers, read from an ONNX file.

    Its forward is generated from the file's graph by :func:`~onebyone.networks.onnx_import.read`.

    Attributes:
        onnx_sha256: Of the file.
    """

    def __init__(self, onnx_sha256: str) -> None:
        super().__init__()
        self.onnx_sha256 = onnx_sha256

    def forward(self, *inputs: Any) -> Any:
        """Compute what the file computes; replaced when the graph is read."""
        raise NotImplementedError("the graph of the file has not been read")
