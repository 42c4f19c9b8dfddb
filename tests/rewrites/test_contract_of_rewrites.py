"""Every rewrite of one layer keeps the contract, and the contract catches one that does not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from onebyone.core.errors import ContractError
from onebyone.rewrites.contract import check_rewrite
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.registry import LAYER_REWRITES, METHODS


@pytest.mark.parametrize("name", LAYER_REWRITES)
def test_every_rewrite_keeps_the_contract(name):
    check_rewrite(LAYER_REWRITES[name], name=name)


def altered(**functions):
    """Return `factorize` with some of its functions replaced."""
    kept = {name: getattr(factorize, name) for name in METHODS}
    return SimpleNamespace(**{**kept, **functions})


def cheaper(*args, **how):
    cost = factorize.cost(*args, **how)
    return replace(cost, macs=cost.macs - 1)


def smaller(*args, **how):
    cost = factorize.cost(*args, **how)
    return replace(cost, params=cost.params - 1)


def lighter(*args, **how):
    cost = factorize.cost(*args, **how)
    return replace(cost, bytes=cost.bytes // 2)


def writing(module, settings, *, site=""):
    chain = factorize.build(module, settings, site=site)
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    return chain


def unfitted(chain, problems, settings, module, *, rough=False):
    return 0.0


def failing(module):
    raise IndexError("tuple index out of range")


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"cost": cheaper}, "say .* MACs, not"),
        ({"cost": smaller}, "say .* parameters, not"),
        ({"cost": lighter}, "say .* bytes of weights, not"),
        ({"build": writing}, "not modify the layer|the same function"),
        ({"fit": unfitted}, "the same function where its error is 0"),
        ({"errors": lambda problems, module, options: [0.0] * len(options)}, "it promises"),
        ({"errors": lambda problems, module, options: []}, "an error for each option"),
        ({"why_not": lambda module: None}, "why it does not take a ReLU"),
        ({"why_not": lambda module: "no"}, "at least one of the layers"),
        ({"grid": failing}, "it failed: IndexError"),
        ({"is_exact": lambda module, settings: True}, "the same function where"),
        ({"fit": None}, "must have the functions"),
    ],
)
def test_a_fault_is_caught(functions, words):
    with pytest.raises(ContractError, match=words):
        check_rewrite(altered(**functions), name="mine")


def test_a_result_of_another_shape_is_caught():
    def build(module, settings, *, site=""):
        chain = factorize.build(module, settings, site=site)
        return nn.Sequential(*chain, nn.Flatten()) if isinstance(module, nn.Conv2d) else chain

    with pytest.raises(ContractError, match=r"outputs of shape|it failed"):
        check_rewrite(altered(build=build), name="mine")
