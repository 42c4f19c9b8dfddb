import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from onebyone.networks.dataflow import find_neighbours


class _Forward(nn.Module):
    """A network of named layers whose forward is a function."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _conv(channels=3, out=4):
    return nn.Conv2d(channels, out, 1)


def _neighbours(function, **layers):
    return find_neighbours(_Forward(function, **layers), torch.randn(2, 3, 5, 7))


def test_a_chain_names_each_neighbour_on_both_sides():
    chain = nn.Sequential(_conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), _conv(4, 2))
    found = find_neighbours(chain, torch.randn(2, 3, 5, 7))
    assert [found.only_consumer(name).name for name in "0123"] == ["1", "2", "3", None]
    assert [found.only_producer(name).name for name in "0123"] == [None, "0", "1", "2"]
    assert "an output of the network" in found.only_consumer("3").reason
    assert "an input of the network" in found.only_producer("0").reason


def test_modules_that_do_nothing_are_transparent():
    chain = nn.Sequential(_conv(), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    found = find_neighbours(chain.train(), torch.randn(2, 3, 5, 7))
    assert found.only_consumer("0").name == "3"
    assert chain.training


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda n, x: n.b(F.relu(n.a(x))), "`relu` in the network"),
        (lambda n, x: n.b(F.relu_(n.a(x))), "`relu_` in the network"),
        (lambda n, x: n.b(y := n.a(x)) + y, "read more than once, by 'b' and `add`"),
        (lambda n, x: (n.b(y := n.a(x)), y), "an output of the network"),
        (lambda n, x: n.b(n.a(n.a(x)[:, :3])), "it runs 2 times"),
        (lambda n, x: n.b(n.a(x).transpose(2, 3)), "`transpose` in the network"),
        (lambda n, x: x, "it does not run"),
        (lambda n, x: (n.a(x), x)[1], "nothing reads"),
    ],
)
def test_what_is_not_one_layer_is_told_in_words(function, reason):
    found = _neighbours(function, a=_conv(), b=_conv(4, 4)).only_consumer("a")
    assert found.name is None
    assert reason in found.reason


def test_a_write_through_a_view_is_seen():
    def function(network, x):
        y = network.a(x)
        y[:, :2].mul_(2)
        return network.b(y)

    found = _neighbours(function, a=_conv(), b=_conv(4, 4))
    assert found.only_consumer("a").name is None
    assert found.only_producer("b").name is None
    assert "mul_" in found.only_producer("b").reason


def test_the_same_tensor_under_another_object_is_the_same_tensor():
    found = _neighbours(
        lambda n, x: n.b((y := n.a(x)).detach().view(y.shape)), a=_conv(), b=_conv(4, 4)
    )
    assert found.only_consumer("a").name == "b"


def test_memory_that_is_used_again_is_another_tensor():
    def function(network, x):
        for _ in range(20):  # freed at once, so that addresses come back
            network.a(x)
            x = x + 1
        return network.b(network.c(x))

    found = _neighbours(function, a=_conv(), c=_conv(), b=_conv(4, 4))
    assert found.only_consumer("c").name == "b"


def test_an_inplace_activation_feeds_what_reads_its_memory():
    def function(network, x):
        y = network.a(x)
        network.act(y)
        return network.b(y)

    found = _neighbours(function, a=_conv(), act=nn.ReLU(inplace=True), b=_conv(4, 4))
    assert found.only_consumer("a").name == "act"
    assert found.only_producer("b").name == "act"


def test_functional_activations_can_be_told_by_name():
    found = _neighbours(lambda n, x: n.b(F.gelu(n.a(x))), a=_conv(), b=_conv(4, 4))
    (reading,) = found.output_of("a").readings
    assert (reading.operation, reading.module, reading.given) == ("gelu", "", False)


def test_weights_read_by_another_modules_forward_are_named():
    found = _neighbours(
        lambda n, x: F.conv2d(n.b(x), n.a.weight), a=_conv(4, 4), b=_conv(), c=nn.BatchNorm2d(4)
    )
    assert found.read_elsewhere == {"a": ""}
    attention = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    torch.nn.init.normal_(attention[0].self_attn.out_proj.weight)
    with torch.no_grad():
        found = find_neighbours(attention, torch.randn(2, 5, 16))
    assert "0.self_attn.out_proj" in found.read_elsewhere


def test_parametrized_and_shared_weights_are_not_read_elsewhere():
    first, second = _conv(), _conv()
    second.weight = first.weight
    normed = nn.utils.parametrizations.weight_norm(_conv(4, 4))
    found = _neighbours(lambda n, x: n.c(n.a(x) + n.b(x)), a=first, b=second, c=normed)
    assert not found.read_elsewhere


def test_a_norm_with_an_activation_inside_is_one_layer():
    network = timm.create_model("mobilenetv3_small_050")
    found = find_neighbours(network, torch.randn(1, 3, 64, 64))
    assert found.only_consumer("conv_stem").name == "bn1"
    assert found.only_consumer("blocks.1.0.bn1").name == "blocks.1.0.conv_dw"
    assert found.only_producer("blocks.1.0.conv_pw").name == "blocks.0.0.bn2"


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "inception_v3", "shufflenet_v2_x0_5"])
def test_both_sides_agree_on_real_networks(name):
    network = (
        torchvision.models.get_model(name, weights=None, init_weights=False)
        if (name == "inception_v3")
        else torchvision.models.get_model(name, weights=None)
    )
    before = {key: value.clone() for key, value in network.state_dict().items()}
    side = 80 if name == "inception_v3" else 33
    found = find_neighbours(network, torch.randn(1, 3, side, side + 2))
    pairs = 0
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for module_name, module in network.named_modules():
        consumer = found.only_consumer(module_name)
        if consumer.name is None:
            assert consumer.reason
        elif isinstance(module, nn.Conv2d):
            assert found.only_producer(consumer.name).name == module_name
            pairs += 1
    assert pairs > 15
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_scripted_modules_belong_to_what_runs_them():
    scripted = torch.jit.script(nn.Sequential(_conv(3, 4), nn.ReLU()))
    network = nn.Sequential(scripted, _conv(4, 4), nn.BatchNorm2d(4))
    found = find_neighbours(network, torch.randn(2, 3, 5, 7))
    assert found.only_consumer("0").reason == "it does not run"
    assert found.only_producer("1").name is None
    assert found.only_consumer("1").name == "2"
    assert found.read_elsewhere == {"0.0": ""}
