"""The divergence of one-stage detectors' raw outputs: class probabilities, boxes at objects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.core.measures import (
    Unchanged,
    classes_apart,
    drawn_class_loss,
    drawn_label_loss,
    labels_apart,
)

BOX = 4  # numbers that a box is made of
# The least number of objects an image that the divergence is divided by, for a detector that finds
# none on the examples.
FEWEST_OBJECTS = 0.1


@dataclass(frozen=True)
class RawDetections(Unchanged):
    """Class probabilities at every anchor, and boxes where the reference sees an object.

    A detector's outputs are joined along their last dimension: scores, boxes and, for FCOS, the
    centerness, each ``(n, anchors, …)``. The divergence is the Kullback-Leibler divergence of the
    class probabilities, summed over the anchors, plus the squared error of the boxes relative to
    their variance. A box is weighted by the reference's probability of an object there: boxes of
    the background are never used. The sum is divided by the mean number of objects in an image, the
    sum of these probabilities. Temperatures are ignored: at a higher one the many anchors of the
    background would outweigh the objects.

    Attributes:
        order: Name and size of each output, in the order in which they are joined: ``classes``,
            ``boxes``, ``quality``.
        exclusive: Whether the classes exclude each other, with the background as class 0 (SSD);
            else each has a probability of its own (RetinaNet, FCOS).
    """

    order: tuple[tuple[str, int], ...]
    exclusive: bool
    joins: bool = True
    decides: bool = False
    unit: str = "divergence of classes and boxes for each object, in nats"

    def fits(self, outputs: Tensor) -> bool:
        """Whether outputs are joined ones, ``(n, anchors, values)``."""
        return outputs.ndim == 3 and outputs.shape[2] == sum(size for _, size in self.order)

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return the mean number of objects an image, and the variance of each number of a box."""
        parts = self._parts(outputs.detach().double())
        weights = self._objectness(parts["classes"])
        objects = (weights.sum() / len(outputs)).clamp_min(FEWEST_OBJECTS)
        total = weights.sum().clamp_min(1e-12)
        mean = (weights[..., None] * parts["boxes"]).sum((0, 1)) / total
        apart = (parts["boxes"] - mean).square()
        variance = (weights[..., None] * apart).sum((0, 1)) / total
        return torch.cat([objects[None], torch.where(variance > 0, variance, 1.0)])

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the divergence of each example."""
        scale = scale.to(device=outputs.device, dtype=outputs.dtype)
        theirs, ours = self._parts(reference), self._parts(outputs)
        weights = self._objectness(theirs["classes"])
        total = self._classes_apart(theirs["classes"], ours["classes"]).sum(dim=1)
        if "quality" in ours:
            apart = labels_apart(theirs["quality"], ours["quality"]).sum(dim=2)
            total = total + (weights * apart).sum(dim=1)
        error = (ours["boxes"] - theirs["boxes"]).square() / scale[1:]
        total = total + (weights * error.mean(dim=2)).sum(dim=1)
        return total.clamp_min(0) / scale[0]

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the mean divergence; the temperature is ignored."""
        del temperature
        return self.apart(reference, outputs, scale).mean()

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random scalar whose gradient's covariance is the divergence's curvature."""
        parts = self._parts(outputs.float())
        scale = scale.to(device=outputs.device, dtype=torch.float32)
        weights = self._objectness(parts["classes"].detach())
        total = self._drawn_loss(parts["classes"], generator)
        if "quality" in parts:
            loss = drawn_label_loss(parts["quality"], generator)
            total = total + (weights.sqrt()[..., None] * loss).sum()
        signs = torch.randn(parts["boxes"].shape, generator=generator).to(outputs.device)
        each = parts["boxes"] * signs / scale[1:].sqrt() * weights.sqrt()[..., None]
        total = total + math.sqrt(2 / BOX) * each.sum()
        return total / scale[0].sqrt()

    def _drawn_loss(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        if not self.exclusive:
            return drawn_label_loss(classes, generator).sum()
        return drawn_class_loss(classes.reshape(-1, classes.shape[-1]), generator)

    def sensitivity(self, scores: Tensor) -> Tensor:
        """Return for each example how far a small change of its outputs moves the divergence."""
        classes = self._parts(scores.double())["classes"]
        if self.exclusive:
            chances = classes.softmax(dim=2)
            unsure = 1 - chances.square().sum(dim=2)
        else:
            chances = classes.sigmoid()
            unsure = (chances * (1 - chances)).sum(dim=2)
        return (unsure + self._objectness(classes)).sum(dim=1)

    def _classes_apart(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return the divergence of the classes at each anchor, ``(n, anchors)``."""
        if self.exclusive:
            return classes_apart(reference, outputs, dim=2)
        return labels_apart(reference, outputs).sum(dim=2)

    def _parts(self, outputs: Tensor) -> dict[str, Tensor]:
        names, sizes = zip(*self.order, strict=True)
        return dict(zip(names, torch.split(outputs, list(sizes), dim=2), strict=True))

    def _objectness(self, classes: Tensor) -> Tensor:
        """Return the probability of an object at each anchor, ``(n, anchors)``."""
        if self.exclusive:
            return 1 - classes.softmax(dim=2)[..., 0]
        return classes.sigmoid().amax(dim=2)
