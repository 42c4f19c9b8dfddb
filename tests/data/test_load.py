import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from onebyone.core.data_names import DATA_NAMES
from onebyone.core.errors import DataError, OneByOneError, OptionError, UnknownNameError
from onebyone.core.records import InputSpec
from onebyone.data import NAMED, folders, load_data, pictures
from onebyone.data import named as named_module
from onebyone.data.named import data_directory


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
    assert data.inputs == InputSpec.of_shape((1, 1, 28, 28))
    assert torch.bincount(data.test.targets).min() >= 38
    assert not rows(data.train) & rows(data.validation)


def test_the_seed_moves_the_validation_part_and_never_the_test_part():
    first, second = load_data("digits"), load_data("digits", seed=1)
    assert rows(first.validation) != rows(second.validation)
    assert torch.equal(first.test._inputs, second.test._inputs)
    assert rows(load_data("digits", seed=1).validation) == rows(second.validation)


def test_limit_and_image_size_are_obeyed():
    data = load_data("digits", limit=50, image_size=14)
    assert data.inputs == InputSpec.of_shape((1, 1, 14, 14))
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 50, 50)
    with pytest.raises(OptionError, match="`limit` must be 1 or more, got 0"):
        load_data("digits", limit=0)


def test_images_that_would_not_fit_into_memory_are_refused_before_they_are_scaled():
    with pytest.raises(DataError, match=r"1,797 pictures of 16000×16000 need 460 GB"):
        load_data("digits", image_size=16_000)


def test_scaled_images_are_the_same_under_a_limit():
    whole, few = load_data("digits", image_size=12), load_data("digits", image_size=12, limit=50)
    rows = torch.cat([inputs for inputs, _ in whole.train.batches(2000)])
    chosen = torch.cat([inputs for inputs, _ in few.train.batches(2000)])
    assert all((rows == one).flatten(1).all(1).any() for one in chosen)
    assert str(few.validation.augmentation) == "none"


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
    assert tuple(NAMED) == DATA_NAMES
    for entry in NAMED.values():
        assert entry.title
        assert len(entry.mean) == len(entry.std)
    assert named_module.resized(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 8).shape == (2, 1, 8, 8)


# ---------------------------------------------------------------- image folders


def test_one_folder_is_divided_by_class(tmp_path):
    data = load_data(f"imagefolder:{class_folders(tmp_path)}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    assert data.classes == ("cat", "dog")
    assert data.inputs == InputSpec.of_shape((1, 3, 8, 8))
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
    original = pictures._opened
    monkeypatch.setattr(
        pictures, "_opened", lambda path, size: read.append(path) or original(path, size)
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
    read = np.zeros((3, 7, 7, 3), np.uint8)
    files = ("cat/wide.bmp", "cat/grey.png", "dog/palette.png")
    listed = pictures.FilePictures([tmp_path / file for file in files])
    pictures.read_pictures(listed, range(3), (7, 7), crop=7 / 8, into=read)
    assert (read[0] == [0, 0, 255]).all()
    assert (read[1] == 77).all()


def test_unfit_folders_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"must be a folder with pictures, but .*nowhere does not"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="without labels, and has neither"):
        load_data(f"imagefolder:{tmp_path}")
    class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty must hold pictures"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty").rmdir()
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg is not a picture in a supported format"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    (tmp_path / "cat" / "broken.jpg").unlink()


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    class_folders(tmp_path / "train")
    with pytest.raises(DataError, match="neither `val` nor `test`"):
        load_data(f"imagefolder:{tmp_path}")
    class_folders(tmp_path / "test", names=("cat", "horse"))
    with pytest.raises(DataError, match="must be among those to train on, got horse"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_link_to_a_folder_is_read_once_and_a_loop_ends(tmp_path):
    class_folders(tmp_path / "data", 10)
    for index in range(6):
        picture(tmp_path / "elsewhere" / "deep" / f"more{index}.png", 10)
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "bird").symlink_to(tmp_path / "elsewhere")
    data = load_data(f"imagefolder:{tmp_path / 'data'}", image_size=8)
    assert data.classes == ("bird", "cat", "dog")
    assert len(data.train) + len(data.validation) + len(data.test) == 16 + 16 + 10


