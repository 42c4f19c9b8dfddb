"""Checks on small networks that a runtime does what every runtime must do."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.core.arguments import checked
from onebyone.core.contracts import failing_as, hold
from onebyone.core.errors import ContractError, OneByOneError
from onebyone.core.tensor_trees import Inputs, fresh, tensors_in, to_device
from onebyone.networks.surgery import called
from onebyone.runtimes.base import PRECISIONS, Prepared, Runtime
from onebyone.runtimes.output_check import difference, outputs_of


@dataclass(frozen=True)
class _Case:
    name: str
    network: nn.Module
    example: Inputs


class _TwoOutputs(nn.Module):
    """A network that returns a map and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).relu()
        return features, self.head(features.mean((2, 3)))


class _TwoInputs(nn.Module):
    """A network of an image, numbers of words, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.words = nn.Embedding(5, 6)

    def forward(self, image: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        found: Tensor = self.body(image).mean((2, 3)) * scale + self.words(ids).mean(1)
        return found


def _cases(*, trees: bool) -> Iterator[_Case]:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.Hardswish(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    yield _Case("a small classifier", plain, torch.randn(2, 3, 12, 10))
    yield _Case("a network with two outputs", _TwoOutputs(), torch.randn(1, 3, 9, 9))
    yield _Case("a linear layer", nn.Linear(7, 3), torch.randn(4, 7))
    yield _Case(
        "a network that writes into its input",
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)),
        torch.randn(1, 3, 8, 8),
    )
    if trees:
        ids = torch.tensor([[1, 0], [4, 1]])
        named = {"image": torch.randn(2, 3, 8, 6), "ids": ids, "scale": 0.5}
        yield _Case("a network of several inputs", _TwoInputs(), named)


@checked
def check_runtime(runtime: Runtime, *, device: str = "cpu") -> None:
    """Check that a runtime does what every runtime must.

    - Its outputs equal those of eager PyTorch in evaluation mode, within its precision.
    - A second call gives the same outputs, even after the network and the example are deleted.
    - The network, its mode, the example and torch's global state are unchanged.
    - ``prepare_layers``, if it has one, gives the same outputs.
    - If it says that it takes any inputs, a network with keyword arguments gives the same outputs.
    - On a device that it does not support, it raises an error of onebyone.

    Args:
        runtime: The runtime to check. Its package must be installed.
        device: Where to run the networks.

    Raises:
        ContractError: If it breaks one of these; names the runtime, the network and the rule.
    """
    for case in _cases(trees=runtime.takes_trees):
        with failing_as(f"The runtime {runtime.name!r} must run {case.name}"):
            _check_case(runtime, runtime.prepare, case, device)
            if runtime.prepare_layers is not None and isinstance(case.example, Tensor):
                _check_case(runtime, runtime.prepare_layers, case, device)
    if runtime.devices == ("cuda",):
        _check_refusal(runtime)


def _check_case(
    runtime: Runtime, prepare: Callable[[nn.Module, Any], Prepared], case: _Case, device: str
) -> None:
    network, example = case.network.to(device).train(), to_device(case.example, device)
    reference = _eager(network, example)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    given, before = fresh(example), _global_state()
    prepared = prepare(network, example)
    first = outputs_of(prepared())
    must = f"The runtime {runtime.name!r}, given {case.name}, must"
    hold(_global_state() == before, f"{must} leave torch's global state as it was")
    kept = all(map(torch.equal, tensors_in(example), tensors_in(given)))
    hold(kept, f"{must} not write into the example")
    hold(network.training, f"{must} leave the network's mode as it was")
    same = all(torch.equal(weights[name], now) for name, now in network.state_dict().items())
    hold(same, f"{must} not modify the network")
    del network, example
    gc.collect()
    again = outputs_of(prepared())
    hold(
        all(torch.equal(a, b) for a, b in zip(first, again, strict=True)),
        f"{must} give the same outputs at each call",
    )
    gap = difference(reference, first).size
    limit = PRECISIONS.get(runtime.precision, PRECISIONS["float32"]).tolerance
    hold(
        gap <= limit,
        f"{must} give outputs within {limit:g} of eager float32's (of their standard deviation), "
        f"got {gap:.2g}",
    )


def _eager(network: nn.Module, example: Inputs) -> list[Tensor]:
    network.eval()
    with torch.no_grad():
        found = outputs_of(called(network, fresh(example)))
    network.train()
    return found


def _global_state() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item(),
        hash(random.getstate()),
        hash(str(np.random.get_state(legacy=False))),  # noqa: NPY002
    )


def _check_refusal(runtime: Runtime) -> None:
    try:
        runtime.prepare(nn.Linear(2, 2), torch.zeros(1, 2))
    except OneByOneError:
        return
    except Exception as error:
        raise ContractError(
            f"The runtime {runtime.name!r} must refuse a device that it does not name with an "
            f"error of onebyone, got {type(error).__name__}: {error}"
        ) from error
    raise ContractError(f"The runtime {runtime.name!r} must refuse the CPU, which it does not name")
