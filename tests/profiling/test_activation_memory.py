"""The law: alive from the operation that writes a tensor to the last that reads it, no longer."""

import pytest
import torch
import torchvision
from torch import nn

from onebyone.core.errors import ModelError
from onebyone.profiling.activation_memory import peak_activation_bytes


def chain_peak(network, x):
    """Return the largest sum of a step's input and output, by running the steps one by one."""
    peak = 0
    for step in network:
        y = step(x)
        shared = y.data_ptr() == x.data_ptr()
        peak = max(peak, x.nbytes + (0 if shared else y.nbytes))
        x = y
    return peak


def chain(*, inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 11, (3, 2), padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(11, 4, 1, stride=(2, 1)),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 5, 7),
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plain_chain_holds_the_largest_input_and_output_of_a_step(inplace, dtype):
    network, x = chain(inplace=inplace).to(dtype), torch.randn(2, 3, 11, 9, dtype=dtype)
    with torch.no_grad():
        assert peak_activation_bytes(network, x) == chain_peak(network, x)


def test_in_place_activations_need_less():
    # Two channels in and one out, so that the ReLU is the largest step.
    def network(*, inplace):
        return nn.Sequential(nn.Conv2d(2, 9, 1), nn.ReLU(inplace=inplace), nn.Conv2d(9, 1, 1))

    x = torch.randn(1, 2, 5, 7)
    image = 5 * 7 * 4
    assert peak_activation_bytes(network(inplace=False), x) == (9 + 9) * image
    assert peak_activation_bytes(network(inplace=True), x) == (2 + 9) * image


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 3, 1))

    def forward(self, x):
        return x + self.body(x)


def test_a_skipped_connection_is_held_until_it_is_added():
    x = torch.randn(1, 3, 5, 7)
    assert peak_activation_bytes(Residual(), x) == (3 + 5 + 6) * 5 * 7 * 4


def test_what_python_still_names_but_nobody_reads_is_not_alive():
    class Hoarder(nn.Sequential):
        def forward(self, x):
            kept = [x]
            for step in self:
                kept.append(step(kept[-1]))
            return kept[-1]

    x = torch.randn(2, 3, 11, 9)
    assert peak_activation_bytes(Hoarder(*chain()), x) == peak_activation_bytes(chain(), x)


def test_the_batch_multiplies_and_a_slice_counts_alone():
    x = torch.randn(6, 3, 11, 9)
    one = peak_activation_bytes(chain(), x[:1])
    assert peak_activation_bytes(chain(), x) == 6 * one


def test_a_real_network_needs_more_than_its_largest_tensor_and_less_than_all():
    network = torchvision.models.resnet18(num_classes=10).eval()
    sizes = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, a, out: sizes.append(out.nbytes))
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        network(x)
    peak = peak_activation_bytes(network, x)
    assert max(sizes) < peak < sum(sizes)
    # The stem: its convolution and the batch norm's copy of it; no later step is as large.
    assert peak == 2 * max(sizes)


def test_weights_are_not_counted_and_the_network_stays_as_it_was():
    network = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 2))
    network.train()
    assert peak_activation_bytes(network, torch.randn(1, 3)) == 4 * (3 + 1000)
    assert network.training


def test_an_output_is_held_to_the_end():
    class TwoOutputs(nn.Module):
        def forward(self, x):
            first = x.repeat(1, 50)
            summed = first.sum(dim=1, keepdim=True)
            return first, summed.repeat(1, 100)

    x = torch.randn(4, 1)
    assert peak_activation_bytes(TwoOutputs(), x) == 4 * 4 * (50 + 1 + 100)


def test_a_wrong_input_is_refused():
    with pytest.raises(ModelError, match="must run on an input of shape 1×4×5×7"):
        peak_activation_bytes(chain(), torch.randn(1, 4, 5, 7))
