"""Which channels a layer can do without: one after the other, by the exact increase of its error.

A layer's outputs are regressed on what it sees. Without one channel the best regression on the
others has a greater error, by an amount that the inverse covariance tells exactly (the step of the
"optimal brain surgeon", Hassibi and Stork 1993, for the weights of one channel together). The
channel of the least increase is removed, the inverse is updated, and so on: one elimination gives
the error of every width. Its cost grows with the number of channels, not with that of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.rewrites.low_rank.reduced_rank import Problem, damped, regress

# Channels removed by one update of the inverse, at most this share of those that are left. They are
# chosen among so many times as many, exactly, as if one by one.
AT_ONCE = 1 / 64
POOL = 4


@dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they are removed.

    Attributes:
        order: All of them; the last one is the most useful.
        lost: Squared error of the outputs, in their metric, without the first 0, 1, 2, … of these.
        scale: What errors are relative to.
    """

    order: tuple[int, ...]
    lost: tuple[float, ...]
    scale: float

    def kept(self, width: int) -> list[int]:
        """Return the channels that are left at a width, in their own order."""
        return sorted(self.order[len(self.order) - width :])

    def error(self, width: int) -> float:
        """Return the relative squared error at a width."""
        return max(self.lost[len(self.order) - width], 0.0) / max(self.scale, 1e-300)


@dataclass
class _Reader:
    """A layer while channels are eliminated; its input values are in blocks of a channel each.

    Attributes:
        inverse: Of the covariance of what is left of its input.
        weight: The best weights, in the metric of its outputs: ``(out, values)``.
        block: Values of a channel.
    """

    inverse: Tensor
    weight: Tensor
    block: int

    @property
    def channels(self) -> int:
        return len(self.inverse) // self.block

    def increases(self) -> Tensor:
        """Return how much the error grows without each channel by itself."""
        places = torch.arange(self.channels)
        blocks = self.inverse.reshape(self.channels, self.block, self.channels, self.block)
        own = blocks[places, :, places]
        weights = self.weight.reshape(len(self.weight), self.channels, self.block)
        weights = weights.permute(1, 2, 0)
        solved = torch.linalg.solve(own, weights)
        found: Tensor = (solved * weights).sum((1, 2))
        return found

    def values_of(self, channels: Tensor) -> Tensor:
        return (channels.unsqueeze(1) * self.block + torch.arange(self.block)).flatten()

    def of(self, channels: Tensor) -> _Reader:
        """Return the reader as far as these channels alone go."""
        values = self.values_of(channels)
        return _Reader(self.inverse[values][:, values], self.weight[:, values], self.block)

    def remove(self, channels: Tensor) -> None:
        """Remove channels; the others' weights make up for them as well as they can."""
        gone = self.values_of(channels)
        left = torch.ones(len(self.inverse), dtype=torch.bool)
        left[gone] = False
        across = self.inverse[left][:, gone]
        taken = torch.linalg.solve(self.inverse[gone][:, gone], across.T)
        self.weight = self.weight[:, left] - self.weight[:, gone] @ taken
        self.inverse = self.inverse[left][:, left] - across @ taken


def eliminate(problems: Sequence[Problem], channels: int) -> Elimination:
    """Return the order in which channels are best removed, and the error of every width.

    Args:
        problems: Of each layer that reads the channels. Its error counts in its metric; several
            layers' errors add up.
        channels: How many there are: the values that each layer sees are in as many equal blocks.

    Raises:
        torch.linalg.LinAlgError: If a covariance cannot be inverted.
    """
    readers = [_reader_of(problem, channels) for problem in problems]
    names = torch.arange(channels)
    order: list[int] = []
    lost = [sum(problem.unit * lost_by(problem) for problem in problems)]
    while len(names) > 1:
        count = max(1, int(AT_ONCE * len(names)))
        pool = torch.arange(len(names))
        if count > 1:
            total = sum((reader.increases() for reader in readers), torch.zeros(()))
            pool = total.argsort()[: POOL * count]
        gone = _one_by_one(readers, pool, count, lost)
        order += names[gone].tolist()
        left = torch.ones(len(names), dtype=torch.bool)
        left[gone] = False
        for reader in readers:
            reader.remove(gone)
        names = names[left]
    lost.append(lost[-1] + float(sum(reader.increases().sum() for reader in readers)))
    order += names.tolist()
    scale = sum(problem.felt for problem in problems)
    return Elimination(tuple(order), tuple(lost), scale)


def _one_by_one(readers: Sequence[_Reader], pool: Tensor, count: int, lost: list[float]) -> Tensor:
    """Return the channels of a pool that are removed first; their errors are appended to lost."""
    inside = [reader.of(pool) for reader in readers] if count > 1 else list(readers)
    left, gone = pool, []
    for _ in range(count):
        total = sum((reader.increases() for reader in inside), torch.zeros(()))
        first = int(total.argmin())
        gone.append(int(left[first]))
        lost.append(lost[-1] + max(float(total[first]), 0.0))
        if len(gone) < count:
            for reader in inside:
                reader.remove(torch.tensor([first]))
            left = torch.cat([left[:first], left[first + 1 :]])
    return torch.tensor(gone)


def _reader_of(problem: Problem, channels: int) -> _Reader:
    values = problem.weight[0].numel()
    root = problem.root * problem.unit**0.5
    weight = root @ regress(problem)
    if problem.xx is None:
        return _Reader(torch.eye(values, dtype=torch.float64), weight, values // channels)
    lower, _ = damped(problem.xx, problem.ridge)
    return _Reader(torch.cholesky_inverse(lower), weight, values // channels)


def lost_by(problem: Problem, weight: Tensor | None = None) -> float:
    """Return the squared error of weights ``(out, values)``, of the best by default."""
    weight = regress(problem) if weight is None else weight
    if problem.xx is None or problem.yx is None:
        missing = weight - problem.weight.flatten(1)
        return problem.measured(missing @ missing.T)
    cross = weight @ problem.yx.T
    given = weight @ problem.xx @ weight.T
    return max(problem.measured(problem.yy - cross - cross.T + given), 0.0)


def without(problem: Problem, kept: Tensor) -> Problem:
    """Return the problem of a layer that sees only some values of its input.

    Args:
        problem: Of all of them.
        kept: The values that are left, in order; several a channel and kernel place.
    """
    out = len(problem.weight)
    weight = problem.weight.flatten(1)[:, kept].reshape(out, 1, -1)
    if problem.xx is None or problem.yx is None:
        return problem.seen(weight=weight, mean_x=problem.mean_x[kept], given_yy=problem.yy)
    return problem.seen(
        weight=weight,
        mean_x=problem.mean_x[kept],
        xx=problem.xx[kept][:, kept],
        yx=problem.yx[:, kept],
    )
