"""Every runtime keeps the contract, and the contract catches one that does not."""

import importlib.metadata

import pytest
import torch

from onebyone.core import plugins
from onebyone.core.errors import ContractError, PluginError, UnknownNameError
from onebyone.core.precision import has_bf16
from onebyone.core.tensor_trees import fresh
from onebyone.networks.surgery import called, evaluation_copy
from onebyone.profiling.bench import _available
from onebyone.runtimes import (
    RUNTIMES,
    Prepared,
    Runtime,
    find_runtime,
    known_runtime,
    runtime_names,
)
from onebyone.runtimes.contract import check_runtime

SLOW = {"compile", "executorch"}


def cpu_runtimes():
    for name, runtime in RUNTIMES.items():
        if "cpu" in runtime.devices:
            marks = [pytest.mark.slow] if name.partition(":")[0] in SLOW else []
            yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(cpu_runtimes()))
def test_every_runtime_keeps_the_contract(name):
    runtime = RUNTIMES[name]
    if not runtime.installed:
        pytest.skip(f"{runtime.package} is not installed")
    if runtime.precision == "bf16" and not has_bf16("cpu"):
        pytest.skip("the processor has no bf16 kernels")
    check_runtime(runtime)


def made(run):
    """Return a runtime that computes as ``run(copy of the network, example)`` says."""

    def prepare(model, example):
        network, held = evaluation_copy(model), example.clone()

        def call():
            with torch.no_grad():
                return run(network, held.clone())

        return Prepared(call)

    return Runtime("made", prepare)


def scaled(outputs, factor):
    if isinstance(outputs, tuple):
        return tuple(each * factor for each in outputs)
    return outputs * factor


def test_a_correct_runtime_of_ones_own_passes():
    check_runtime(made(lambda network, x: network(x)))


def test_other_outputs_are_caught():
    with pytest.raises(ContractError, match=r"'made', given a small classifier, must give outputs"):
        check_runtime(made(lambda network, x: scaled(network(x), 1.01)))


def test_inputs_that_are_not_all_given_are_caught():
    def prepare(model, example):
        network, held = evaluation_copy(model), fresh(example)
        if isinstance(held, dict):
            held.pop("scale")

        def call():
            with torch.no_grad():
                return called(network, fresh(held))

        return Prepared(call)

    check_runtime(Runtime("made", prepare))
    with pytest.raises(ContractError, match="given a network of several inputs, must give outputs"):
        check_runtime(Runtime("made", prepare, takes_trees=True))


def test_outputs_that_change_from_call_to_call_are_caught():
    calls = []

    def run(network, x):
        calls.append(1)
        return scaled(network(x), 1.0 + 1e-5 * (len(calls) % 2))

    with pytest.raises(ContractError, match="the same outputs at each call"):
        check_runtime(made(run))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda model, _: model.eval(), "the network's mode"),
        (lambda model, _: next(model.parameters()).data.mul_(2), "not modify the network"),
        (lambda _, x: x.mul_(2), "not write into the example"),
        (lambda *_: torch.manual_seed(3), "global state"),
    ],
)
def test_what_a_runtime_leaves_behind_is_caught(harm, words):
    good = made(lambda network, x: network(x))

    def prepare(model, example):
        prepared = good.prepare(model, example)
        harm(model, example)
        return prepared

    with pytest.raises(ContractError, match=words):
        check_runtime(Runtime("bad", prepare))


def test_a_failure_names_the_runtime_and_the_network():
    def run(network, x):
        raise RuntimeError("no kernel")

    with pytest.raises(ContractError, match=r"'made' must run a small classifier.*no kernel"):
        check_runtime(made(run))


# ---------------------------------------------------------------- added by other packages


GOOD = made(lambda network, x: network(x))
ANOTHER = Runtime("another", GOOD.prepare)
NO_RUNTIME = 3


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a package adds these entry points."""

    def install(**entries):
        found = tuple(
            importlib.metadata.EntryPoint(name, f"{__name__}:{value}", "onebyone.runtimes")
            for name, value in entries.items()
        )
        monkeypatch.setattr(plugins, "_entries", lambda group: found)

    return install


def test_another_package_adds_a_runtime(installed):
    installed(made="GOOD")
    assert find_runtime("made") is GOOD
    assert runtime_names()[-1] == "made"
    assert "made" in _available("cpu", {})


def test_a_name_of_ours_cannot_be_taken(installed):
    installed(eager="GOOD")
    with pytest.raises(PluginError, match="a name that onebyone itself has"):
        runtime_names()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("MISSING", "could not be imported: AttributeError"),
        ("NO_RUNTIME", "must be a Runtime, but .* is a int"),
        ("ANOTHER", "must have that `name`, got 'another'"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_and_stops_nothing_else(installed, value, words):
    installed(made=value)
    with pytest.raises(PluginError, match=words):
        known_runtime("made")
    left_out = {}
    assert "eager" in _available("cpu", left_out)
    assert left_out["made"]


def test_an_unknown_name_lists_what_packages_add(installed):
    installed(made="GOOD")
    with pytest.raises(UnknownNameError, match="made"):
        known_runtime("mad")