def test_what_is_hidden_or_no_picture_is_left_alone(tmp_path):
    class_folders(tmp_path, 10)
    (tmp_path / ".cache").mkdir()
    picture(tmp_path / "cat" / ".hidden" / "x.png")
    picture(tmp_path / "cat" / ".x.png")
    (tmp_path / "labels.csv").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert len(data.train) + len(data.validation) + len(data.test) == 20


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, 5, names=("bus", "train"))
    assert load_data(f"imagefolder:{tmp_path}", image_size=8).classes == ("bus", "train")
    class_folders(tmp_path / "train", 5)
    with pytest.raises(DataError, match="If 'train' is a class beside 'bus', it must hold pict"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_parts_may_be_written_in_capitals_and_are_never_taken_for_classes(tmp_path):
    for part in ("Train", "Testing"):
        class_folders(tmp_path / part, 5)
    assert load_data(f"imagefolder:{tmp_path}", image_size=8).classes == ("cat", "dog")
    class_folders(tmp_path / "test", 5)
    with pytest.raises(DataError, match=r"one folder for each part, and has '[Tt]est"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    for part in ("val", "test"):
        class_folders(tmp_path / "imagenet" / part, 5)
    with pytest.raises(DataError, match=r"has 'test' but no `train`.*imagenet/test to have it"):
        load_data(f"imagefolder:{tmp_path / 'imagenet'}", image_size=8)


def test_pictures_beside_the_folders_of_classes_are_not_skipped_silently(tmp_path):
    class_folders(tmp_path, 5)
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"1 beside these folders: stray\.png\. Move them"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_too_few_pictures_say_how_many_are_needed(tmp_path):
    class_folders(tmp_path, 1)
    with pytest.raises(DataError, match=r"at least 3 pictures to be divided.* and has 2"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    class_folders(tmp_path, 1, names=("cow", "fox"))
    with pytest.raises(
        DataError, match=r"'(cat|dog|cow|fox)' in .* has 1, which would .*3 or more"
    ):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_a_class_without_pictures_is_named_with_what_it_holds(tmp_path):
    class_folders(tmp_path, 3)
    (tmp_path / "emu").mkdir()
    for index in range(2):
        (tmp_path / "emu" / f"{index}.heic").touch()
    with pytest.raises(DataError, match=r"has none, but 2 files that end in \.heic\. Remove"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_names_of_classes_can_always_be_written(tmp_path):
    odd = [b"caf\xe9".decode("utf-8", "surrogateescape"), "a\nb", "\x1b[31mred", "<b>&", "[red]"]
    class_folders(tmp_path, 3, names=tuple(odd))
    classes = load_data(f"imagefolder:{tmp_path}", image_size=8).classes
    assert set(classes) == {r"caf\xe9", r"a\nb", r"\x1b[31mred", "<b>&", "[red]"}
    for name in classes:
        name.encode()


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path, 3)

    def locked(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    scan = folders.os.scandir
    monkeypatch.setattr(folders.os, "scandir", locked)
    with pytest.raises(DataError, match=r"dog cannot be read: Permission denied\. Change its"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_all_pictures_that_cannot_be_read_are_named_at_once(tmp_path):
    class_folders(tmp_path, 9)
    for index in range(7):
        (tmp_path / "cat" / f"broken{index}.png").write_bytes(b"no picture")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(
        DataError, match=r"of the \d+ pictures cannot be read.*and \d more\."
    ) as info:
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert str(info.value).count("is not a picture") == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_named_like_a_picture_is_refused_by_name(tmp_path):
    class_folders(tmp_path, 9)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png.* is neither a file nor a folder"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


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
        ("broken", DataError, r"mine\.py, line \d+: ValueError: no such sensor"),
        ("nothing", DataError, r"`nothing\(\)` of .* returned unfit data.*got a NoneType"),
    ],
)
def test_an_unfit_function_is_refused(user_file, function, kind, message):
    with pytest.raises(kind, match=message):
        load_data(f"{user_file}:{function}")


def test_an_unfit_file_is_refused(tmp_path, user_file):
    with pytest.raises(UnknownNameError, match=r"does not exist\).*Did you mean .*mine\.py"):
        load_data(f"{tmp_path}/mines.py:make")
    (tmp_path / "bad.py").write_text("import nowhere_at_all\n")
    with pytest.raises(DataError, match=r"bad\.py, line 1: ModuleNotFoundError"):
        load_data(f"{tmp_path}/bad.py:make")
    with pytest.raises(OptionError, match="`image_size` must be left out"):
        load_data(f"{user_file}:pair", image_size=8)
    with pytest.raises(OneByOneError):
        load_data(":")
