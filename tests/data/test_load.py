import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from onebyone.data import NAMED, folders, load_data
from onebyone.data import named as named_module
from onebyone.data.named import data_directory
from onebyone.errors import DataError, OneByOneError, OptionError, UnknownNameError


def rows(part) -> set[int]:
    return set(part._rows.tolist())


def picture(path: Path, value: int = 100, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 0)).save(path)


def class_folders(
    folder: Path, per_class: int = 10, names: tuple[str, ...] = ("cat", "dog")
) -> Path:
    for label, name in enumerate(names):
        for index in range(per_class):
            picture(folder / name / f"{index}.png", 50 + 100 * label)
    return folder


# ---------------------------------------------------------------- named


def test_digits_are_embedded_divided_and_balanced():
    data = load_data("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 200, 397)
    assert data.input_shape == (1, 28, 28)
    assert torch.bincount(data.test.targets).min() >= 38
    assert not rows(data.train) & rows(data.validation)


def test_the_seed_moves_the_validation_part_and_never_the_test_part():
    first, second = load_data("digits"), load_data("digits", seed=1)
    assert rows(first.validation) != rows(second.validation)
    assert torch.equal(first.test._inputs, second.test._inputs)
    assert rows(load_data("digits", seed=1).validation) == rows(second.validation)


def test_limit_and_image_size_are_obeyed():
    data = load_data("digits", limit=50, image_size=14)
    assert data.input_shape == (1, 14, 14)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 50, 50)
    with pytest.raises(OptionError, match="`limit` must be at least 1, got 0"):
        load_data("digits", limit=0)


def test_only_training_images_are_augmented():
    data = load_data("digits")
    assert data.train.augmentation == "shift 2 px (black)"
    assert data.validation.augmentation == data.test.augmentation == "none"


@pytest.mark.parametrize("spec", ["fashionmnist", "cifar-10", "imagefolder"])
def test_a_typing_error_is_answered_with_what_there_is(spec):
    with pytest.raises(UnknownNameError, match=r"No data set named .*Did you mean .*Available: "):
        load_data(spec)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
@pytest.mark.slow
def test_published_data_matches_its_statistics(name):
    try:
        data = load_data(name)
    except DataError as error:
        pytest.skip(f"{name} is not on this machine: {error}")
    assert len(data.validation) == 5000
    assert not rows(data.train) & rows(data.validation)
    inputs = torch.cat([batch for batch, _ in data.train.take(5000, 0).batches(1000)])
    assert inputs.mean().abs() < 0.03
    assert abs(inputs.std() - 1) < 0.03
    assert torch.bincount(data.validation.targets).min() > 400


def test_fashion_mnist_reads_from_the_data_directory(fashion_mnist):
    data = load_data(fashion_mnist, limit=100)
    assert data.classes[9] == "ankle boot"
    assert data.train.image(0).shape == (28, 28, 3)
    assert len(data.test) == 100


def idx(path: Path, values: np.ndarray, *, packed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = head + values.astype(np.uint8).tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def downloads(tmp_path, monkeypatch, *, ends: bool):
    """Pretend to download MNIST into an empty cache; the test part fails unless it ends."""

    class Published:
        def __init__(self, root, *, train, download):
            assert download
            raw = Path(root) / "MNIST" / "raw"
            prefix, n = ("train", 5010) if train else ("t10k", 20)
            idx(raw / f"{prefix}-images-idx3-ubyte", np.zeros((n, 28, 28)), packed=train)
            if not train and not ends:
                raise RuntimeError("connection lost")
            idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10, packed=train)

    monkeypatch.delenv("ONEBYONE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "MNIST", Published)
    return tmp_path / "cache" / "onebyone" / "data"


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    root = downloads(tmp_path, monkeypatch, ends=False)
    with pytest.raises(DataError, match=r"MNIST could not be downloaded .*connection lost"):
        load_data("mnist")
    assert list(root.iterdir()) == []


def test_a_download_fills_a_folder_that_one_before_had_left_empty(tmp_path, monkeypatch):
    root = downloads(tmp_path, monkeypatch, ends=True)
    (root / "MNIST" / "raw").mkdir(parents=True)
    assert len(load_data("mnist").test) == 20
    assert [path.name for path in root.iterdir()] == ["MNIST"]


@pytest.mark.parametrize(("folder", "packed"), [("mnist", True), ("MNIST/raw", False)])
def test_both_layouts_of_idx_files_are_read(tmp_path, monkeypatch, folder, packed):
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path))
    for prefix, n in (("train", 5010), ("t10k", 20)):
        images = np.arange(n)[:, None, None] * np.ones((28, 28)) % 256
        idx(tmp_path / folder / f"{prefix}-images-idx3-ubyte", images, packed=packed)
        idx(tmp_path / folder / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10, packed=packed)
    data = load_data("mnist")
    assert (len(data.train), len(data.test)) == (10, 20)
    assert data.test.targets.tolist() == [n % 10 for n in range(20)]
    assert data.test.image(7)[3, 3].tolist() == [7, 7, 7]


