"""The packed network is the same function, whatever the pass understood of it."""

import copy
import time
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from onebyone.core.precision import has_bf16
from onebyone.runtimes.output_check import difference, outputs_of
from onebyone.runtimes.packed import fuse as fusing
from onebyone.runtimes.packed import layer_calls
from onebyone.runtimes.packed.network import pack


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """Which kernels win is measured; a test says which, to be the same everywhere."""
    wins = getattr(request, "param", "packed")

    def fastest(ways):
        for function in ways.values():
            function()
        return wins if wins in ways else "packed"

    monkeypatch.setattr(fusing, "fastest", fastest)
    return wins


packed_or_rows = pytest.mark.parametrize("way", ["packed", "rows"], indirect=True)
every_way = pytest.mark.parametrize("way", ["packed", "rows", "plain"], indirect=True)
bf16_packs = has_bf16("cpu")


def randomize(net, seed=0):
    """Give batch norms statistics that folding must get right."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias, module.weight):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net.eval()


def both(net, x):
    packed, done = pack(net, x)
    with torch.inference_mode():
        return outputs_of(net(x)), outputs_of(packed(x)), done


def assert_same(net, x, *, packed=None):
    reference, outputs, done = both(net, x)
    assert difference(reference, outputs).relative < 2e-5
    assert all(t.std() > 0 for t in reference), "nothing to compare"
    if packed is not None:
        assert done.packed == packed
    return done


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1)},
    {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (3, 1), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
]
LEFT_AS_THEY_ARE = [
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 2, "padding": "same"},
]


@packed_or_rows
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_alone_is_packed_and_the_same(options, batch, way):
    torch.manual_seed(0)
    x = torch.randn(batch, 8, 13, 9)
    done = assert_same(nn.Conv2d(8, 12, **options).eval(), x, packed=1)
    assert done.rows == (way == "rows" and options == {"kernel_size": 1})


@packed_or_rows
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (13, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pointwise_convolution_of_maps_of_any_size_is_the_same(size, batch, dtype, way):
    """A map of one pixel or one row has strides that say two things."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.SiLU(), nn.Conv2d(12, 7, 1), nn.ReLU())
    net, x = net.eval(), torch.randn(batch, 8, *size)
    packed, done = pack(net.to(dtype), x.to(dtype))
    assert done.rows == (2 if way == "rows" and (dtype == torch.float32 or bf16_packs) else 0)
    with torch.inference_mode():
        outputs = packed(x.to(dtype))
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    allowed = 2e-5 if dtype == torch.float32 else 0.05
    assert difference(outputs_of(net.float()(x)), outputs_of(outputs)).relative < allowed


@pytest.mark.parametrize("options", LEFT_AS_THEY_ARE, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_convolution_that_onednn_has_not_runs_as_it_is(options):
    torch.manual_seed(0)
    assert_same(nn.Conv2d(8, 12, **options).eval(), torch.randn(2, 8, 13, 9), packed=0)


ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.4),
    nn.LeakyReLU(0.1),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Sigmoid(),
    nn.Hardsigmoid(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("layer", "way"),
    [("linear", "packed"), ("3×3", "packed"), ("1×1", "packed"), ("1×1", "rows")],
    indirect=["way"],
)
def test_an_activation_is_fused_and_the_same(activation, layer, way):
    torch.manual_seed(0)
    if layer == "linear":
        net, x = nn.Sequential(nn.Linear(8, 12), activation), torch.randn(3, 8)
    else:
        conv = nn.Conv2d(8, 12, int(layer[0]), bias=False)
        net, x = nn.Sequential(conv, nn.BatchNorm2d(12), activation), torch.randn(3, 8, 9, 7)
    done = assert_same(randomize(net), x, packed=1)
    assert done.activations == 1
    assert done.folded == (layer != "linear")
    assert done.rows == (way == "rows")


