r"""A denoiser through the main line: Set12's PSNR at shares of DnCNN's MACs, without fine-tuning.

    python benchmarks/dncnn.py --budget 60% --budget 50%
    python benchmarks/dncnn.py --budget 50% --reconstruct 200

One budget by the command line, with this file's data and metric:

    onebyone shrink benchmarks/networks.py:dncnn_sigma25 --data benchmarks/dncnn.py:denoising \
        --metric benchmarks/dncnn.py:psnr --budget macs=60% --epochs 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onebyone.core.records import InputSpec
from onebyone.core.tables import Table
from onebyone.data import Data, TensorSplit
from onebyone.report.console import print_table

sys.path.insert(0, str(Path(__file__).parent))
from networks import data_directory, dncnn_sigma25
from one_shot import one_shot

SIGMA = 25 / 255
PATCH = 64
TRAIN, VALIDATION = 1024, 128


def psnr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each picture's peak signal-to-noise ratio in dB, for values from 0 to 1."""
    return -10 * (outputs - targets).square().flatten(1).mean(dim=1).log10()


class Pictures:
    """Whole noisy pictures of several sizes, each a batch of its own.

    Args:
        clean: Each of shape ``(1, height, width)``, from 0 to 1.
        seed: Of the noise.
    """

    # Of the calibration patches, at which costs are counted: these pictures are larger.
    inputs = InputSpec.of_shape((1, 1, PATCH, PATCH))
    targets = None
    augmentation = "none"

    def __init__(self, clean: list[Tensor], *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.clean = clean
        self.noisy = [x + SIGMA * torch.randn(x.shape, generator=generator) for x in clean]

    def __len__(self) -> int:
        return len(self.clean)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noisy pictures with the clean ones, one by one in order."""
        del batch_size, seed, augment, channels_last
        for noisy, clean in zip(self.noisy, self.clean, strict=True):
            yield noisy[None].to(device), clean[None].to(device)

    def take(self, n: int, seed: int = 0) -> Pictures:
        """Return the first ``n`` pictures."""
        del seed
        part = Pictures([])
        part.clean, part.noisy = self.clean[:n], self.noisy[:n]
        return part

    def image(self, index: int) -> np.ndarray:
        """Return a noisy picture, uint8 of shape ``(height, width, 3)``."""
        grey = (self.noisy[index][0].clamp(0, 1) * 255).round().to(torch.uint8)
        return grey[..., None].expand(-1, -1, 3).contiguous().numpy()


def pictures(folder: str) -> list[Tensor]:
    """Return the grey pictures of a folder of the data directory, in order of their names."""
    paths = sorted((data_directory() / "denoise" / folder).glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}: set ONEBYONE_DATA")
    grey = [np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255 for path in paths]
    return [torch.from_numpy(picture)[None] for picture in grey]


def denoising() -> Data:
    """Noisy patches of BSD34 to calibrate on; Set12's whole pictures to test on."""
    generator = torch.Generator().manual_seed(0)
    source = pictures("BSD34")
    # The last pictures are for validation: patches of one picture are alike.
    parts = [
        _patches(source[:-4], TRAIN, generator),
        _patches(source[-4:], VALIDATION, generator),
        Pictures(pictures("Set12")),
    ]
    return Data(name="BSD34 and Set12", train=parts[0], validation=parts[1], test=parts[2])


def _patches(source: list[Tensor], count: int, generator: torch.Generator) -> TensorSplit:
    clean = []
    for place in range(count):
        picture = source[place % len(source)]
        top, left = (
            int(torch.randint(size - PATCH + 1, (), generator=generator))
            for size in picture.shape[1:]
        )
        clean.append(picture[:, top : top + PATCH, left : left + PATCH])
    stacked = torch.stack(clean)
    return TensorSplit(stacked + SIGMA * torch.randn(stacked.shape, generator=generator), stacked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", action="append", metavar="SHARE", help="of the MACs (60%% 50%%)"
    )
    parser.add_argument("--calibration", type=int, default=256, metavar="N", help="patches (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the patches that are drawn (0)")
    parser.add_argument(
        "--reconstruct", type=int, default=0, metavar="STEPS",
        help="steps towards the original's outputs on all patches (0)",
    )  # fmt: skip
    args = parser.parse_args()
    found = one_shot(
        dncnn_sigma25(),
        denoising(),
        [f"macs={budget}" for budget in args.budget or ("60%", "50%")],
        examples=args.calibration,
        seed=args.seed,
        metric=psnr,
        steps=args.reconstruct,
    )
    rows = []
    for result in found:
        plan, change = result.plan, result.difference
        rows.append(
            [
                plan.budgets[0].asked.removeprefix("macs="),
                f"{100 * plan.after.macs / plan.before.macs:.1f}",
                f"{100 * plan.after.params / plan.before.params:.1f}",
                f"{result.before.scores.mean():.3f}",
                f"{result.after.scores.mean():.3f}",
                f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
                f"{result.seconds:.0f}",
                "–" if result.reconstruction is None else f"{result.reconstruction.seconds:.0f}",
            ]
        )
    print_table(
        Table(
            columns=(
                "asked", ">% MACs", ">% params", ">before, dB", ">after, dB", ">difference",
                ">seconds", ">reconstruction, s",
            ),
            rows=rows,
            title="DnCNN, noise of σ = 25/255, Set12, no labels",
            notes=[
                "Mean PSNR of 12 pictures, noise of seed 0; difference paired, 95 % interval.",
                (f"Fitted on {args.calibration} unlabelled {PATCH}×{PATCH} patches of BSD34 "
                f"(seed {args.seed}), then {args.reconstruct} steps of reconstruction on "
                f"{TRAIN:,}. Seconds: options, plan and weights."),
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
