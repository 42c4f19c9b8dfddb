"""Data sets whose items a function makes, and what their batches give."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset


class Made(Dataset):
    """Items by a function of their index."""

    def __init__(self, make, n: int = 10) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        return self.make(index)


def noisy(index: int):
    drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    return torch.tensor([*drawn, float(index)]), index


def collected(split, **options):
    parts = list(split.batches(3, **options))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