class Residual(nn.Module):
    """Two branches and their sum, in many spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.third, self.spelling = nn.Conv2d(6, 6, 1), spelling

    def forward(self, x):
        x = F.relu(self.first(x))
        return SPELLINGS[self.spelling](self, x, self.second(x))


def in_place(net, x, y):
    y += x
    return F.relu(y)


def in_place_of_the_other(net, x, y):
    x += y
    return F.relu(x)


def changed_between(net, x, y):
    z = F.relu_(x)
    x.mul_(3.0)
    return y + z


def changed_before_the_activation(net, x, y):
    z = net.third(x)
    x.mul_(3.0)
    return F.relu(z) + 2 * x


def read_by_a_view(net, x, y):
    flat = x.flatten(1)
    return F.relu(net.third(y) + x).flatten(1) - flat


SPELLINGS = {
    "operator": lambda net, x, y: F.relu(y + x),
    "bottleneck": lambda net, x, y: F.relu(net.third(y) + x),
    "in place": in_place,
    "in place of the other": in_place_of_the_other,
    "method": lambda net, x, y: y.add(x).relu(),
    "torch.add": lambda net, x, y: torch.add(x, y),
    "scaled": lambda net, x, y: torch.add(y, x, alpha=2.0),
    "used again": lambda net, x, y: F.relu(net.third(y) + x) * x,
    "used again by a layer": lambda net, x, y: net.third(F.relu(y + x)) + net.second(x),
    "two branches": lambda net, x, y: F.silu(net.third(x) + y),
    "read by a view": read_by_a_view,
    "changed between": changed_between,
    "changed before the activation": changed_before_the_activation,
    "broadcast": lambda net, x, y: y + x.mean((2, 3), keepdim=True),
    "broadcast over the other": lambda net, x, y: net.third(x.mean((2, 3), keepdim=True)) + y,
    "itself": lambda net, x, y: y + y,
    "number": lambda net, x, y: y + 1.5,
}
FUSED = {"operator", "bottleneck", "in place", "method", "torch.add", "two branches", "used again"}


@every_way
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_sum_of_branches_is_the_same_in_every_spelling(spelling, way):
    torch.manual_seed(0)
    net = Residual(spelling).eval()
    x = torch.randn(2, 6, 9, 7)
    done = assert_same(net, x)
    assert done.additions == 1 or spelling not in FUSED
    # Twice, for a step in place must not spoil what the next call starts from.
    packed, _ = pack(net, x)
    with torch.inference_mode():
        first, second = packed(x).clone(), packed(x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("way", ["packed", "plain"], indirect=True)
def test_a_sum_in_place_is_only_written_where_nothing_reads_the_branch_any_more(way, monkeypatch):
    monkeypatch.setattr(fusing, "SMALL_MACS", 0)  # the branch is a call, not a layer as it was
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 7)

    def targets(spelling):
        packed, _ = pack(Residual(spelling).eval(), x)
        return {node.target for node in packed.graph.nodes}

    in_place = set(layer_calls.IN_PLACE.values())
    assert targets("bottleneck") & in_place
    for spelling in ("used again", "read by a view"):
        assert not targets(spelling) & in_place, spelling


class Sum(nn.Module):
    def __init__(self, *, bias, relu):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1, bias=bias)
        self.after = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.after(self.second(x) + self.first(x))


@every_way
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (13, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"bias": True, "relu": True}, {"bias": False, "relu": False}])
def test_a_sum_of_pointwise_convolutions_is_the_same(size, batch, dtype, options, way):
    torch.manual_seed(0)
    net, x = Sum(**options).eval(), torch.randn(batch, 8, *size)
    packed, done = pack(net.to(dtype), x.to(dtype))
    assert done.additions == (dtype == torch.float32 or bf16_packs)
    with torch.inference_mode():
        outputs = packed(x.to(dtype))
    allowed = 2e-5 if dtype == torch.float32 else 0.05
    assert difference(outputs_of(net.float()(x)), outputs_of(outputs)).relative < allowed


@pytest.mark.parametrize("way", ["plain"], indirect=True)
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.GELU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_are_faster_unpacked_are_the_same(way, activation, bias, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 12, 1, bias=bias),
        activation,
        nn.Conv2d(12, 6, 3, stride=2, bias=bias),
        nn.Conv2d(6, 10, 1, stride=2, bias=bias),  # a stride is more than a product
        nn.Conv2d(10, 4, 1, groups=2, bias=bias),
        nn.Flatten(2),
        nn.Linear(6, 5, bias=bias),
        activation,
    )
    done = assert_same(net.eval(), torch.randn(2, 8, 13, 9), packed=0)
    assert done.products == 5  # the three that are no product are small
    monkeypatch.setattr(fusing, "SMALL_MACS", 0)
    done = assert_same(net.eval(), torch.randn(2, 8, 13, 9), packed=3)
    assert done.products == 2
    residual = Residual("bottleneck").eval()
    assert assert_same(residual, torch.randn(2, 6, 9, 7)).additions == 1


@pytest.mark.clock
def test_the_fastest_way_is_found(monkeypatch):
    monkeypatch.undo()

    def found(**milliseconds):
        return layer_calls.fastest(
            {way: partial(time.sleep, each / 1000) for way, each in milliseconds.items()}
        )

    assert found(packed=1, rows=5, plain=5) == "packed"
    assert found(packed=5, rows=1, plain=5) == "rows"
    assert found(packed=5, rows=5, plain=1) == "plain"
    assert found(packed=5, plain=1) == "plain"
    assert found(packed=1) == "packed"
    clock = iter(range(10**6))
    monkeypatch.setattr(layer_calls.time, "perf_counter_ns", lambda: next(clock))
    assert found(packed=0, rows=0, plain=0) == "packed"  # ties change nothing


class Branching(nn.Module):
    """Control flow on values, which cannot be traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.body(x)
        return self.head(x) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_is_packed_in_parts():
    torch.manual_seed(0)
    done = assert_same(randomize(Branching()), torch.randn(2, 3, 9, 7), packed=2)
    assert (done.folded, done.activations) == (1, 1)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.layer(x)) + self.layer(self.layer(x))


