"""Plans in int8, on a machine whose times are a known function of the layers."""

import pytest
import torch
from test_latency_planner import SHAPE, Net

from onebyone import plan
from onebyone.core.errors import BudgetError, OptionError, UnknownNameError
from onebyone.core.records import Deployment, Plan
from onebyone.planning import planner as planner_module
from onebyone.planning.latency import builds
from onebyone.planning.latency import layer_timer as timing
from onebyone.planning.latency.cache import Timings
from onebyone.planning.latency.precision import Preparing, runtime_for
from onebyone.planning.recount import recounted


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def int8_machine(machine, monkeypatch):
    """Return what installs a machine that computes float32 and int8 at speeds of their own."""

    def install(int8, **float32):
        machine(noise=0, **float32)
        from known_machine import Machine

        in_int8 = Machine(noise=0, **int8)

        def preparing(deployment):
            assert deployment.precision == "int8"
            return Preparing(in_int8.prepare, in_int8.prepare, is_quick=False)

        for module in (builds, timing):
            monkeypatch.setattr(module, "preparing", preparing)
        monkeypatch.setattr(planner_module, "runtime_for", lambda _, runtime: runtime)

    return install


def planned(net, budget, **settings):
    settings = {"runtime": "known", "cache": False, "num_threads": 1, **settings}
    return plan(net, None, input_shape=SHAPE, budget=budget, precision="int8", **settings)


def test_a_budget_in_percent_is_of_the_original_in_float32(int8_machine, net):
    int8_machine({"per_mac": 5e-7})
    made = planned(net, "latency=50%")
    assert made.precision == "int8"
    assert made.latency.deployment.precision == "int8"
    assert made.latency.ratio.value >= 1 / 0.505
    assert made.latency.error <= 0.03
    assert made.latency.alone_ratio.value > 1
    whole = made.latency.before.median_ms
    assert made.before.ms == pytest.approx(whole)
    assert made.latency.alone.median_ms < whole


def test_rewrites_are_chosen_by_their_times_in_int8(int8_machine, net):
    # In int8 a call is dear here: what saves fewer MACs than a call takes is slower.
    int8_machine({"per_mac": 5e-7, "overhead": 0.4})
    made = planned(net, "latency=95%")
    for option in made.choices:
        calls = 1 if option.site == "fc" else 2
        assert option.saved.macs * 5e-7 > 0.4 * (calls - 1)


def test_a_budget_that_int8_alone_meets_needs_no_rewrite(int8_machine, net):
    int8_machine({"per_mac": 5e-7})
    made = planned(net, "latency=80%")
    assert made.choices == ()
    assert made.precision == "int8"
    assert made.missed() == ()


def test_rewrites_that_make_int8_slower_as_a_whole_are_left_out(int8_machine, net):
    # Each layer alone is faster, the whole network is not.
    def whole(layers_ms):
        return 20.0 - layers_ms

    int8_machine({"per_mac": 5e-7, "whole": whole}, whole=lambda ms: 30 + ms)
    made = planned(net, "latency=10%", closest=True)
    assert made.choices == ()
    assert made.precision == "int8"
    reasons = {item.reason for item in made.left_alone}
    assert any("than int8 alone" in reason for reason in reasons)


def test_a_plan_that_misses_its_budget_must_be_faster_than_int8_alone(int8_machine, net):
    int8_machine({"per_mac": 5e-7, "whole": lambda _: 20.0}, whole=lambda ms: 30 + ms)
    made = planned(net, "latency=10%", closest=True)
    assert (made.choices, made.precision) == ((), "int8")
    assert any("not shown to be faster than int8" in item.reason for item in made.left_alone)


def test_where_int8_is_slower_than_float32_the_network_stays_float32(int8_machine, net):
    int8_machine({"per_mac": 4e-6, "overhead": 1.0})
    made = planned(net, "latency=100%", fastest=True)
    assert made.precision == "float32"
    assert made.choices == ()
    assert any("int8 is slower than float32" in note for note in made.notes)


def test_what_int8_alone_takes_is_said_where_no_rewrite_is_faster(int8_machine, net):
    int8_machine({"per_mac": 5e-7, "overhead": 100.0, "worth": 0.001})
    with pytest.raises(BudgetError, match=r"int8 alone takes .* of float32's time"):
        planned(net, "latency=1%")


def test_a_size_is_of_bytes_in_int8_and_a_percentage_of_it_of_float32(int8_machine, net):
    int8_machine({"per_mac": 5e-7})
    made = planned(net, "size=20%")
    assert made.after.bytes <= 0.2 * made.before.bytes
    weights = sum(p.numel() for p in net.parameters())
    assert made.before.bytes == 4 * weights
    assert made.after.bytes == made.after.params


def test_a_plan_in_int8_is_read_again_and_is_not_taken_for_an_edited_one(
    int8_machine, net, tmp_path
):
    int8_machine({"per_mac": 5e-7})
    made = planned(net, "latency=50%")
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    assert recounted(again, net) == made
    assert "in int8, cpu" in str(made.latency)


def test_times_in_int8_are_kept_apart_from_those_in_float32(tmp_path):
    float32, int8 = (
        Timings(Deployment(runtime="eager", precision=precision), tmp_path)
        for precision in ("float32", "int8")
    )
    assert float32.conditions != int8.conditions
    assert float32._file != int8._file


def test_int8_needs_a_runtime_that_runs_it(net):
    assert runtime_for("float32", None) is None
    with pytest.raises(OptionError, match="must be 'float32' in the runtime 'eager', got 'int8'"):
        plan(net, None, input_shape=SHAPE, precision="int8", runtime="eager")
    with pytest.raises(UnknownNameError, match="No `precision` named 'int4'"):
        plan(net, None, input_shape=SHAPE, precision="int4")


def test_int8_is_planned_for_onnx_runtime_unless_told_otherwise():
    pytest.importorskip("onnxruntime")
    assert runtime_for("int8", None) == "onnxruntime"
