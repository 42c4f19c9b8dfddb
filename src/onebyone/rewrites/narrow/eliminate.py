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


class _Reader:
    """A layer while channels are eliminated; its input values are in blocks of a channel each.

    The inverse covariance of what is left is that of the beginning, less a product that grows with
    each removal. Only the parts of it that are asked for are computed: its blocks on the diagonal,
    and the columns of the channels that are removed next. Until half of the channels are gone, this
    reads less memory than an update of the whole inverse at every removal.
    """

    def __init__(self, inverse: Tensor, weight: Tensor, block: int) -> None:
        """Begin with all channels.

        Args:
            inverse: Of the covariance of its input, ``(values, values)``. Not modified.
            weight: The best weights, in the metric of its outputs: ``(out, values)``.
            block: Values of a channel.
        """
        self.block = block
        self._begin(inverse, weight)

    def _begin(self, inverse: Tensor, weight: Tensor) -> None:
        values, channels = len(inverse), len(inverse) // self.block
        self.inverse, self.weight = inverse, weight.clone()
        self.left = torch.arange(channels)  # places in `inverse`, in their order
        blocks = inverse.reshape(channels, self.block, channels, self.block)
        places = torch.arange(channels)
        self.own = blocks[places, :, places].clone()
        # What is left of the inverse is `inverse - across @ taken.T`, of the first `gone` columns.
        self.across = inverse.new_empty(values, (channels // 2 + 1) * self.block)
        self.taken = torch.empty_like(self.across)
        self.gone = 0

    def increases(self) -> Tensor:
        """Return how much the error grows without each channel that is left by itself."""
        weights = self.weight.reshape(len(self.weight), -1, self.block)[:, self.left]
        own = self.own[self.left]
        if self.block == 1:  # a 1x1 convolution: nothing to solve
            return weights.squeeze(2).square().sum(0) / own.flatten()
        weights = weights.permute(1, 2, 0)
        found: Tensor = (torch.linalg.inv(own) * (weights @ weights.mT)).sum((1, 2))
        return found

    def _values_of(self, places: Tensor) -> Tensor:
        return (places.unsqueeze(1) * self.block + torch.arange(self.block)).flatten()

    def _part(self, rows: Tensor) -> Tensor:
        """Return the rows and columns of what is left of the inverse."""
        products = self.across[rows, : self.gone] @ self.taken[rows, : self.gone].T
        return self.inverse[rows][:, rows] - products

    def of(self, channels: Tensor) -> _Reader:
        """Return the reader as far as these channels alone go, by their number among the left."""
        values = self._values_of(self.left[channels])
        return _Reader(self._part(values), self.weight[:, values], self.block)

    def remove(self, channels: Tensor) -> None:
        """Remove channels; the others' weights make up for them as well as they can.

        Args:
            channels: Their numbers among those that are left.
        """
        values = self._values_of(self.left[channels])
        across, taken = self._room_for(len(values))
        across[:] = self.inverse[:, values]
        across -= self.across[:, : self.gone] @ self.taken[values, : self.gone].T
        taken[:] = torch.linalg.solve(across[values], across.T).T
        self.weight -= self.weight[:, values] @ taken.T
        shape = (len(self.own), self.block, -1)
        self.own -= across.reshape(shape) @ taken.reshape(shape).transpose(1, 2)
        self.gone += len(values)
        kept = torch.ones(len(self.left), dtype=torch.bool)
        kept[channels] = False
        self.left = self.left[kept]
        if 2 * len(self.left) <= len(self.own):
            rows = self._values_of(self.left)
            self._begin(self._part(rows), self.weight[:, rows])

    def _room_for(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return where the next columns of both factors are written."""
        new = slice(self.gone, self.gone + columns)
        if new.stop > self.across.shape[1]:
            more = self.across.new_empty(len(self.across), columns)
            self.across = torch.cat([self.across, more], 1)
            self.taken = torch.cat([self.taken, more], 1)
        return self.across[:, new], self.taken[:, new]


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
