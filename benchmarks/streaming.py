"""Images a second of streamed pictures, beside a plain torch DataLoader with as many workers.

Run with ``python benchmarks/streaming.py``. It writes photographs of noise to a temporary folder,
as files, as shards and, if ``datasets`` is installed, as a data set of Hugging Face. All sides
scale them to 256, crop 224×224, flip, normalize and shuffle. Rounds are interleaved, so that other
programs disturb all sides alike: each line is the median with its quartiles, of images a second and
of the ratio to the plain loop. Files are in the page cache: this measures decoding, not the disk.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from onebyone.data import Split, as_split, load_data

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write photographs of smooth noise, of which a JPEG is as large as of a real one."""
    random, (width, height) = np.random.default_rng(0), size
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + random.normal(0, 12, (height, width, 3))
        path = folder / f"class{index % 10}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def write_shards(pictures: Path, folder: Path) -> Path:
    folder.mkdir()
    files = sorted(pictures.rglob("*.jpg"), key=lambda path: path.stem)
    for start in range(0, len(files), 256):
        with tarfile.open(folder / f"photos-{start // 256:04}.tar", "w") as shard:
            for file in files[start : start + 256]:
                label = tarfile.TarInfo(f"{file.stem}.cls")
                label.size = 1
                shard.add(file, file.name)
                shard.addfile(label, io.BytesIO(file.parent.name[-1].encode()))
    return folder


def write_table(pictures: Path, folder: Path) -> Path | None:
    # A file beside this one has the same name.
    sys.path = [place for place in sys.path if Path(place) != Path(__file__).parent]
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bar()
    cache = str(folder.with_name("cache"))
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(pictures), split="train", cache_dir=cache
    )
    table.save_to_disk(str(folder))
    return folder


def plain(pictures: Path, workers: int) -> DataLoader:
    """Return what most training scripts do."""
    steps = [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    items = ImageFolder(str(pictures), transforms.Compose(steps))
    return DataLoader(items, batch_size=BATCH, shuffle=True, num_workers=workers)


def passed(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


def of_split(split: Split) -> Callable[[], None]:
    return lambda: passed(split.batches(BATCH, seed=0, augment=True))


def seconds_of(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} [{low:{form}}–{high:{form}}]"


def sides_of(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    pictures = write_pictures(folder / "photos", args.pictures, tuple(args.size))
    loader = plain(pictures, args.workers)
    sides = {"DataLoader": lambda: passed(iter(loader))}
    sources = {"imagefolder": pictures, "shards": write_shards(pictures, folder / "shards")}
    table = write_table(pictures, folder / "table")
    if table is not None:
        sources["hf"] = table
    for kind, place in sources.items():
        sides[f"{kind}:"] = of_split(load_data(f"{kind}:{place}", workers=args.workers).train)
    # The user's own transforms, in the processes of a DataLoader.
    sides["imagefolder, own transform"] = of_split(as_split(loader))
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONEBYONE_CACHE"] = str(Path(folder) / "cache")
        sides = sides_of(Path(folder), args)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.rounds + 1):
            for name, side in sides.items():
                # A training part holds eight tenths of the pictures.
                share = 0.8 if name.endswith(":") else 1.0
                rate = share * args.pictures / seconds_of(side)
                if turn:
                    rates[name].append(rate)
    print(f"{args.pictures} JPEGs of {args.size[0]}×{args.size[1]}, {args.workers} workers")
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["DataLoader"], strict=True)]
        print(f"{name:28} {spread(found, '7.0f')} images/s   {spread(ratios, '.2f')} × plain")


if __name__ == "__main__":
    main()
