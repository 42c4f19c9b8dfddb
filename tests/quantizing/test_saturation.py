"""Instructions for 8-bit products, and the convolution that shows whether sums saturate."""

import numpy as np
import pytest

from onebyone.quantizing import saturation

X86 = "processor : 0\nmodel name : some\nflags : fpu avx2 avx512_vnni amx_int8 avx_vnni\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp i8mm\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, ("avx_vnni", "avx512_vnni", "amx_int8")),
        (ARM, ("asimddp", "i8mm")),
        ("flags : fpu avx2\n", ()),
        ("", ()),
    ],
)
def test_instructions_are_read_from_the_processor(text: str, expected: tuple[str, ...]) -> None:
    assert saturation.eight_bit_instructions(text) == expected


def test_processors_with_dot_products_do_not_saturate() -> None:
    pytest.importorskip("onnxruntime")
    saturates = saturation.saturates_here()
    assert isinstance(saturates, bool)
    if saturation.eight_bit_instructions():
        assert not saturates


def test_sums_in_16_bits_are_told_from_exact_ones() -> None:
    _, inputs = saturation.largest_products()
    pairs = inputs.reshape(2, -1).astype(np.int64) * 127
    exact = pairs.sum(0)
    in_16_bits = np.minimum(exact, 2**15 - 1)
    scale = exact[0] / 200
    assert not saturation.saturated(np.round(exact / scale).astype(np.uint8))
    assert saturation.saturated(np.round(in_16_bits / scale).astype(np.uint8))
