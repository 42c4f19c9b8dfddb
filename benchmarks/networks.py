"""Factories of the pretrained networks in the data directory, for benchmarks and tests.

Each works as ``benchmarks/networks.py:NAME`` on the command line and finds its weights in
``ONEBYONE_DATA`` (default: ``../shared/data`` when it exists).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def data_directory() -> Path:
    """Return where data and weights are looked for."""
    return Path(os.environ.get("ONEBYONE_DATA", "../shared/data"))


def _with_weights(network: nn.Module, name: str, input_shape: tuple[int, ...]) -> nn.Module:
    path = data_directory() / "weights" / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: set ONEBYONE_DATA to the data directory")
    network.load_state_dict(load_file(path))
    network.input_shape = input_shape
    return network.eval()


class PadShortcut(nn.Module):
    """He et al.'s shortcut A: every second place, and zero channels on either side."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, c, h, w)`` to ``(n, c + 2 * added, h / 2, w / 2)``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2015, section 4.2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = PadShortcut(channels // 4) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, c, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network for 32×32 images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, 32, 32)`` to scores ``(n, 10)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> nn.Module:
    """The pretrained ResNet-20 for CIFAR-10: 91.5 % on the 1,000 test images."""
    return _with_weights(CifarResNet(3), "cifar10_resnet20", (3, 32, 32))


def resnet32() -> nn.Module:
    """The pretrained ResNet-32 for CIFAR-10: 92.8 % on the 1,000 test images."""
    return _with_weights(CifarResNet(5), "cifar10_resnet32", (3, 32, 32))
