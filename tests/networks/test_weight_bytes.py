import pytest
import torch
from safetensors.torch import save
from torch import nn

from onebyone.networks.weight_bytes import weight_bytes


def in_file(module):
    """Return the bytes of the tensors in a file of all that is saved."""
    data = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_those_of_the_file_without_its_header(dtype):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 2, bias=False)).to(
        dtype
    )
    assert weight_bytes(net) == in_file(net)


def test_shared_weights_count_once_and_buffers_that_are_not_saved_not_at_all():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert weight_bytes(net) == 4 * (16 + 4)


def test_floats_of_another_precision_are_counted_as_they_are_deployed():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    assert weight_bytes(net, float_bytes=2) == weight_bytes(net.to(torch.bfloat16))
    assert weight_bytes(net, float_bytes=2) == 2 * (5 * 27 + 5 + 4 * 5) + 8
