"""Pictures that stay in their files, and are decoded each time that they are used."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onebyone.core.errors import OptionError
from onebyone.core.randomness import generator_of
from onebyone.core.records import InputSpec
from onebyone.core.units import plural
from onebyone.data.augment import Augmentation, augment, draw
from onebyone.data.decoding import Decoder, default_workers
from onebyone.data.listed import Listed
from onebyone.data.pictures import why_not_in_memory
from onebyone.data.split_checks import check_batches, check_count, checked_statistics
from onebyone.data.splits import (
    Mine,
    Picture,
    TensorSplit,
    as_picture,
    drawn_rows,
    normalized,
    rows_of_part,
)

BLOCK = 64  # pictures that are hashed at once


class PictureSplit:
    """Pictures that are decoded, scaled and cropped each time that they are used.

    Its batches are those of the same pictures in memory (:class:`TensorSplit`), bit for bit.

    Args:
        listed: The pictures with their labels.
        size: Height and width in pixels that they are scaled and cropped to.
        crop: Share of the scaled picture's shorter side that the crop keeps.
        labelled: Whether their labels count.
        mean: Mean of each color, on the scale of 0…1.
        std: Standard deviation of each color, on the same scale.
        augmentation: What ``augment=True`` does to a picture.
        workers: Number of threads that decode.
    """

    holds_pixels = True
    shares = True  # a process can load its share of a batch alone

    def __init__(
        self,
        listed: Listed,
        *,
        size: int,
        crop: float,
        labelled: bool,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise OptionError(f"`workers` must be at least 1, got {workers}.")
        workers = default_workers() if workers is None else workers
        self._decoder = Decoder(listed.pictures, size, crop, workers)
        self._listed, self._labelled = listed, labelled
        self._rows: Tensor | None = None
        self._augment = augmentation or Augmentation()
        one = torch.empty(1, 3, size, size, dtype=torch.uint8)
        self.mean, self.std = checked_statistics(mean, std, one)

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        return InputSpec.of_shape((1, 3, self._decoder.size, self._decoder.size))

    @property
    def targets(self) -> Tensor | None:
        """The labels of all pictures, in order; ``None`` if there are none."""
        if not self._labelled:
            return None
        labels = self._listed.labels
        return labels if self._rows is None else labels[self._rows]

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return str(self._augment)

    @property
    def loading(self) -> str:
        """How pictures are loaded, in words."""
        return f"decoded as they are used, by {plural(self._decoder.workers, 'worker')}"

    def __len__(self) -> int:
        return len(self._listed if self._rows is None else self._rows)

    def __repr__(self) -> str:
        return f"PictureSplit({len(self)} × {self.inputs.example_text()})"

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        mine: Mine | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized float32 inputs with their targets; see :meth:`Split.batches`.

        With ``mine``, only these examples of each batch are decoded and given.
        """
        check_batches(batch_size, seed, augment=augment)
        places = range if mine is None else mine
        batches = self._batches(batch_size, seed, places, torch.device(device), augmented=augment)
        return (
            (normalized(pixels, self.mean, self.std, channels_last=channels_last), targets)
            for pixels, targets in batches
        )

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        mine: Mine,
        device: torch.device,
        *,
        augmented: bool,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and targets. What is drawn is drawn in the order of :class:`TensorSplit`."""
        n, generator = len(self), generator_of(0 if seed is None else seed)
        order = torch.arange(n) if seed is None else torch.randperm(n, generator=generator)
        draws = draw(self._augment, n, generator) if augmented and self._augment else None
        targets = torch.empty(n, 0) if self.targets is None else self.targets
        batches = [
            start + torch.tensor(mine(min(batch_size, n - start)), dtype=torch.int64)
            for start in range(0, n, batch_size)
        ]
        decoded = self._decoder.batches(self._rows_of_files(order[places]) for places in batches)
        for places, images in zip(batches, decoded, strict=True):
            pixels = images.to(device, non_blocking=True)
            if draws is not None:
                pixels = augment(pixels, self._augment, draws.at(places).to(device))
            yield pixels, targets[order[places]].to(device, non_blocking=True)

    def stored(self) -> tuple[Listed, Tensor | None]:
        """Return the listed pictures, and which of them belong to this part (``None``: all)."""
        return self._listed, self._rows

    def decoded(self, places: Tensor) -> Iterator[Tensor]:
        """Yield listed pictures in blocks, uint8 of shape ``(n, 3, height, width)``.

        Args:
            places: Which of the listed pictures, int64 of shape ``(n,)``.
        """
        return self._decoder.batches(self._listed.rows[places].split(BLOCK))  # type: ignore[no-untyped-call]

    def _rows_of_files(self, positions: Tensor) -> Tensor:
        return self._listed.rows[positions if self._rows is None else self._rows[positions]]

    def fits_memory(self) -> bool:
        """Whether the decoded pictures fit into memory, in each process of this machine."""
        return why_not_in_memory(len(self), self._decoder.size) is None

    def in_memory(self) -> TensorSplit:
        """Return the same pictures, decoded in memory.

        Raises:
            DataError: If pictures cannot be read; names the first few.
        """
        return TensorSplit(
            self._decoder.all(self._rows_of_files(torch.arange(len(self)))),
            self.targets,
            mean=self.mean,
            std=self.std,
            augmentation=self._augment,
        )

    def part(self, rows: Tensor) -> PictureSplit:
        """Return the pictures at some positions, int64 of shape ``(n,)``."""
        other = copy.copy(self)
        other.__dict__["_rows"] = rows_of_part(self._rows, rows)
        return other

    def take(self, n: int, seed: int = 0) -> PictureSplit:
        """Return ``n`` pictures drawn at random, or all if there are fewer."""
        check_count(n)
        return self if n >= len(self) else self.part(drawn_rows(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return a picture, uint8 of shape ``(height, width, 3)``."""
        place = torch.tensor([range(len(self))[index]])
        return as_picture(self._decoder.all(self._rows_of_files(place))[0])
