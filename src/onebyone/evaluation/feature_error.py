"""Error of a module's outputs against those of the same module in the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onebyone.core.errors import ModelError
from onebyone.core.measures import LEAST_VARIANCE
from onebyone.core.precision import in_full


def feature_error(ours: Tensor, theirs: Tensor, name: str) -> Tensor:
    """Return a module's mean squared error divided by the variance of the teacher's outputs.

    Dividing by the mean square instead would let a large mean hide the error.

    Args:
        ours: The module's outputs in the student.
        theirs: The module's outputs in the teacher, of the same shape.
        name: The module's name, for the error message.

    Raises:
        ModelError: If the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ModelError(
            f"The outputs of {name!r} must be of one shape in the network and its teacher, got "
            f"{tuple(ours.shape)} and {tuple(theirs.shape)}. Leave it out of `features`."
        )
    # Scale by the largest value: squares of small numbers underflow in float32.
    wanted, given = in_full(theirs), in_full(ours)
    largest = wanted.detach().abs().amax()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    wanted = wanted / unit
    least = LEAST_VARIANCE * wanted.square().mean()
    variance = torch.maximum(wanted.var(), least)
    return F.mse_loss(given / unit, wanted) / torch.where(variance > 0, variance, 1.0)
