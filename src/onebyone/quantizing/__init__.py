"""Networks in int8: closed forms that choose the integers, and a simulation of what runtimes do."""

from __future__ import annotations

from onebyone.quantizing.network import Quantized, load_quantized, quantize
from onebyone.quantizing.record import (
    NO_CLOSED_FORMS,
    ClosedForms,
    Grid,
    Int8Record,
    QuantizedLayer,
)

__all__ = [
    "NO_CLOSED_FORMS",
    "ClosedForms",
    "Grid",
    "Int8Record",
    "Quantized",
    "QuantizedLayer",
    "load_quantized",
    "quantize",
]
