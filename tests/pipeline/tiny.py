"""The smallest run that has all stages."""

import torch
from torch import nn

from onebyone.core.records import ModelSource
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.data import Data, TensorSplit
from onebyone.pipeline.shrink import shrink_loaded
from onebyone.pipeline.train import train_loaded

SOURCE = ModelSource(name="tiny", spec=None)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        ).eval()  # fmt: skip


def data(change=0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[-1] += change
    split = TensorSplit(images, torch.arange(64) % 4)
    return Data(name="d", train=split, validation=split, test=split, classes=tuple("abcd"))


def settings(out, **changes):
    asked = {"budget": "macs=60%", "epochs": 2, "reconstruct": 3, "calibration_examples": 32}
    asked |= {"learning_rate": 1e-3, "num_threads": 1} | changes
    return ShrinkSettings(out=out, **asked)


def shrink(out, *, net=None, examples=None, source=SOURCE, **changes):
    model, given = net or network(), examples or data()
    return shrink_loaded(model, source, given, settings(out, **changes))


def train(out, **changes):
    asked = {"epochs": 3, "num_threads": 1, **changes}
    return train_loaded(network(), SOURCE, data(), TrainRunSettings(out=out, **asked))


def content(folder):
    """Return every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_in(stage, after=0):
    """Return a progress that interrupts in a stage."""
    seen = 0

    def tell(done, total, message):
        nonlocal seen
        if message.startswith(stage):
            seen += 1
            if seen > after:
                raise KeyboardInterrupt

    return tell
