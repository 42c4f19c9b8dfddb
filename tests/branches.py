"""Small networks of several inputs, the same ones on one tensor, and examples for both."""

import torch
from torch import nn
from torch.utils.data import Dataset


class RgbDepth(nn.Module):
    """A picture and its depth, each through a branch of its own."""

    def __init__(self):
        super().__init__()
        self.rgb = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.depth = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.joint = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, rgb, depth):
        both = torch.cat([self.rgb(rgb), self.depth(depth)], 1)
        return self.head(self.joint(both).relu().mean((2, 3)))


class OneTensor(nn.Module):
    """The same network, given the channels of both in one tensor."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.eval()

    def forward(self, both):
        return self.inside(both[:, :3], both[:, 3:])


class Masked(nn.Module):
    """A picture by keyword with a mask that may be absent, as transformers' networks take them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(16, 4)

    def forward(self, pixel_values, mask=None, *, scale=1.0):
        seen = self.body(pixel_values) * scale
        if mask is not None:
            seen = seen * mask[:, None]
        return {"logits": self.head(seen.mean((2, 3)))}


def rgb_depth(seed=0):
    return _of_seed(RgbDepth, seed)


def masked(seed=0):
    return _of_seed(Masked, seed)


def _of_seed(kind, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().eval()


def one_tensor(count=96):
    """Return pictures with depth as a fourth channel, and the class that both decide."""
    draw = torch.Generator().manual_seed(3)
    both = torch.randn(count, 4, 8, 8, generator=draw)
    both = both + 2 * torch.randn(count, 4, 1, 1, generator=draw)
    means = both.mean((2, 3))
    return both, 2 * (means[:, 0] > 0).long() + (means[:, 3] > 0).long()


def positional(count=96):
    both, labels = one_tensor(count)
    return (both[:, :3].contiguous(), both[:, 3:].contiguous()), labels


def keywords(count=96):
    both, labels = one_tensor(count)
    mask = (both[:, 3] > -2).float()
    return {"pixel_values": both[:, :3].contiguous(), "mask": mask, "scale": 0.5}, labels


class Named(Dataset):
    """The same examples one by one, each a mapping that also has its label."""

    def __init__(self, count=96):
        both, self.labels = one_tensor(count)
        self.pictures, self.masks = both[:, :3], (both[:, 3] > -2).float()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {
            "pixel_values": self.pictures[index],
            "mask": self.masks[index],
            "labels": int(self.labels[index]),
        }
