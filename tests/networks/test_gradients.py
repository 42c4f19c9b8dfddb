"""Forwards and losses without gradients: planned for all the same, and not trained."""

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core.errors import GradientError

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip


class WithoutGradients(Body):
    def forward(self, x):
        with torch.no_grad():
            return self.net(x)


class InInferenceMode(Body):
    def forward(self, x):
        with torch.inference_mode():
            return self.net(x)


class WritesOverWhatIsKept(Body):
    def forward(self, x):
        y = self.net(x).exp()
        y *= 2
        return y


CUT = [WithoutGradients, InInferenceMode, WritesOverWhatIsKept]


@pytest.mark.parametrize("kind", CUT)
def test_a_forward_that_has_no_gradients_is_rewritten_all_the_same(kind):
    net = kind().eval()
    plan = obo.uniform_plan(net, X[:1], ranks=0.5)
    assert plan.choices
    small = obo.apply(net, plan, X, task="regression")
    assert small(X).shape == (12, 4)


@pytest.mark.parametrize("kind", CUT)
def test_a_forward_that_has_no_gradients_is_not_trained(kind):
    net = kind().eval()
    with pytest.raises(GradientError, match="must have gradients"):
        obo.train(net, (X, torch.randn(12, 4)), epochs=1, task="regression")
    with pytest.raises(GradientError, match="must have gradients"):
        obo.reconstruct(net, teacher=net, calibration=X, steps=1)
