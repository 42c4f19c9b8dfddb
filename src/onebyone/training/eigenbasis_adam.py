"""Adam in the eigenbasis of each layer's inputs and output curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from onebyone.calibration.moments import Moments
from onebyone.networks.conv_layers import shape_of
from onebyone.rewrites.low_rank.eigen import eigen

BETAS = (0.9, 0.99)
# Gradients below this share of the layer's root mean square, or below this value, are rounding.
LEAST_ROOT = 1e-4
LEAST_GRADIENT = 1e-12
# Layers with more inputs or outputs take plain Adam steps.
MOST_VALUES = 640
MOST_OUTPUTS = 2048


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases in which a layer's gradient is nearly uncorrelated, one for each group.

    Attributes:
        inputs: Eigenvectors of the second moment of the layer's inputs, which end in a constant 1
            if it has a bias; shape ``(groups, d, d)``.
        outputs: Eigenvectors of the curvature of its outputs, shape ``(groups, out, out)``.
    """

    inputs: Tensor
    outputs: Tensor


def has_basis(module: nn.Module) -> bool:
    """Whether a module is a trained layer that is narrow enough for a basis."""
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        return False
    if nn.utils.parametrize.is_parametrized(module):
        return False
    trained = all(p.requires_grad for p in module.parameters())
    shape = shape_of(module)
    return trained and shape.values < MOST_VALUES and shape.group_out <= MOST_OUTPUTS


def basis_of(moments: Sequence[Moments], curvature: Tensor, layer: nn.Module) -> Basis:
    """Return the basis of a layer.

    Args:
        moments: Moments of the inputs of each of its groups.
        curvature: Curvature of its outputs, shape ``(out, out)``.
        layer: A convolution or a linear layer.
    """
    shape, weight = shape_of(layer), layer.weight
    assert isinstance(weight, Tensor)
    inputs, outputs = [], []
    for group, data in enumerate(moments):
        assert data.xx is not None
        second = data.xx + torch.outer(data.mean_x, data.mean_x)
        if layer.bias is not None:
            last = torch.cat([data.mean_x, data.mean_x.new_ones(1)])
            second = torch.cat([torch.cat([second, data.mean_x[None]]), last[:, None]], dim=1)
        mine = slice(group * shape.group_out, (group + 1) * shape.group_out)
        inputs.append(eigen(second)[1].to(weight))
        outputs.append(eigen(curvature[mine, mine])[1].to(weight))
    return Basis(torch.stack(inputs), torch.stack(outputs))


class EigenbasisAdam:
    """Adam in the eigenbasis of each layer's inputs and output curvature.

    A layer's Gauss-Newton matrix is approximately the Kronecker product of these two (Martens,
    Grosse, "K-FAC", ICML 2015). Adam scales each coordinate by itself, which works best where
    coordinates are uncorrelated (Vyas et al., "SOAP", ICLR 2025). The basis is computed once, since
    the weights change little. Parameters without a basis take plain Adam steps.
    """

    def __init__(self, network: nn.Module, bases: dict[str, Basis]) -> None:
        self._layers = [
            (cast("nn.Conv2d", network.get_submodule(name)), basis) for name, basis in bases.items()
        ]
        turned = {id(p) for layer, _ in self._layers for p in layer.parameters()}
        self._plain = [p for p in network.parameters() if p.requires_grad and id(p) not in turned]
        self.forget()

    def forget(self) -> None:
        """Reset the running means of the gradients."""
        self._taken = 0
        self._means: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the parameters from their gradients."""
        self._taken += 1
        for place, parameter in enumerate(self._plain):
            if parameter.grad is not None:
                parameter.sub_(rate * self._direction(-1 - place, parameter.grad))
        for place, (layer, basis) in enumerate(self._layers):
            if layer.weight.grad is None:
                continue
            gradient = layer.weight.grad.reshape(len(basis.outputs), basis.outputs.shape[1], -1)
            if layer.bias is not None:
                assert layer.bias.grad is not None
                last = layer.bias.grad.reshape(*gradient.shape[:2], 1)
                gradient = torch.cat([gradient, last], dim=2)
            straight = basis.outputs.mT @ gradient @ basis.inputs
            move = rate * basis.outputs @ self._direction(place, straight) @ basis.inputs.mT
            if layer.bias is not None:
                layer.bias.sub_(move[..., -1].reshape(layer.bias.shape))
                move = move[..., :-1]
            layer.weight.sub_(move.reshape(layer.weight.shape))

    def _direction(self, key: int, gradient: Tensor) -> Tensor:
        mean, square = self._means.get(key, (torch.zeros_like(gradient),) * 2)
        mean = torch.lerp(gradient, mean, BETAS[0])
        square = torch.lerp(gradient.square(), square, BETAS[1])
        self._means[key] = mean, square
        mean = mean / (1 - BETAS[0] ** self._taken)
        square = square / (1 - BETAS[1] ** self._taken)
        root = square.sqrt()
        # Rounding errors must not move weights without a gradient, such as behind a dead channel.
        return mean / (root + LEAST_ROOT * root.square().mean().sqrt() + LEAST_GRADIENT)
