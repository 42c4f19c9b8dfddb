"""The detector of ``detector.py``, and its training on generated scenes."""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

sys.path.insert(0, str(Path(__file__).parent))
from scenes import CLASSES, Backgrounds, scenes

SIDE = 96
BATCH = 16
RATE = 2e-3  # the highest learning rate of AdamW
WARM_UP = 360  # steps
DECAY = 0.02
KEPT_EVERY = 100  # steps
MEAN, STD = (0.485, 0.456, 0.406), (0.25, 0.25, 0.25)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a 3×3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to the same shape."""
        return torch.relu(x + self.norm(self.second(self.first(x))))


class Backbone(nn.Module):
    """Features at an eighth, a sixteenth and a 32nd of the picture's side."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        first, *rest = widths
        self.out_channels = rest
        self.stem = nn.Sequential(conv(3, 24, 2), conv(24, first, 2), Block(first))
        self.eighth = nn.Sequential(conv(first, rest[0], 2), Block(rest[0]), Block(rest[0]))
        self.sixteenth = nn.Sequential(conv(rest[0], rest[1], 2), Block(rest[1]), Block(rest[1]))
        self.last = nn.Sequential(conv(rest[1], rest[2], 2), Block(rest[2]))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return three maps by name, from the largest to the smallest."""
        eighth = self.eighth(self.stem(x))
        sixteenth = self.sixteenth(eighth)
        return OrderedDict([("0", eighth), ("1", sixteenth), ("2", self.last(sixteenth))])


def make(side: int = SIDE) -> SSD:
    """Return an untrained detector: torchvision's SSD on a small residual backbone."""
    backbone = Backbone()
    boxes = DefaultBoxGenerator([[2]] * 3, scales=[0.12, 0.22, 0.36, 0.5])
    return SSD(
        backbone, boxes, (side, side), len(CLASSES) + 1,
        image_mean=list(MEAN), image_std=list(STD), detections_per_img=100,
    )  # fmt: skip


def as_targets(boxes: Tensor) -> list[dict[str, Tensor]]:
    """Return padded boxes with classes as torchvision's detectors learn from them."""
    real = [each[each[:, 4] >= 0] for each in boxes]
    return [{"boxes": each[:, :4], "labels": each[:, 4].long()} for each in real]


def rate_of(step: int, steps: int) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to 0."""
    warm = min(WARM_UP, steps // 3)
    if step < warm:
        return RATE * (step + 1) / warm
    return RATE / 2 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def trained(file: Path, *, steps: int, seed: int = 0) -> SSD:
    """Return the detector, trained on new scenes in each step; goes on where it stopped.

    Args:
        file: Where its weights are kept, and what a training needs to go on.
        steps: Of ``BATCH`` scenes each.
        seed: Of the weights and the scenes.
    """
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    start, seconds = 0, 0.0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["model"])
        if kept["steps"] == steps == kept["done"]:
            return model.eval()
        if kept["steps"] != steps:
            raise SystemExit(f"{file} was trained for {kept['steps']} steps: delete it first")
        optimizer.load_state_dict(kept["optimizer"])
        start, seconds = kept["done"], kept["seconds"]
    backgrounds = Backgrounds()
    model.train()
    began, recent = time.process_time() - seconds, 0.0
    for step in range(start, steps):
        part = scenes(BATCH, side=SIDE, backgrounds=backgrounds, seed=seed, start=step * BATCH)
        losses = model(list(part.images.float() / 255), as_targets(part.boxes))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, steps)
        optimizer.step()
        recent = 0.95 * recent + 0.05 * float(loss.detach())
        if (step + 1) % KEPT_EVERY == 0 or step + 1 == steps:
            seconds = time.process_time() - began
            kept = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "done": step + 1, "steps": steps, "seconds": seconds,
            }  # fmt: skip
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            print(f"step {step + 1} of {steps}: loss {recent:.3f}, {seconds:.0f} CPU s", flush=True)
    return model.eval()