def test_a_broken_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08"))
    with pytest.raises(DataError, match=r"Cannot read .*train-images-idx3-ubyte\.gz"):
        load_data("mnist")
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"PNG!"))
    with pytest.raises(DataError, match="not an idx file"):
        load_data("mnist")


def test_half_a_data_set_is_to_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(DataError, match=r"Cannot read CIFAR-10 in .*Delete that folder"):
        load_data("cifar10")


def test_missing_files_are_said_with_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path))
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataError, match=f"must lie in .*{tmp_path.name}"):
            load_data(name)


def test_a_failed_download_gives_advice(tmp_path, monkeypatch):
    import torchvision

    def offline(*args, **options):
        raise RuntimeError("no route to host")

    monkeypatch.delenv("ONEBYONE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host.*connection"):
        load_data("mnist")


def test_the_data_directory_is_the_environments_then_the_checkouts_then_the_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path))
    assert data_directory() == (tmp_path, False)
    monkeypatch.setenv("ONEBYONE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="must name a folder"):
        data_directory()
    monkeypatch.delenv("ONEBYONE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert data_directory() == (tmp_path / "cache" / "onebyone" / "data", True)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_directory() == (tmp_path / "shared" / "data", False)


def test_every_named_set_describes_itself():
    for entry in NAMED.values():
        assert entry.title
        assert len(entry.mean) == len(entry.std)
    assert named_module.resized(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 8).shape == (2, 1, 8, 8)


# ---------------------------------------------------------------- image folders


def test_one_folder_is_divided_by_class(tmp_path):
    data = load_data(f"imagefolder:{class_folders(tmp_path)}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 8, 8)
    assert sorted(data.test.targets.tolist()) == [0, 1]
    assert data.test.image(0)[0, 0].tolist()[0] == [50, 150][int(data.test.targets[0])]
    assert data.name == tmp_path.name


def test_given_parts_are_kept(tmp_path):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        class_folders(tmp_path / part, count)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 6)


def test_without_a_test_folder_val_is_the_test_part(tmp_path):
    class_folders(tmp_path / "train", 10)
    class_folders(tmp_path / "val", 3)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)


def test_pictures_without_classes_have_no_labels(tmp_path):
    for index in range(20):
        picture(tmp_path / f"{index}.png", 10 * index)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    assert data.classes == ()
    assert all(part.targets is None for part in (data.train, data.validation, data.test))
    _, targets = next(iter(data.test.batches(2)))
    assert targets.shape == (2, 0)
    for part in ("train", "val"):
        for index in range(6):
            picture(tmp_path / "parts" / part / f"{index}.png", index)
    data = load_data(f"imagefolder:{tmp_path / 'parts'}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 1, 6)
    class_folders(tmp_path / "mixed" / "train", 3)
    picture(tmp_path / "mixed" / "val" / "1.png", 5)
    with pytest.raises(DataError, match="val must hold a folder of pictures for each class, as"):
        load_data(f"imagefolder:{tmp_path / 'mixed'}", image_size=8)


def test_a_limit_spares_decoding(tmp_path, monkeypatch):
    class_folders(tmp_path)
    read = []
    original = folders._read_picture
    monkeypatch.setattr(
        folders, "_read_picture", lambda path, size: read.append(path) or original(path, size)
    )
    load_data(f"imagefolder:{tmp_path}", image_size=8, limit=3)
    assert len(read) == 3 + 2 + 2


def test_pictures_of_any_mode_become_rgb_crops_of_the_center(tmp_path):
    class_folders(tmp_path)
    Image.new("L", (9, 40), 77).save(tmp_path / "cat" / "grey.png")
    palette = Image.new("P", (12, 12), 1)
    palette.info["transparency"] = b"\x00\x10"
    palette.save(tmp_path / "dog" / "palette.png")
    wide = Image.new("RGB", (60, 8), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 8))
    wide.save(tmp_path / "cat" / "wide.bmp")
    pixels = folders._read_picture(tmp_path / "cat" / "wide.bmp", 7)
    assert pixels.shape == (7, 7, 3)
    assert (pixels == [0, 0, 255]).all()
    assert (folders._read_picture(tmp_path / "cat" / "grey.png", 8) == 77).all()
    assert folders._read_picture(tmp_path / "dog" / "palette.png", 8).shape == (8, 8, 3)


def test_unfit_folders_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"must be a folder, got .*nowhere"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="without labels, and has neither"):
        load_data(f"imagefolder:{tmp_path}")
    class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty must hold pictures"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty").rmdir()
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    (tmp_path / "cat" / "broken.jpg").unlink()
    monkeypatch.setattr(folders, "free_bytes", lambda: 1_000_000)
    with pytest.raises(DataError, match=r"20 pictures of 224×224 need 3\.01 MB .* 1\.00 MB"):
        load_data(f"imagefolder:{tmp_path}")


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    class_folders(tmp_path / "train")
    with pytest.raises(DataError, match="neither `val` nor `test`"):
        load_data(f"imagefolder:{tmp_path}")
    class_folders(tmp_path / "test", names=("cat", "horse"))
    with pytest.raises(DataError, match="must be among those to train on, got horse"):
        load_data(f"imagefolder:{tmp_path}")


