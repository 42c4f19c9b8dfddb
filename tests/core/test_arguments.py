"""Each argument of a public function is checked by its name, in one place, before anything runs."""

import inspect
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import onebyone
from onebyone.core.arguments import KINDS, checked
from onebyone.core.errors import OneByOneError, OptionError, UnknownNameError, UsageError

PUBLIC = {
    name: function
    for name in onebyone.__all__
    if inspect.isfunction(function := getattr(onebyone, name))
}
# What is checked where it is read, as it can be of many types.
READ_ELSEWHERE = {
    "budget", "cache", "calibration", "data", "device", "example", "formats", "images", "inputs",
    "metric", "model", "models", "model_options", "options", "original", "plan", "preprocessing",
    "rewrite",
    "size", "sources", "spec", "teacher", "uses",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_of_every_public_function_is_known(name):
    function = PUBLIC[name]
    assert hasattr(function, "__wrapped__"), "it is not checked"
    for parameter in inspect.signature(function).parameters:
        assert (parameter in KINDS) != (parameter in READ_ELSEWHERE), parameter


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"shrink", "load_model"}))
def test_an_argument_with_a_slip_is_suggested(name):
    *_, last = [
        each
        for each in inspect.signature(PUBLIC[name]).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    ]
    with pytest.raises(
        UnknownNameError, match=rf"No argument of {name}\(\) named .*mean '{last.name}'"
    ):
        PUBLIC[name](**{f"{last.name}s": 1})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_missing_argument_is_named(name):
    with pytest.raises(OneByOneError, match=r"missing a required argument|at least 2 networks"):
        PUBLIC[name]()


WRONG = {
    "batch": ["8", 8.5, 0, -1, 99_999_999, True, None, 10**400],
    "epochs": ["3", 1e9, 10**9, -1, float("nan"), np.float64(3)],
    "num_threads": [0, -2, 10**6, "all"],
    "rounds": [0, 2.5, "many"],
    "seed": [-1, 2**32, int("1" * 23), 1.0, "0", None],
    "limit": [0, -1, "10"],
    "ignore_index": ["255", 255.0, True, 2**63],
    "task": [3, b"regression", ["regression"], torch.ones(1), dict],
    "learning_rate": ["fast", 0, -0.1, float("nan"), float("inf"), 1e9],
    "label_weight": [-0.1, 1.1, "half", None],
    "temperature": [0, float("inf"), "warm"],
    "ranks": [0, 1.1, "50%", float("nan")],
    "fastest": [1, "yes", None],
    "leave": [b"conv1", 3, [3], {"conv1": 1}],
    "runtimes": [3, [None]],
    "effort": ["quik", None, 3],
    "head": ["gapp", None, 3],
    "precision": ["fp16", torch.bfloat16],
    "weights": [{"a": torch.ones(1)}, 3, "", "a\0b"],
    "out": [3, nn.Linear(1, 1), ""],
    "input_shape": ["1,3,8,8", (), (0, 3), (1.5, 3), (1, -3, 8, 8), (1, 3, 10**9, 8), [[1]], 3],
    "progress": [True, "yes"],
    "mean": ["0.5", 0.5, [float("nan")], ["a"]],
    "name": [3, b"net"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_refused_by_the_name_of_its_argument(name, value):
    with pytest.raises(UsageError, match=f"`{name}`"):
        KINDS[name](name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", 99_999_999, "`batch` must be at most 65,536, got 99999999."),
        ("batch", "8", "`batch` must be a whole number, got '8'."),
        ("seed", int("1" * 23), "`seed` must be at most 4,294,967,295, got 1{23}."),
                ("seed", 10**400, "got a number of 401 digits."),
        ("label_weight", 2, "`label_weight` must be at most 1, got 2."),
        ("learning_rate", 0, "`learning_rate` must be above 0, got 0."),
        ("learning_rate", float("nan"), "`learning_rate` must be a finite number, got nan."),
        ("runtimes", 3, "`runtimes` must be a list of names, got 3."),
        ("head", "gapp", "No `head` named 'gapp'. Did you mean 'gap'?"),
        ("task", "regresion", "No task named 'regresion'. Did you mean 'regression'?"),
        ("task", nn.MSELoss, "`task` must be one of classification, .*, got the class MSELoss."),
        ("weights", {"a": 1}, "`weights` must be the path .* got a dict. Load a state dict by"),
        ("input_shape", (1, 0), r"`input_shape` must be positive sizes with the batch in front.* got \(1, 0\)."),
    ],
)  # fmt: skip
def test_what_is_said(name, value, message):
    with pytest.raises(OneByOneError, match=message):
        KINDS[name](name, value)


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("batch", np.int64(8), 8),
        ("seed", np.uint32(7), 7),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", Fraction(1, 2), 0.5),
        ("label_weight", True, None),
        ("fastest", np.bool_(True), True),
        ("runtimes", "onnxruntime", ("onnxruntime",)),
        ("ignore_index", np.int64(-1), -1),
        ("task", "regression", "regression"),
        ("leave", (name for name in ("a", "b")), ("a", "b")),
        ("input_shape", torch.Size([1, 3, 8, 8]), (1, 3, 8, 8)),
        ("input_shape", np.array([1, 3]), (1, 3)),
        ("out", b"runs/a", "runs/a"),
        ("out", Path("runs/a"), Path("runs/a")),
        ("mean", np.array([0.5, 0.25]), (0.5, 0.25)),
    ],
)
def test_values_of_other_libraries_become_plain(name, value, plain):
    if plain is None:
        with pytest.raises(OptionError, match="must be a number, got True"):
            KINDS[name](name, value)
        return
    given = KINDS[name](name, value)
    assert given == plain
    assert type(given) is type(plain)


def test_a_function_is_called_with_plain_values_and_keeps_its_signature():
    @checked
    def shown(model, *, seed: int = 0, batch: int = 1):
        """Say."""
        return model, seed, batch

    assert shown("m", seed=np.int64(3)) == ("m", 3, 1)
    assert list(inspect.signature(shown).parameters) == ["model", "seed", "batch"]
    assert shown.__doc__ == "Say."


def test_a_number_of_any_length_can_be_refused():
    with pytest.raises(OptionError, match=r"got a number of thousands of digits\."):
        KINDS["seed"]("seed", 10**5000)
