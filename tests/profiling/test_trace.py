import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onebyone.core.errors import ModelError
from onebyone.profiling.trace import describe, time_layers, trace_layers


def torch_flops(network, inputs):
    network.eval()
    # Not every version of torch counts every fused attention: as products they all do.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as flops, torch.no_grad(), plain:
        network(inputs)
    return flops.get_total_flops()


def build(name):
    torch.manual_seed(0)
    if name in {"resnet18", "squeezenet1_1"}:
        return getattr(torchvision.models, name)(num_classes=10)
    return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "squeezenet1_1", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_lite0", "mobilenetv3_small_050"],
)  # fmt: skip
def test_twice_our_macs_are_the_flops_that_torch_counts(name):
    network = build(name)
    x = torch.randn(1, 3, 224 if "vit" in name else 64, 224 if "vit" in name else 64)
    traced = trace_layers(network, x)
    assert 2 * traced.macs == torch_flops(network, x)
    assert traced.params == sum(p.numel() for p in network.parameters())
    assert sum(layer.macs for layer in traced.layers) == traced.macs
    assert not traced.uncounted


class Mixed(nn.Module):
    """Products by module, by function and by operator, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.matrix = nn.Parameter(torch.randn(6, 5))
        self.unused = nn.Linear(10, 10)

    def forward(self, x):
        x = self.twice(self.twice(self.conv(x)))
        x = F.conv2d(x, self.kernel, stride=2)
        tokens = x.flatten(2).transpose(1, 2)
        return F.linear(tokens @ (tokens.transpose(1, 2) @ tokens), self.matrix)


def test_functional_products_are_counted_where_they_happen_and_shared_layers_each_time():
    network, x = Mixed(), torch.randn(1, 3, 8, 8)
    traced = trace_layers(network, x)
    layers = {layer.name: layer for layer in traced.layers}
    assert 2 * traced.macs == torch_flops(network, x)
    assert traced.params == sum(p.numel() for p in network.parameters())
    assert layers["twice"].calls == 2
    assert layers["twice"].params == 20
    assert layers["twice"].macs == 2 * 16 * 64
    assert layers["unused"].calls == layers["unused"].macs == 0
    # The root owns the functional products: 3×3 to 3×3 places, two bmm, one linear map.
    assert layers[""].macs == 9 * 180 + 2 * 9 * 25 + 9 * 30


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_counts_are_for_one_input_whatever_the_batch(batch):
    one = trace_layers(Mixed(), torch.randn(1, 3, 8, 8))
    assert trace_layers(Mixed(), torch.randn(batch, 3, 8, 8)) == one


def test_parameters_that_layers_share_are_counted_once():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    traced = trace_layers(network, torch.randn(1, 4))
    assert traced.params == 16 + 8
    assert traced.macs == 32


def test_the_layers_come_in_the_order_of_execution_with_their_shapes():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(5, 2)
            self.first = nn.Linear(3, 5)

        def forward(self, x):
            return self.second(self.first(x))

    layers = trace_layers(Backwards(), torch.randn(2, 7, 3)).layers
    assert [layer.name for layer in layers] == ["first", "second"]
    assert (layers[0].input_shape, layers[0].output_shape) == ((7, 3), (7, 5))
    assert layers[0].macs == 7 * 15


def test_inputs_may_be_several_or_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a, b):
            return self.fc(a) + self.fc(b)

    a, b = torch.randn(1, 3), torch.randn(1, 3)
    assert trace_layers(Two(), (a, b)).macs == trace_layers(Two(), {"a": a, "b": b}).macs == 12


def test_attention_of_torch_is_counted_on_its_plain_path():
    network = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(1, 5, 8)
    projections, attention, feedforward = 5 * 8 * 32, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    assert trace_layers(network, x).macs == projections + attention + feedforward
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_multiplies_and_has_no_rule_is_named():
    traced = trace_layers(nn.LSTM(4, 4), torch.randn(3, 2, 4))
    assert traced.uncounted or traced.macs


def test_a_network_that_fails_says_for_which_shape():
    with pytest.raises(
        ModelError, match=r"Sequential must run on an input of shape 1×4, but it failed: "
    ):
        trace_layers(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 4))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_must_be_initialized():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy = nn.LazyLinear(3)

        def forward(self, x):
            return x

    network = Unused()
    with pytest.raises(ModelError, match=r"'lazy' is a lazy LazyLinear. Run the network once"):
        trace_layers(network, torch.randn(1, 3))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(3, 4, 3), "Conv2d 3×3"),
        (nn.Conv2d(4, 4, (3, 1), stride=2, groups=2), "Conv2d 3×1 /2 g2"),
        (nn.Conv2d(4, 4, 3, stride=(2, 1), dilation=2), "Conv2d 3×3 /2×1 d2"),
        (nn.Linear(3, 4), "Linear"),
        (nn.MaxPool2d(3), "MaxPool2d"),
    ],
)
def test_a_layer_is_described_in_a_few_words(layer, words):
    assert describe(layer) == words


@pytest.mark.rounds
def test_each_layer_that_runs_is_timed_without_the_layers_inside_it():
    network, x = Mixed(), torch.randn(2, 3, 8, 8)
    layers = trace_layers(network, x).layers
    timings = time_layers(network, x, layers, seconds=0.0)
    assert set(timings) == {layer.name for layer in layers if layer.calls}
    for timing in timings.values():
        assert 0 <= timing.q1_ms <= timing.median_ms <= timing.q3_ms
        assert (timing.repeats, timing.batch) == (5, 2)


def test_time_in_a_layer_is_not_counted_again_in_the_one_around_it():
    from onebyone.profiling import trace

    now = iter(range(0, 10**9, 1_000_000))
    clock = trace._ExclusiveClock(lambda: None, lambda: next(now))
    outer, inner, leave = clock.entering("outer"), clock.entering("inner"), clock.leaving()
    # Each look at the clock is a millisecond after the last: outer from 0 to 5, inner 1–2 and 3–4.
    for step in (outer, inner):
        step(None, ())
    leave(None, (), None)
    inner(None, ())
    leave(None, (), None)
    leave(None, (), None)
    assert clock.ms == {"inner": 2.0, "outer": 3.0}


def test_a_list_of_pictures_is_a_batch_of_them():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pictures):
            return [self.conv(picture[None]) for picture in pictures]

    pictures = [torch.randn(3, 6, 7), torch.randn(3, 6, 7)]
    traced = trace_layers(Detector(), (pictures,))
    assert traced.macs == 3 * 9 * 4 * 4 * 5
    named = trace_layers(Detector(), {"pictures": pictures})
    assert named.macs == traced.macs


# ---------------------------------------------------------------- nothing falls through


def of(function, **parameters):
    """Return a network with these parameters that computes a function of its input and them."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            for name, shape in parameters.items():
                setattr(self, name, nn.Parameter(torch.randn(*shape)))

        def forward(self, x):
            return function(x, *(getattr(self, name) for name in parameters))

    return Functional()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.transpose(-1, -2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


MAP, TOKENS = (2, 4, 6, 6), (2, 5, 8)
COUNTED = {
    "einsum": (TOKENS, of(lambda x, w: torch.einsum("btc,co->bto", x, w), w=(8, 3)), 5 * 8 * 3),
    "bmm": (TOKENS, of(lambda x: torch.bmm(x, x.transpose(1, 2))), 5 * 5 * 8),
    "baddbmm": (TOKENS, of(lambda x: torch.baddbmm(x[:, :, :5], x, x.transpose(1, 2))), 5 * 5 * 8),
    "in place": (TOKENS, of(lambda x: torch.zeros(2, 5, 5).baddbmm_(x, x.transpose(1, 2))), 200),
    "addmm in place": ((2, 8), of(lambda x, w: torch.zeros(2, 3).addmm_(x, w), w=(8, 3)), 8 * 3),
    "out of place": ((2, 8), of(lambda x, w: torch.mm(x, w.detach(), out=torch.empty(2, 3)), w=(8, 3)), 8 * 3),
    "matmul": (TOKENS, of(lambda x, w: x @ w, w=(8, 3)), 5 * 8 * 3),
    "matrix and vector": (TOKENS, of(lambda x, w: x @ w, w=(8,)), 5 * 8),
    "outer product": ((2, 8), of(lambda x: torch.addr(torch.zeros(8, 8), x[0], x[1])), 8 * 8 // 2),
    "attention": ((2, 1, 5, 8), of(lambda x: F.scaled_dot_product_attention(x, x, x)), 2 * 5 * 5 * 8),
    "conv1d": (TOKENS, of(F.conv1d, w=(3, 5, 2)), 7 * 3 * 5 * 2),
    "conv3d": ((2, 2, 3, 4, 5), of(F.conv3d, w=(3, 2, 1, 1, 1)), 60 * 6),
    "grouped": (MAP, of(lambda x, w: F.conv2d(x, w, groups=2), w=(6, 2, 3, 3)), 16 * 6 * 2 * 9),
    "transposed": (MAP, of(lambda x, w: F.conv_transpose2d(x, w, stride=2), w=(4, 3, 2, 2)), 36 * 48),
    "deformable": (MAP, torchvision.ops.DeformConv2d(4, 5, 3), None),
    "autograd function": (TOKENS, of(Squared.apply), 5 * 5 * 8),
    "recurrent": (TOKENS, nn.LSTM(8, 3, batch_first=True), 5 * 12 * (8 + 3)),
    "gated": (TOKENS, nn.GRU(8, 3, batch_first=True), 5 * 9 * (8 + 3)),
    "plain recurrent": (TOKENS, nn.RNN(8, 3, batch_first=True), 5 * 3 * (8 + 3)),
    "bidirectional": (TOKENS, nn.LSTM(8, 3, bidirectional=True, batch_first=True), 2 * 5 * 12 * 11),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_whatever_form_a_product_is_called_in_it_is_counted(name):
    shape, network, macs = COUNTED[name]
    x = torch.randn(*shape)
    if name == "deformable":
        network = of(
            lambda x, w: torchvision.ops.deform_conv2d(x, torch.zeros(len(x), 18, 4, 4), w),
            w=(5, 4, 3, 3),
        )
        macs = 16 * 5 * 4 * 9
    for inference in (False, True):
        with torch.inference_mode(inference):
            traced = trace_layers(network, x)
        assert traced.macs == macs
        assert not traced.uncounted


def test_functions_of_torchs_counter_are_counted_as_there():
    for name in ("einsum", "bmm", "matmul", "conv1d", "conv3d", "grouped", "transposed"):
        shape, network, _ = COUNTED[name]
        x = torch.randn(*shape)
        assert 2 * trace_layers(network, x).macs * len(x) == torch_flops(network, x)


@torch.library.custom_op("onebyone_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


NAMED = {
    "aten._fft_r2c": lambda x: torch.fft.rfft(x).abs(),
    "aten.grid_sampler_2d": lambda x: F.grid_sample(x, torch.zeros(len(x), 3, 3, 2), align_corners=False),
    "aten._cdist_forward": lambda x: torch.cdist(x, x),
    "aten.linalg_inv_ex": lambda x: torch.linalg.inv(x + 9 * torch.eye(6)),
    "aten._trilinear": lambda x: F.bilinear(x, x, torch.ones(2, 6, 6)),
    "torchvision.roi_align": lambda x: torchvision.ops.roi_align(x, [torch.tensor([[0.0, 0, 3, 3]])] * len(x), 2),
    "onebyone_test.doubled": doubled,
}  # fmt: skip


@pytest.mark.parametrize("operation", NAMED)
def test_what_is_not_known_is_named(operation):
    traced = trace_layers(of(NAMED[operation]), torch.rand(*MAP))
    assert operation in traced.uncounted


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_layer_is_named():
    class Quantized(nn.Module):
        def forward(self, x):
            x = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
            return torch.ops.quantized.add_relu(x, x, 0.1, 0).dequantize()

    assert any(
        name.startswith("quantized.")
        for name in trace_layers(Quantized(), torch.rand(1, 3)).uncounted
    )


def test_what_only_moves_or_compares_numbers_is_no_product():
    def everything(x):
        x = F.pad(F.max_pool2d(x, 2), (1, 1, 1, 1)).roll(1, 2).flip(3)
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = F.softmax(F.layer_norm(x, x.shape[1:]), 1).cumsum(1).clamp_(0, 1)
        x = torch.where(x > 0.5, F.hardswish(x), F.prelu(x, torch.ones(1)))
        x[:, :1] = x.sort(1).values[:, :1]
        x = torch.cat([x, x.gather(1, x.argmax(1, keepdim=True))], 1).masked_fill(x.mean() > 3, 0)
        return x.topk(2, 1).values.std(0) + F.one_hot(torch.tensor(1), 4).sum()

    traced = trace_layers(of(everything), torch.rand(*MAP))
    assert traced.macs == 0
    assert not traced.uncounted


def test_the_ranges_that_data_parallel_names_for_profilers_are_no_products():
    found = trace_layers(nn.DataParallel(nn.Linear(3, 2)), torch.randn(4, 3))
    assert not found.uncounted
    assert found.cost.macs == 6