# ---------------------------------------------------------------- a user's file

FILE = """
import torch
from helper_of_test import N

def pair():
    return torch.rand(N, 3), torch.arange(N) % 2

def two():
    return pair(), pair()

def broken():
    raise ValueError("no such sensor")

def nothing():
    return None
"""


@pytest.fixture
def user_file(tmp_path) -> Path:
    (tmp_path / "helper_of_test.py").write_text("N = 20\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_of_a_file_gives_data(user_file):
    assert len(load_data(f"{user_file}:pair").train) == 16
    data = load_data(f"{user_file}:two", limit=5)
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 2, 5)
    assert data.name == "mine.py:two"


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("pairs", UnknownNameError, "No function in .*Did you mean 'pair'"),
        ("", UnknownNameError, "Available: broken, nothing, pair, two"),
        ("broken", DataError, "failed with ValueError: no such sensor"),
        ("nothing", DataError, "got a NoneType"),
    ],
)
def test_an_unfit_function_is_refused(user_file, function, kind, message):
    with pytest.raises(kind, match=message):
        load_data(f"{user_file}:{function}")


def test_an_unfit_file_is_refused(tmp_path, user_file):
    with pytest.raises(DataError, match="must exist, and does not"):
        load_data(f"{tmp_path}/none.py:make")
    (tmp_path / "bad.py").write_text("import nowhere_at_all\n")
    with pytest.raises(DataError, match="cannot be imported: ModuleNotFoundError"):
        load_data(f"{tmp_path}/bad.py:make")
    with pytest.raises(OptionError, match="`image_size` must be left out"):
        load_data(f"{user_file}:pair", image_size=8)
    with pytest.raises(OneByOneError):
        load_data(":")
