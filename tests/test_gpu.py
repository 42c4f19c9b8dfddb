"""On a GPU: the same results as on the CPU, nothing of the caller's changed, honest precision."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.precision import float32_in
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.data import Data, TensorSplit
from onebyone.evaluation.scores import score
from onebyone.pipeline.loading import load_model, load_source
from onebyone.pipeline.shrink import shrink_loaded
from onebyone.pipeline.train import train_loaded
from onebyone.planning import Planner
from onebyone.profiling.bench import bench
from onebyone.runtimes import RUNTIMES, difference, outputs_of
from onebyone.training.cuda_graph import CapturedStep

GPU = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class _Network(nn.Module):
    """A strided stage with a residual sum, groups, dilation and bias; Flatten + Linear behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.wide = nn.Conv2d(24, 40, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.grouped = nn.Conv2d(40, 40, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.last = nn.Conv2d(40, 48, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((3, 2))
        self.linear = nn.Linear(48 * 6, 7)

    def forward(self, x):
        x = torch.relu(self.norm(self.wide(self.first(x))))
        x = torch.relu(x + self.grouped(x))
        return self.linear(self.pool(torch.relu(self.last(x))).flatten(1))


def network():
    """Settled batch norms, in evaluation mode."""
    net = _Network()
    with torch.no_grad():
        for _ in range(8):
            net(images(64))
    return net.eval()


def images(n, seed=0):
    return torch.randn(n, 3, 20, 16, generator=torch.Generator().manual_seed(seed))


def random_state():
    return torch.cuda.get_rng_state(GPU)


def labelled(n, seed):
    x = images(n, seed)
    return TensorSplit(x, network()(x).argmax(1).detach())


def drawn(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit(torch.randn(n, 3, 20, 20, generator=generator), torch.arange(n) % 7)


def data(part=labelled):
    parts = {"train": part(512, 1), "validation": part(128, 2), "test": part(256, 3)}
    return Data(name="drawn", classes=tuple("abcdefg"), **parts)


@pytest.fixture(autouse=True)
def _precision_stays():
    tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == tf32


def test_float32_is_full_float32_and_tf32_is_not():
    x = torch.randn(4, 64, 20, 16, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(64, 64, 3)
    exact = conv.double()(x.double()).detach()
    conv, x = conv.float().to(GPU), x.to(GPU)
    errors = {}
    for precision in ("float32", "tf32"):
        with float32_in(precision), torch.no_grad():
            errors[precision] = float((conv(x).cpu() - exact).abs().max())
            product = x.flatten(1)[:, :512] @ x.flatten(1)[:, :512].T
        assert torch.isfinite(product).all()
    assert errors["float32"] < 1e-5 < errors["tf32"]


@pytest.mark.parametrize("budget", ["macs=50%", "params=40%"])
def test_a_plan_and_what_it_gives_are_those_of_the_cpu(budget):
    net, calibration = network(), images(96)
    kept, state = copy.deepcopy(net.state_dict()), random_state()
    plans = {
        place: obo.plan(net, calibration, budget=budget, device=place) for place in ("cpu", GPU)
    }
    here, there = plans["cpu"], plans[GPU]
    assert [c.site for c in here.choices] == [c.site for c in there.choices]
    made = {place: obo.apply(net, here, calibration, device=place).eval() for place in ("cpu", GPU)}
    assert {p.device.type for p in made[GPU].parameters()} == {"cpu"}
    x = images(32, 5)
    with torch.no_grad():
        assert_close(made[GPU](x), made["cpu"](x), rtol=1e-2, atol=1e-3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, kept[name])
    assert torch.equal(random_state(), state)


@pytest.mark.parametrize("form", ["exact", "gap"])
def test_a_head_is_rewritten_on_a_gpu(form):
    net, calibration = network(), images(96)
    made = obo.plan(net, calibration, budget="params=90%", head=form, device=GPU)
    small = obo.apply(net, made, calibration, device=GPU)
    assert small(images(2)).shape == (2, 7)


def test_a_network_on_the_gpu_stays_there():
    net = network().to(GPU)
    made = obo.plan(net, images(64), budget="macs=60%", device=GPU)
    small = obo.apply(net, made, images(64), device=GPU)
    assert {p.device.type for p in small.parameters()} == {GPU}
    assert {p.device.type for p in net.parameters()} == {GPU}


def test_reconstruction_and_distillation_bring_a_network_nearer():
    net, examples = network(), data()
    made = obo.plan(net, images(96), budget="macs=40%", device=GPU)
    small = obo.apply(net, made, None, device=GPU).eval()  # from the kernels alone: far away
    state = random_state()
    near, log = obo.reconstruct(
        small, teacher=net, calibration=examples.train, steps=60, device=GPU
    )
    assert torch.equal(random_state(), state)
    assert log.after <= log.before
    trained, record = obo.distill(small, examples, teacher=net, epochs=6, device=GPU)
    assert record.device == GPU
    apart = score([net, small, near, trained], examples.test, device=GPU).divergences
    assert apart[2] < apart[1]
    assert apart[3] < apart[1]


class _Odd(nn.Module):
    """Reads a number back from the device, which no graph can hold."""

    def forward(self, x):
        return x if float(x.abs().max()) > 0 else -x


@pytest.mark.parametrize("odd", [False, True])
def test_captured_steps_train_as_steps_that_are_not(odd, monkeypatch):
    # The last batch of each epoch is of another size.
    examples, outputs, logs = labelled(400, 1), [], []
    held = []
    kept = CapturedStep._capture
    monkeypatch.setattr(
        CapturedStep,
        "_capture",
        lambda self, *batch: (kept(self, *batch), held.append(self._graph is not None)),
    )
    for capture in (True, False):
        net = network().train()
        net.first.append(nn.Dropout(0.0))
        if odd:
            net.first.append(_Odd())
        trained, log = obo.train(
            net, examples, epochs=4, batch_size=48, learning_rate=1e-3, precision="float32",
            capture=capture, device=GPU,
        )  # fmt: skip
        outputs.append(trained(images(16)).detach())
        logs.append([epoch.loss for epoch in log.epochs])
    assert held == ([] if odd else [True])  # what waits is not even tried
    assert logs[0] == pytest.approx(logs[1], rel=2e-2)
    assert difference([outputs[0]], [outputs[1]]).relative < 0.2  # sums come in any order


def test_dropout_is_drawn_anew_in_each_captured_step():
    net, examples = (
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(960, 7)),
        labelled(512, 1),
    )
    state = random_state()
    runs = [
        obo.train(net.train(), examples, epochs=3, batch_size=64, seed=seed, device=GPU)
        for seed in (0, 0, 1)
    ]
    first, again, other = ([epoch.loss for epoch in run.log.epochs] for run in runs)
    assert first == pytest.approx(again, rel=1e-4)
    assert first != pytest.approx(other, rel=1e-4)
    assert torch.equal(random_state(), state)


def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path):
    examples, losses = labelled(256, 1), []
    for interrupted in (False, True):
        path = tmp_path / f"{interrupted}.checkpoint"

        def go(progress=None, path=path):
            return obo.train(
                network(), examples, epochs=3, learning_rate=1e-3, precision="float32",
                checkpoint=path, progress=progress, device=GPU,
            )  # fmt: skip

        if interrupted:

            def stop(done, total, message):
                if done > total // 3 + 1:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                go(stop)
        losses.append([epoch.loss for epoch in go().log.epochs])
    assert len(losses[1]) == 3
    # Sums on a GPU come in any order, which a large rate or bf16 would amplify.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_scores_are_those_of_the_cpu():
    pair = [network(), network()]
    here, there = (score(pair, data().test, device=place) for place in ("cpu", GPU))
    assert here.each[0].scores.mean() == there.each[0].scores.mean() == 1


@pytest.mark.parametrize("name", [n for n, r in RUNTIMES.items() if "cuda" in r.devices])
def test_a_runtime_gives_the_outputs_of_its_precision(name):
    if not RUNTIMES[name].installed:
        pytest.skip(f"{name} is not installed")
    net, x = network(), images(4)
    run = RUNTIMES[name].prepare(net, x.to(GPU))
    limit = {"float32": 1e-4, "tf32": 2e-2, "bf16": 0.2}[RUNTIMES[name].precision]
    for _ in range(3):
        assert difference(outputs_of(net(x)), outputs_of(run())).relative < limit


def test_bench_measures_the_gpus_memory_and_names_it():
    record = bench(network(), input_shape=(8, 3, 20, 16), rounds=5, device=GPU)
    names = [entry.runtime for entry in record.entries]
    assert {"eager", "eager:tf32", "channels-last:bf16", "compile", "cuda-graph"} <= set(names)
    assert "packed" not in names
    assert record.machine.device.startswith(GPU)
    first = record.entries[0]
    weights = sum(p.nbytes for p in network().parameters())
    assert first.resident_bytes is not None
    assert weights <= first.resident_bytes < 50 * weights
    assert all(e.same for e in record.entries if ":" not in e.runtime)


@pytest.mark.parametrize("runtime", ["eager", "cuda-graph", "cuda-graph:bf16", "onnxruntime"])
def test_a_plan_for_latency_is_measured_where_the_runtime_runs(runtime):
    if not RUNTIMES[runtime].installed:
        pytest.skip(f"{runtime} is not installed")
    planner = Planner(network(), images(64), runtime=runtime, batch=8, device=GPU, cache=False)
    made = planner.plan(["params=100%"], fastest=True)
    where = "cpu" if runtime == "onnxruntime" else GPU
    assert planner._deployed.deployment.device == where
    if made.latency is not None:
        assert made.latency.before.device.startswith(where)


def test_a_run_on_a_gpu_from_training_to_report(tmp_path):
    examples = data(drawn)
    fresh = load_source("onebyone:classic", in_channels=3, num_classes=7, size=20)
    train_loaded(
        fresh.model, fresh.source, examples,
        TrainRunSettings(epochs=2, out=tmp_path / "whole", device=GPU),
    )  # fmt: skip
    whole = load_source(tmp_path / "whole")
    small = shrink_loaded(
        whole.model, whole.source, examples,
        ShrinkSettings(
            budget=["macs=50%", "memory=90%"], epochs=1, reconstruct=10, device=GPU,
            out=tmp_path / "small", runtimes=("eager", "onnxruntime"), calibration_examples=64,
        ),
    )  # fmt: skip
    record = small.record
    assert record.machine.device.startswith(GPU)
    latency = record.after.latency
    assert latency["eager"].device.startswith(GPU)
    assert latency["onnxruntime"].device == "cpu"
    assert {p.device.type for p in load_model(tmp_path / "small").parameters()} == {"cpu"}
    assert (tmp_path / "small" / "report.html").exists()
