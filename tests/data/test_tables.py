"""Data sets of Hugging Face are the pictures and labels that are in them."""

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from onebyone.core.errors import DataError, MissingExtraError
from onebyone.data import DatasetSplit, PictureSplit, TensorSplit, as_data, as_split, load_data
from onebyone.data import tables as tables_module
from onebyone.data.hashing import hash_data


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("datasets")


def png(number):
    pixels = np.random.default_rng(number).integers(0, 256, (18, 20 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def table(library, numbers=range(30), **more):
    columns = {
        "image": ([{"bytes": png(n), "path": None} for n in numbers], library.Image()),
        "label": ([n % 3 for n in numbers], library.ClassLabel(names=["cat", "dog", "emu"])),
    }
    columns |= {name: ([value for _ in numbers], kind) for name, (value, kind) in more.items()}
    return library.Dataset.from_dict(
        {name: values for name, (values, _) in columns.items()},
        features=library.Features({name: kind for name, (_, kind) in columns.items()}),
    )


@pytest.fixture(scope="module")
def saved(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pets"
    table(library).save_to_disk(str(folder))
    return folder


def pixels(split):
    return torch.cat([inputs for inputs, _ in split.batches(7)])


def test_a_saved_table_is_the_same_pictures_as_a_folder(saved, tmp_path):
    for number in range(30):
        path = tmp_path / ["cat", "dog", "emu"][number % 3] / f"{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(number))
    held, streamed = (load_data(f"hf:{saved}", image_size=16, workers=n) for n in (None, 2))
    assert isinstance(held.train, TensorSplit)
    assert isinstance(streamed.train, PictureSplit)
    assert held.name == "pets"
    assert hash_data(held) == hash_data(streamed)
    folder = load_data(f"imagefolder:{tmp_path}", image_size=16)
    assert folder.classes == held.classes == ("cat", "dog", "emu")
    parts = [
        torch.cat([pixels(p) for p in (d.train, d.validation, d.test)]) for d in (folder, held)
    ]
    assert torch.equal(*[whole.flatten(1).double().sum(1).sort().values for whole in parts])


def test_tables_given_in_python_are_data_and_calibration(library):
    parts = library.DatasetDict(
        {
            "train": table(library),
            "val": table(library, range(30, 36)),
            "test": table(library, [40]),
        }
    )
    data = as_data(parts)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 6, 1]
    assert data.classes == ("cat", "dog", "emu")
    assert data.inputs.tensors[0].sample == (3, 224, 224)
    assert data.train.targets.tolist() == [n % 3 for n in range(30)]
    backwards = as_split(parts["train"].select(range(29, 24, -1)))
    assert backwards.targets.tolist() == [2, 1, 0, 2, 1]
    assert np.array_equal(backwards.image(0), data.train.image(29))
    assert len(as_split(parts["test"])) == 1


def test_transforms_of_ones_own_are_kept(library):
    how = v2.Compose([v2.Resize((8, 8)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def transformed(batch):
        return {"pixels": [how(picture) for picture in batch["image"]], "label": batch["label"]}

    data = as_data(table(library).with_transform(transformed))
    assert isinstance(data.train, DatasetSplit)
    assert data.classes == ("0", "1", "2")
    inputs, targets = next(iter(data.test.batches(3)))
    assert inputs["pixels"].shape == (3, 3, 8, 8)
    assert sorted(targets.tolist()) == [0, 1, 2]


def test_columns_are_found_or_named_and_else_refused(library, tmp_path):
    coarse = library.ClassLabel(names=["animal"])
    several = table(library, range(9), coarse=(0, coarse), text=("x", library.Value("string")))
    several.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="one column with labels, got several: label, coarse"):
        load_data(f"hf:{tmp_path}/d")
    assert load_data(f"hf:{tmp_path}/d,label=coarse", image_size=8).classes == ("animal",)
    data = load_data(f"hf:{tmp_path}/d,image=image,label=label", image_size=8)
    assert data.classes == ("cat", "dog", "emu")
    for named, message in {
        "label=text": "must be class numbers",
        "label=gone": "no column 'gone' for `label`. Columns: image, label",
        "image=text,label=label": "must hold pictures, and has the type",
        "size=9": "there may be `,image=COLUMN`",
    }.items():
        with pytest.raises(DataError, match=message):
            load_data(f"hf:{tmp_path}/d,{named}")
    plain = as_data(several.remove_columns(["label", "coarse"]))
    assert plain.classes == ()
    assert plain.test.targets is None


def test_unfit_parts_are_refused(library):
    first, second = table(library, range(9)), table(library, range(9, 18))
    with pytest.raises(DataError, match=r"must be `train` and one or both of .*got train, extra"):
        as_data(library.DatasetDict({"train": first, "extra": second}))
    with pytest.raises(DataError, match=r"but test has none\. Remove the part"):
        as_data(library.DatasetDict({"train": first, "test": second.remove_columns("label")}))
    renamed = second.cast_column("label", library.ClassLabel(names=["emu", "cat", "dog"]))
    with pytest.raises(DataError, match="test has emu, cat, dog and train cat, dog, emu"):
        as_data(library.DatasetDict({"train": first, "test": renamed}))
    unknown = second.map(lambda row: {"label": -1})
    with pytest.raises(DataError, match="must be from 0 up, got -1, which stands for unknown"):
        as_data(library.DatasetDict({"train": first, "test": unknown}))
    with pytest.raises(DataError, match="must have random access"):
        as_data(first.to_iterable_dataset())


def test_a_broken_or_missing_picture_is_named_with_its_row(library):
    files = [{"bytes": png(n) if n != 4 else b"<html>", "path": None} for n in range(9)]
    for broken, message in (
        (files, "row 4 of 'image' is not a pict"),
        ([*files[:4], None], "is missing"),
    ):
        made = library.Dataset.from_dict({"image": broken}).cast_column("image", library.Image())
        with pytest.raises(DataError, match=message):
            as_split(made)


def test_what_is_no_saved_data_set_is_refused(library, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Save it there first"):
        load_data(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="must have been written by `save_to_disk`"):
        load_data(f"hf:{tmp_path}")
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    with pytest.raises(DataError, match=r"must be that of Hugging Face.* Rename that file"):
        load_data(f"hf:{tmp_path}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'onebyone\[datasets\]'"):
        tables_module.load_table(str(tmp_path))
