"""The shares of a step that several processes compute make up the whole step."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from onebyone.core import processes
from onebyone.data import as_split
from onebyone.training import shares


def as_one_of(count, rank):
    """Let this process be one of several."""
    group = processes._Group(rank, count, None, None)
    return mock.patch.object(processes, "_group", group)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 2, 7, 16, 17])
def test_the_shares_of_all_processes_are_the_step(examples, accumulate, count):
    total, seen = 0.0, torch.zeros(examples)
    for rank in range(count):
        with as_one_of(count, rank):
            parts = shares.parts_of(examples, accumulate)
            mine = shares.mine_of(examples, accumulate)
        assert sum(map(len, parts)) == len(mine) > 0
        moved = shares.packed(parts)
        for part, place in zip(parts, moved, strict=True):
            assert mine[place.start : place.stop] == [*range(part.start, part.stop)]
            assert part.divided == (
                count > 1 and (place.share, len(place)) == (part.share, len(part)) and part.divided
            )
            seen[part.start : part.stop] += part.share * examples / len(part)
        total += sum(part.share for part in parts)
    assert total == pytest.approx(1)
    assert torch.allclose(seen, torch.ones(examples))


class Counted(Dataset):
    """Examples that note when they are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 22

    def __getitem__(self, index):
        self.read.append(index)
        return torch.arange(4.0) * index / 22 + torch.rand(4), index % 2


def test_a_process_loads_its_share_alone_unless_a_collate_may_mix():
    items = Counted()
    split = as_split(items)
    whole = [*split.batches(8, seed=1, augment=True)]
    items.read.clear()
    with as_one_of(3, 1):
        mine = partial(shares.mine_of, accumulate=2)
        some = [*split.batches(8, seed=1, augment=True, mine=mine)]
        places = [mine(len(targets)) for _, targets in whole]
    assert len(items.read) == sum(map(len, places)) < len(items)
    for (inputs, targets), (few, their), chosen in zip(whole, some, places, strict=True):
        assert torch.equal(inputs[chosen], few)
        assert torch.equal(targets[chosen], their)
    assert split.shares
    assert not as_split(DataLoader(items, collate_fn=partial(default_collate))).shares
