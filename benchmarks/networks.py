"""Factories of the pretrained networks in the data directory, for benchmarks and tests.

Each works as ``benchmarks/networks.py:NAME`` on the command line and finds its weights in
``ONEBYONE_DATA`` (default: ``../shared/data`` when it exists).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
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


class ConvNormReLU(nn.Module):
    """Convolution, batch norm, ReLU; with ``relu_first`` a ReLU before them as well."""

    def __init__(
        self, in_channels: int, channels: int, size: int, *, relu_first: bool = False
    ) -> None:
        super().__init__()
        self.relu_first = relu_first
        self.conv = nn.Conv2d(in_channels, channels, size, padding=size // 2)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, channels, h, w)``."""
        x = self.relu(x) if self.relu_first else x
        return self.relu(self.bn(self.conv(x)))


class CifarNIN(nn.Module):
    """Network in Network with batch norm, as micronet trained it for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 192, 5, padding=2),
            nn.BatchNorm2d(192),
            ConvNormReLU(192, 160, 1, relu_first=True),
            ConvNormReLU(160, 96, 1),
            nn.MaxPool2d(3, 2, 1),
            ConvNormReLU(96, 192, 5),
            ConvNormReLU(192, 192, 1),
            ConvNormReLU(192, 192, 1),
            nn.AvgPool2d(3, 2, 1),
            ConvNormReLU(192, 192, 3),
            ConvNormReLU(192, 192, 1),
            nn.Conv2d(192, 10, 1),
            nn.BatchNorm2d(10),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, 32, 32)`` to scores ``(n, 10)``."""
        return self.net(x).flatten(1)


def cifar10_nin() -> nn.Module:
    """The pretrained NiN for CIFAR-10: 85.5 % on the 1,000 test images."""
    return _with_weights(CifarNIN(), "cifar10_nin", (3, 32, 32))


class DnCNN(nn.Module):
    """A denoiser that predicts the noise (Zhang et al. 2017, arXiv:1608.03981), norms merged."""

    def __init__(self, depth: int = 17, channels: int = 64) -> None:
        super().__init__()
        widths = [1, *[channels] * (depth - 1), 1]
        for place in range(depth):
            layer = nn.Conv2d(widths[place], widths[place + 1], 3, padding=1)
            self.add_module(f"conv{place}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map a noisy grey picture ``(n, 1, h, w)`` to a clean one."""
        *layers, last = self.children()
        noise = x
        for layer in layers:
            noise = F.relu(layer(noise))
        return x - last(noise)


def dncnn_sigma25() -> nn.Module:
    """The pretrained denoiser for noise of σ = 25/255: 30.43 dB on Set12."""
    return _with_weights(DnCNN(), "dncnn_sigma25", (1, 64, 64))


class Fire(nn.Module):
    """SqueezeNet's module (Iandola et al. 2016, arXiv:1602.07360)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, 2 * expanded, h, w)``."""
        x = F.relu(self.squeeze1x1(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 as Deep Compression's Caffe model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        sizes = {
            "fire2": (96, 16, 64), "fire3": (128, 16, 64), "fire4": (128, 32, 128),
            "fire5": (256, 32, 128), "fire6": (256, 48, 192), "fire7": (384, 48, 192),
            "fire8": (384, 64, 256), "fire9": (512, 64, 256),
        }  # fmt: skip
        for name, (in_channels, squeezed, expanded) in sizes.items():
            self.add_module(name, Fire(in_channels, squeezed, expanded))
        # As in the Caffe model: the border of scores is the bias alone.
        self.conv_final = nn.Conv2d(512, 1000, 1, padding=1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, 227, 227)`` to scores ``(n, 1000)``."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(self.fire4(self.fire3(self.fire2(x))))
        x = self.pool(self.fire8(self.fire7(self.fire6(self.fire5(x)))))
        return F.relu(self.conv_final(self.fire9(x))).mean((2, 3))


def imagenet_squeezenet1_0() -> nn.Module:
    """The pretrained SqueezeNet 1.0 (published: 57.5 % of ImageNet); 66 % of its weights are 0."""
    return _with_weights(SqueezeNet(), "imagenet_squeezenet1_0", (3, 227, 227))


class TinyDarknet(nn.Module):
    """Redmon's Tiny Darknet: 3×3 convolutions behind 1×1 bottlenecks."""

    def __init__(self) -> None:
        super().__init__()

        def block(in_channels: int, channels: int, size: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.1, inplace=True),
            )

        layers: list[nn.Module] = [block(3, 16, 3), nn.MaxPool2d(2, 2), block(16, 32, 3)]
        channels = 32
        for squeezed, wide in ((16, 128), (32, 256), (64, 512)):
            layers.append(nn.MaxPool2d(2, 2))
            for _ in range(2):
                layers += [block(channels, squeezed, 1), block(squeezed, wide, 3)]
                channels = wide
        layers += [block(512, 128, 1), nn.Conv2d(128, 1000, 1)]
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, 224, 224)`` to scores ``(n, 1000)``."""
        return self.features(x).mean((2, 3))


def imagenet_tiny_darknet() -> nn.Module:
    """The pretrained Tiny Darknet (published: 58.7 % of ImageNet)."""
    return _with_weights(TinyDarknet(), "imagenet_tiny_darknet", (3, 224, 224))


def cifar10_resnet18() -> nn.Module:
    """Torchvision's ResNet-18 for 32×32: its first layer 3×3, no pooling behind; random weights."""
    import torchvision

    network = torchvision.models.resnet18(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.input_shape = (3, 32, 32)
    return network


def cifar10_vgg16_bn() -> nn.Module:
    """The layers of torchvision's VGG-16 with batch norm, and one linear layer; random weights."""
    import torchvision

    features = torchvision.models.vgg16_bn(weights=None).features
    network = nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10))
    network.input_shape = (3, 32, 32)
    return network


def resnet18_low_rank() -> nn.Module:
    """Torchvision's ResNet-18 on small pictures, made larger, with kernels of planted low rank.

    Random weights; every 3×3 kernel but the first has a quarter of its channels as its rank on
    both sides, and 2 % of its norm of noise. Batch norms are settled on noise.
    """
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Upsample(size=112, mode="nearest"),
            torchvision.models.resnet18(weights=None, num_classes=10),
        )
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for layer in layers[1:]:
                if layer.kernel_size == (3, 3):
                    layer.weight.copy_(_low_rank(layer.weight))
            for norm in network.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.momentum = 1.0
            network.train()(torch.randn(64, 3, 32, 32))
    return network.eval()


def _low_rank(kernel: Tensor) -> Tensor:
    noise = torch.randn_like(kernel)
    planted = kernel
    for dim in (0, 1):
        vectors = torch.linalg.svd(planted.movedim(dim, 0).flatten(1), full_matrices=False).U
        kept = vectors[:, : kernel.shape[dim] // 4]
        planted = torch.tensordot(kept @ kept.T, planted, dims=([1], [dim])).movedim(0, dim)
    planted = planted * (kernel.norm() / planted.norm())
    return planted + 0.02 * planted.norm() / noise.norm() * noise
