"""Training: train a copy of a network on labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from onebyone.core.precision import float32_in
from onebyone.core.settings.signature import takes
from onebyone.core.settings.training import TrainSettings
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data
from onebyone.networks.surgery import as_network
from onebyone.training.job import (
    LoopSettings,
    Trained,
    examples_of,
    meaning_to_learn,
    prepare,
)
from onebyone.training.loop import fit
from onebyone.training.losses import check_classes, label_loss

TRAIN_RATE = 4e-3  # at a batch of 128; see `prepare`


@takes(TrainSettings)
@ordinary_torch()
@float32_in("float32")
def train(model: nn.Module, data: Data | Any, settings: TrainSettings) -> Trained:
    """Train a copy of a network on labelled data.

    The optimizer is AdamW, with gradients clipped to norm 1. The learning rate rises over the first
    tenth of the steps, then follows a cosine down to 0. The last fifth of the epochs, at most five,
    goes without augmentation. The weights after the last epoch are returned: choosing an epoch by
    its validation score would bias that score. The global random state is not changed.

    Args:
        model: The network, with float32 weights. Not modified. Parameters that need no gradient
            keep their values. If the network is in training mode, its modules in evaluation mode
            stay in it. If it is in evaluation mode, only batch norms whose parameters are all
            frozen stay in it.
        data: A :class:`Data`, scored on its validation part after each epoch; or what
            :func:`onebyone.data.as_split` takes, not scored.
        settings: The fields of :class:`TrainSettings`, by keyword.

    Returns:
        The trained copy, in evaluation mode, on the device of ``model``, and the log.

    Raises:
        OptionError: If an option has an invalid value, the network has nothing to train, or the
            checkpoint was made with other settings.
        DataError: If the data is empty, has no targets, or targets of the wrong shape.
        ModelError: If the network cannot be copied or run, or the loss becomes infinite or NaN.
        RecordError: If the checkpoint cannot be read.
        OutputError: If the checkpoint cannot be written.

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. For the end without
        augmentation, He et al., "Data Augmentation Revisited", 2019, arXiv:1909.09148.
    """
    model = as_network(model)
    examples = examples_of(data)
    meaning = meaning_to_learn(
        model, data, examples, settings.task, settings.ignore_index,
        learns=True, device=settings.device,
    )  # fmt: skip
    rate, smoothing, loss = settings.learning_rate, settings.label_smoothing, settings.loss
    options = LoopSettings.of(settings, examples, ends_plain=True, learning_rate=rate)

    def objective(_: Inputs, outputs: Tensor, targets: Tensor) -> Tensor:
        return label_loss(outputs, targets, meaning, loss=loss, label_smoothing=smoothing)

    name = "own loss" if loss is not None else "labels"
    if smoothing:
        name += f", smoothed by {smoothing:g}"
    job = prepare(
        model, examples, options, default_rate=TRAIN_RATE, name=name, device=settings.device,
        meaning=meaning,
    )  # fmt: skip
    if loss is None:
        check_classes(job)
    return fit(job, objective)