class ReadTwice(Shared):
    def forward(self, x):
        x = self.layer(x)
        return self.norm(x) * x


def test_a_layer_that_is_used_twice_is_folded_only_where_its_norm_is():
    torch.manual_seed(0)
    assert_same(randomize(Shared()), torch.randn(2, 6, 9, 7))
    assert assert_same(randomize(ReadTwice()), torch.randn(2, 6, 9, 7)).folded == 0


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(7, 5)

    def forward(self, x):
        return self.linear(input=self.conv(input=x))


def test_a_layer_that_is_called_by_name_runs_as_it_is():
    torch.manual_seed(0)
    assert_same(ByName().eval(), torch.randn(2, 3, 9, 7), packed=0)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Takes()

    def forward(self, x, flag=True):
        return self.layer(x, scale=2.0) if flag else x


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, scale=1.0):
        return self.conv(x) * scale


def test_defaults_and_arguments_of_forward_are_kept():
    torch.manual_seed(0)
    assert_same(TwoInputs().eval(), torch.randn(2, 3, 9, 7), packed=1)


def test_a_module_with_a_hook_keeps_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    assert_same(net, torch.randn(2, 3, 9, 7), packed=1)


def test_the_network_and_its_input_are_left_as_they_were():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 9, 7)
    state, before = copy.deepcopy(net.state_dict()), x.clone()
    pack(net, x.clone())
    assert net.training
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:resnet18", 64),
        ("torchvision:mobilenet_v2", 64),
        ("torchvision:squeezenet1_1", 64),
        ("torchvision:shufflenet_v2_x0_5", 64),
        ("torchvision:densenet121", 64),
        ("torchvision:googlenet", 64),
        ("timm:efficientnet_lite0", 64),
        ("timm:tf_efficientnet_b0", 64),  # padding that depends on the size
        ("timm:regnety_002", 64),
        ("timm:resnet26d", 64),
        ("timm:convnext_atto", 64),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_real_networks_stay_the_same(name, size):
    torch.manual_seed(0)
    library, _, short = name.partition(":")
    options = {"weights": None} if library == "torchvision" else {}
    if short == "googlenet":
        options["init_weights"] = False
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    net = randomize(make(short, **options))
    # Only as far as that nothing overflows: random statistics in fifty layers do.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
    x = torch.randn(2, 3, size, size)
    reference, outputs, done = both(net, x)
    assert difference(reference, outputs).relative < 1e-3
    assert done.packed > 10
