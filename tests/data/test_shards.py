"""Pictures in WebDataset shards are the same examples as in files, in the same order."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from onebyone.core.errors import DataError
from onebyone.data import Shards, as_data, load_data, shard_index
from onebyone.data.hashing import hash_data
from onebyone.data.shards import shard_paths


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBYONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (18, 20 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def write(path: Path, members, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def samples(numbers, *, labelled=True):
    for number in numbers:
        # A name that is too long for a plain header; members beside pictures are left alone.
        key = f"some/{'deep/' * 30 if number % 5 == 0 else ''}{number:04}"
        yield f"{key}.PNG", png(number)
        if labelled:
            yield f"{key}.cls", f"{number % 3}\n".encode()
        yield f"{key}.seg.png", b"no picture"
        yield f"{key}.json", b"{}"


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(3):
        write(
            tmp_path / "set" / f"photos-{shard:03}.tar", samples(range(10 * shard, 10 * shard + 10))
        )
    return tmp_path / "set"


def pixels(split):
    return torch.cat([inputs for inputs, _ in split.batches(7)])


def test_shards_give_the_pictures_of_a_folder(shards, tmp_path):
    for number in range(30):
        path = tmp_path / "files" / str(number % 3) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    read = Shards(shards, v2.PILToTensor())
    assert len(read) == 30
    assert read.targets.tolist() == [number % 3 for number in range(30)]
    for number in (0, 14, 29, -1):
        assert read[number][0].shape == (3, 18, 20 + number % 30)
        assert torch.equal(
            read[number][0], v2.PILToTensor()(Image.open(io.BytesIO(png(number % 30))))
        )
    ours, theirs = (
        load_data(spec, image_size=16, limit=None)
        for spec in (f"shards:{shards}", f"imagefolder:{tmp_path / 'files'}")
    )
    assert ours.classes == theirs.classes == ("0", "1", "2")
    everything = [
        torch.cat([pixels(p) for p in (d.train, d.validation, d.test)]) for d in (ours, theirs)
    ]
    sums = [whole.flatten(1).double().sum(1).sort().values for whole in everything]
    assert torch.equal(*sums)


def test_workers_and_memory_give_the_same_batches(shards):
    spec = f"shards:{shards}/photos-{{000..002}}.tar"
    held, streamed = load_data(spec, image_size=16), load_data(spec, image_size=16, workers=2)
    how = {"seed": 5, "augment": True}
    for one, other in zip(
        held.train.batches(4, **how), streamed.train.batches(4, **how), strict=True
    ):
        assert all(map(torch.equal, one, other))
    assert hash_data(held) == hash_data(streamed)


def test_a_shard_is_indexed_once_until_it_changes(shards, cache, monkeypatch):
    indexed, original = [], shard_index._index
    monkeypatch.setattr(
        shard_index, "_index", lambda path: indexed.append(path.stem) or original(path)
    )
    first = hash_data(load_data(f"shards:{shards}", image_size=8))
    assert indexed == ["photos-000", "photos-001", "photos-002"]
    assert hash_data(load_data(f"shards:{shards}", image_size=8)) == first
    write(shards / "photos-001.tar", samples(range(40, 50)))
    assert hash_data(load_data(f"shards:{shards}", image_size=8)) != first
    for file in cache.iterdir():
        file.write_bytes(b"not ours")
    load_data(f"shards:{shards}", image_size=8)
    assert indexed[3:] == ["photos-001", "photos-000", "photos-001", "photos-002"]


def test_parts_are_told_by_names_or_folders(tmp_path):
    write(tmp_path / "a" / "in1k-train-00.tar", samples(range(9)))
    write(tmp_path / "a" / "in1k-validation-00.tar", samples(range(9, 15)))
    write(tmp_path / "b" / "train" / "0.tar", samples(range(9), labelled=False))
    write(tmp_path / "b" / "val" / "0.tar", samples(range(9, 12), labelled=False))
    write(tmp_path / "b" / "test" / "0.tar", samples(range(12, 14), labelled=False))
    first, second = (load_data(f"shards:{tmp_path / name}", image_size=8) for name in "ab")
    assert [len(part) for part in (first.train, first.validation, first.test)] == [8, 1, 6]
    assert [len(part) for part in (second.train, second.validation, second.test)] == [9, 3, 2]
    assert second.classes == ()
    assert second.test.targets is None
    # One part alone is divided.
    assert len(load_data(f"shards:{tmp_path}/b/train/0.tar", image_size=8).train) == 7
    write(tmp_path / "a" / "other.tar", samples(range(9)))
    with pytest.raises(DataError, match=r"must all belong to a part.*got .*other\.tar"):
        load_data(f"shards:{tmp_path / 'a'}", image_size=8)


def test_patterns_have_braces_and_stars(shards):
    names = [path.name for path in shard_paths(f"{shards}/photos-{{000..001}}.tar")]
    assert names == ["photos-000.tar", "photos-001.tar"]
    assert shard_paths(f"{shards}/photos-{{001,000}}.tar")[0].name == "photos-001.tar"
    assert shard_paths(f"{shards}/*-00[12].tar") == shard_paths(str(shards))[1:]


def test_transforms_of_ones_own_are_the_same_in_workers(shards):
    how = v2.Compose(
        [
            v2.RandomResizedCrop(8),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.2] * 3),
        ]
    )
    read = Shards(shards, how)
    assert len(pickle.loads(pickle.dumps(read))) == 30
    alone, worked = as_data(read), as_data(DataLoader(read, num_workers=1, batch_size=4))
    assert alone.classes == ("0", "1", "2")
    assert torch.bincount(alone.test.targets).tolist() == [1, 1, 1]
    for augment in (False, True):
        parts = [data.train.batches(9, seed=2, augment=augment) for data in (alone, worked)]
        for one, other in zip(*parts, strict=True):
            assert type(one[0]) is torch.Tensor
            assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"")], r"1 in .*x\.tar has none"),
        ([("1.png", b""), ("1.jpg", b"")], r"1 in .*x\.tar has several"),
        ([("1.png", b""), ("1.cls", b"cat")], r"1\.cls in .*x\.tar holds b'cat'"),
        ([("1.png", b""), ("1.cls", b"9" * 50)], "from 0 to 999,999"),
        ([("1.png", b""), ("1.cls", b"1"), ("2.png", b"")], "1 of 2 have none"),
        ([(".hidden.png", b""), ("__meta__.json", b"")], "must hold pictures, and has none"),
    ],
)
def test_samples_that_are_unfit_are_named(tmp_path, members, message):
    write(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        load_data(f"shards:{tmp_path}")


def test_files_that_are_no_shards_are_refused(shards, tmp_path):
    for pattern in ("http://x.org/a.tar", "pipe:cat a.tar"):
        with pytest.raises(DataError, match="must be files on this machine"):
            Shards(pattern)
    with pytest.raises(DataError, match="No shard matches"):
        Shards(f"{shards}/x*.tar")
    with pytest.raises(DataError, match=r"photos-003\.tar does not exist"):
        Shards(f"{shards}/photos-{{000..003}}.tar")
    with pytest.raises(DataError, match="A range of shards must go up"):
        Shards(f"{shards}/photos-{{003..000}}.tar")
    write_packed = tarfile.open(tmp_path / "packed.tar", "w:gz")  # noqa: SIM115
    write_packed.close()
    whole = (shards / "photos-000.tar").read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("packed", "half"):
        with pytest.raises(DataError, match="must be a whole, uncompressed tar file"):
            Shards(tmp_path / f"{name}.tar")


def test_a_broken_picture_is_named_with_its_shard(tmp_path):
    members = [(f"{n}.png", b"<html>" if n == 2 else png(n)) for n in range(9)]
    write(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"The picture 2\.png in .*x\.tar is not a picture in a"):
        load_data(f"shards:{tmp_path}", image_size=8)
    read = Shards(tmp_path, v2.PILToTensor())
    with (tmp_path / "x.tar").open("r+b") as file:
        file.truncate(512)
    with pytest.raises(DataError, match="became shorter while it was used"):
        read[8]


# WebDataset does not close the files that it reads.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_of_webdataset_are_read_as_it_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(6):
            sink.write(
                {"__key__": f"x{number}", "png": Image.open(io.BytesIO(png(number))), "cls": number}
            )
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil")
    ours = Shards(tmp_path / "a.tar")
    assert len(ours) == 6
    for (picture, label), item in zip((ours[n] for n in range(6)), theirs, strict=True):
        assert np.array_equal(picture, item["png"])
        assert label == item["cls"]
