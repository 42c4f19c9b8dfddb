"""Seeds repeat, and the caller's generator goes on as if nothing had been drawn."""

import torch

from onebyone.core.randomness import seeded


def test_draws_inside_repeat_and_those_outside_go_on():
    torch.manual_seed(5)
    first, second = torch.rand(2), torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), first)
    with seeded(1):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), second)
    with seeded(1, torch.device("cpu")):
        assert torch.equal(torch.rand(2), inside)
    with seeded(2):
        assert not torch.equal(torch.rand(2), inside)
