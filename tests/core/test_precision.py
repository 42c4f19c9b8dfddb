"""Precision is set inside and put back after; bf16 is asked for, refused, or left to the device."""

import pytest
import torch

from onebyone.core import precision
from onebyone.core.errors import OptionError
from onebyone.core.precision import float32_in, has_bf16, uses_bf16


def settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def restored():
    kinds = [torch.backends.cuda.matmul, torch.backends.cudnn]
    kinds += [getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")]
    before, kept = settings(), [getattr(kind, "fp32_precision", None) for kind in kinds]
    yield
    for kind, value in zip(kinds, kept, strict=True):
        if value is not None:
            kind.fp32_precision = value
    torch.backends.cudnn.allow_tf32, products = before
    torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_what_torch_was_set_to_is_put_back_also_after_an_error(restored, products, convolutions):
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    for name, inside in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        with float32_in(name):
            assert settings() == inside
        assert settings() == (convolutions, products)
        with pytest.raises(KeyError), float32_in(name):
            raise KeyError
        assert settings() == (convolutions, products)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch 2.9")
def test_kinds_of_operations_that_were_set_apart_are_put_back_apart(restored):
    convolutions, recurrent = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    convolutions.fp32_precision, recurrent.fp32_precision = "ieee", "tf32"
    with float32_in("tf32"):
        assert convolutions.fp32_precision == recurrent.fp32_precision == "tf32"
    with float32_in("float32"):
        assert convolutions.fp32_precision == recurrent.fp32_precision == "ieee"
    assert (convolutions.fp32_precision, recurrent.fp32_precision) == ("ieee", "tf32")


def test_bf16_is_left_to_the_device_unless_it_is_asked_for(monkeypatch):
    cpu = torch.device("cpu")
    for has in (False, True):
        monkeypatch.setattr(precision, "has_bf16", lambda device, has=has: has)
        assert uses_bf16("auto", cpu) is has
        assert uses_bf16("bf16", cpu)
        assert not uses_bf16("float32", cpu)
    with pytest.raises(OptionError, match="must be one of auto, float32, bf16, got 'int8'"):
        uses_bf16("int8", cpu)


def test_a_device_that_is_neither_has_no_bf16():
    assert not has_bf16("meta")
