import copy
import gc
import importlib.util
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from onebyone import runtimes
from onebyone.core.errors import MissingExtraError, ModelError, OptionError, UnknownNameError
from onebyone.core.records import Machine
from onebyone.profiling.latency import threads
from onebyone.runtimes import (
    RUNTIMES,
    Runtime,
    describe_machine,
    difference,
    eager,
    find_runtime,
    outputs_of,
)
from onebyone.runtimes.output_check import SAME_OUTPUTS


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9))


@pytest.mark.parametrize("name", ["eager", "channels-last", "packed"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8)])
def test_a_runtime_gives_what_the_network_gives_in_evaluation_mode(name, shape):
    net, x = network(), torch.randn(2, 3, 8, 8)
    if len(shape) == 3:
        net, x = nn.Linear(8, 4), torch.randn(3, 8, 8)
    forward = find_runtime(name).prepare(net, x)
    output = forward()
    assert_close(output.clone(), net.eval()(x).detach())
    assert output.is_inference()


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


CPU = [
    "eager",
    "channels-last",
    "packed",
    pytest.param("compile", marks=pytest.mark.slow),
    pytest.param("onnxruntime", marks=installed("onnxruntime")),
    pytest.param("openvino", marks=installed("openvino")),
    pytest.param("executorch", marks=[installed("executorch"), pytest.mark.slow]),
]


# What torch and ExecuTorch note for themselves when they are first used.
NOTES = ("TORCHINDUCTOR", "OPENVINO_LIB_PATH")


def global_state():
    import torch._inductor.config as inductor

    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        inductor.freezing,
        torch._dynamo.config.recompile_limit,
        tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None,
        {k: v for k, v in os.environ.items() if not any(note in k for note in NOTES)},
    )


def small(name="squeezenet1_1"):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, num_classes=7).eval()


@pytest.mark.parametrize("name", CPU)
def test_a_runtime_gives_what_eager_gives_and_leaves_no_trace(name):
    net, x = small(), torch.randn(2, 3, 40, 48)
    state, before = {k: v.clone() for k, v in net.state_dict().items()}, global_state()
    prepared = find_runtime(name).prepare(net, x)
    outputs = outputs_of(prepared())
    # What the garbage of the preparation held is gone: its buffers must be the runtime's own.
    gc.collect()
    torch.randn(500_000)
    again = outputs_of(prepared())
    assert global_state() == before
    assert [t.dtype for t in outputs] == [torch.float32]
    assert difference(outputs_of(net(x)), outputs).relative < SAME_OUTPUTS
    assert_close(again, outputs)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not any(p.grad is not None or not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_the_number_of_threads_is_torchs(name):
    pytest.importorskip(name)
    with threads(2):
        prepared = find_runtime(name).prepare(nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 8, 8))
    values = [v for key, v in prepared.options.items() if "threads" in key.lower()]
    assert values == ["2"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_networks_of_different_numbers_of_threads_run_in_turns(name):
    pytest.importorskip(name)
    net, x = nn.Conv2d(3, 40, 3).eval(), torch.randn(1, 3, 48, 56)
    prepared = []
    for count in (1, 2):
        with threads(count):
            prepared.append(find_runtime(name).prepare(net, x))
    for run in [*prepared, *reversed(prepared), *prepared]:
        assert_close(outputs_of(run()), outputs_of(net(x)), rtol=1e-4, atol=1e-5)


SIGNALLED = """
import faulthandler, signal, subprocess, torch
from torch import nn
from onebyone.runtimes import find_runtime
faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: None)
net, x = nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8)
first, second = (find_runtime("openvino").prepare(net, x) for _ in range(2))
del first
del second
subprocess.run(["true"], check=True)
"""


def test_a_signal_after_networks_in_openvino_were_freed_ends_nothing():
    pytest.importorskip("openvino")
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_threads_of_an_onnx_session_do_not_spin_on_into_the_next_contenders_call():
    pytest.importorskip("onnxruntime")
    network, x = nn.Conv2d(64, 64, 3).eval(), torch.randn(1, 64, 56, 56)
    with threads(2):
        prepared = find_runtime("onnxruntime").prepare(network, x)
    after = []
    for _ in range(5):
        prepared()
        before = time.process_time()
        time.sleep(0.1)
        after.append(time.process_time() - before)
    assert min(after) < 0.01  # left to themselves they spin for four times as long


@pytest.mark.slow
def test_many_networks_of_one_class_are_all_compiled():
    # Dynamo gives up on a code object after eight, and runs eager without a word.
    counters = torch._dynamo.utils.counters
    counters.clear()
    for channels in range(2, 12):
        net, x = (
            nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU()).eval(),
            torch.randn(1, channels, 4, 4),
        )
        outputs = find_runtime("compile").prepare(net, x)()
        assert_close(outputs, net(x).detach())
    assert counters["stats"]["unique_graphs"] == 10
    assert not counters["unimplemented"]


def test_beside_a_gpu_a_runtime_that_knows_none_runs_on_the_cpu():
    assert RUNTIMES["onnxruntime"].device_for("cuda") == "cpu"
    assert RUNTIMES["onnxruntime"].device_for("cpu") == "cpu"
    assert RUNTIMES["eager"].device_for("cuda:1") == "cuda:1"
    assert RUNTIMES["eager"].device_for("cpu") == "cpu"
    assert RUNTIMES["cuda-graph"].device_for("cpu") == "cpu"  # which it then refuses


def test_what_runs_on_a_gpu_alone_says_so():
    for name in ("cuda-graph", "tensorrt", "tensorrt:bf16", "eager:tf32", "compile:tf32"):
        with pytest.raises(OptionError, match="needs an input on a cuda device"):
            RUNTIMES[name].prepare(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["eager", "channels-last", "compile", "cuda-graph", "eager:bf16", "tensorrt"]
)
def test_a_runtime_on_a_gpu_gives_what_eager_gives(name):
    if not RUNTIMES[name].installed:
        pytest.skip(f"{name} is not installed")
    net, x = small(), torch.randn(2, 3, 64, 64)
    outputs = outputs_of(find_runtime(name).prepare(net, x.cuda())())
    # TensorFloat-32 and bf16 round more than float32.
    assert difference(outputs_of(net(x)), outputs).relative < 0.1


def test_bf16_is_refused_where_it_would_be_float32_or_worse(monkeypatch):
    net, x = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4)
    monkeypatch.setattr(eager, "has_bf16", lambda device: False)
    with pytest.raises(OptionError, match="'packed:bf16' needs a processor with bf16 kernels"):
        find_runtime("packed:bf16").prepare(net, x)
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *args: ["FP32"])
    with pytest.raises(OptionError, match="'openvino:bf16' needs a processor with bf16 kernels"):
        find_runtime("openvino:bf16").prepare(net, x)


def test_bf16_is_rounder_than_float32_and_near_it():
    net, x = small(), torch.randn(1, 3, 40, 48)
    gap = difference(outputs_of(net(x)), outputs_of(find_runtime("eager:bf16").prepare(net, x)()))
    assert SAME_OUTPUTS < gap.relative < 0.5
    assert find_runtime("eager:bf16").precision == "bf16"
    assert find_runtime("eager").precision == "float32"


def test_a_pass_that_went_wrong_is_noticed_and_the_plain_network_runs(monkeypatch):
    net, x = small(), torch.randn(1, 3, 40, 48)

    def wrong(model, example):
        return nn.Sequential(copy.deepcopy(model), nn.Hardtanh(-0.01, 0.01)), "wrong"

    monkeypatch.setattr(eager, "pack", wrong)
    prepared = find_runtime("packed").prepare(net, x)
    assert "gave other outputs" in prepared.options["packing"]
    assert_close(prepared(), net(x).detach(), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(eager, "pack", lambda model, example: (nn.Flatten(7), "broken"))
    prepared = find_runtime("packed").prepare(net, x)
    assert "failed" in prepared.options["packing"]
    assert_close(prepared(), net(x).detach(), rtol=1e-3, atol=1e-4)


def test_differences_are_the_largest_of_all_outputs_and_count_nan():
    a, b = torch.tensor([0.0, 2.0]), torch.tensor([[1.0, -1.0]])
    gap = difference([a, b], [a + torch.tensor([0.0, 0.1]), b - 0.5])
    assert gap.max_abs == pytest.approx(0.5)
    assert gap.relative == pytest.approx(0.5 / 2**0.5)
    assert difference([a], [a * float("nan")]).size == float("inf")
    assert difference([a], [a]).max_abs == 0
    with pytest.raises(ModelError, match="Outputs must have the shapes"):
        difference([a], [b])
    with pytest.raises(ModelError, match="must give tensors"):
        outputs_of("text")


def test_outputs_are_copied_for_runtimes_reuse_their_buffers():
    buffer, tensor = np.ones(3, np.float32), torch.ones(2)
    copies = outputs_of({"a": [buffer], "b": (tensor, 3)})
    buffer[:], tensor[:] = 5, 5
    assert [t.tolist() for t in copies] == [[1, 1, 1], [1, 1]]


def test_each_runtime_goes_by_its_own_name():
    assert all(name == runtime.name for name, runtime in RUNTIMES.items())
    assert find_runtime("eager").installed
    assert torch.__version__.startswith(find_runtime("eager").version)


def test_an_unknown_runtime_is_told_its_neighbor():
    with pytest.raises(
        UnknownNameError, match=r"No runtime named 'onnxrt'. Did you mean 'onnxruntime'"
    ):
        find_runtime("onnxrt")


def test_a_runtime_whose_package_is_missing_says_how_to_install_it(monkeypatch):
    absent = Runtime("absent", lambda model, example: int, package="no_such_package", extra="onnx")
    monkeypatch.setitem(runtimes.RUNTIMES, "absent", absent)
    with pytest.raises(
        MissingExtraError, match=r"'absent' needs the package 'no_such_package'.*onebyone\[onnx\]"
    ):
        find_runtime("absent")


def test_a_network_that_cannot_be_copied_is_refused():
    net = nn.Linear(3, 3)
    net.kept = net.weight * 2
    with pytest.raises(ModelError, match="must be deep-copyable"):
        find_runtime("eager").prepare(net, torch.randn(1, 3))


def test_the_machine_is_described_and_saved():
    machine = describe_machine()
    assert machine.threads == torch.get_num_threads()
    assert machine.cores >= 1
    assert machine.processor
    assert torch.__version__.startswith(machine.versions["torch"])
    assert Machine.from_json(machine.to_json()) == machine
    assert "torch" in str(machine)
