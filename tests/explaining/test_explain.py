"""Explaining images: the files, the record, and the maps' places in the picture."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import DataError, ModelError, OptionError, OutputError, UnknownNameError
from onebyone.data import Data, TensorSplit
from onebyone.explaining import Explanation, explain
from onebyone.explaining.drawing import file_name, safe, shown_channels
from onebyone.networks.layers import GlobalAverageHead
from onebyone.report.pictures import color_map

HOSTILE = '<script>alert("x")</script>'
PLAIN = {"mean": [0.0], "std": [1.0]}


def network(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), GlobalAverageHead(6, 4),
    )  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    path = tmp_path / "a cat.png"
    Image.fromarray(pixels).save(path)
    return path


def test_every_file_of_the_record_is_there_and_nothing_else(picture, tmp_path):
    out = tmp_path / "out"
    explained = explain(
        network(), [picture, picture], out=out, size=(24, 32), layer="2", **PLAIN,
        classes=["cat", "dog", HOSTILE, "../../x"], top=4,
    )  # fmt: skip
    record = Explanation.load(out / "explain.json")
    assert record == explained.record
    files = {"explain.html", "explain.json"}
    for image in record.images:
        files |= {image.seen_file, image.grid_file, image.layer.file}
        files |= {each.file for each in image.classes}
    assert {path.name for path in out.iterdir()} == files
    for name in files:
        if name.endswith(".png"):
            Image.open(out / name).load()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_scores_are_the_networks_own_and_maps_average_to_them(picture):
    net = network().eval()
    explained = explain(net, picture, size=(24, 32), **PLAIN, top=4, task="classification")
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        scores = net(pixels)[0]
    image = explained.record.images[0]
    assert [each.index for each in image.classes] == scores.argsort(descending=True).tolist()
    assert [each.score for each in image.classes] == pytest.approx(
        sorted(scores.tolist(), reverse=True), rel=1e-4
    )
    assert sum(each.probability for each in image.classes) == pytest.approx(1, abs=1e-5)
    # Shown are differences from the average class.
    means = explained.maps[0].mean((1, 2)) + scores.mean()
    assert_close(means, torch.tensor([each.score for each in image.classes]))


def test_the_map_lies_over_its_place_in_the_picture(tmp_path):
    # A network whose class 1 is brightness; a bright square in the lower right of a wide picture.
    conv = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    net = nn.Sequential(conv, nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pixels = np.zeros((240, 480, 3), np.uint8)
    pixels[160:200, 360:420] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    out = tmp_path / "out"
    explained = explain(net, tmp_path / "x.png", out=out, size=(48, 96), **PLAIN, top=1)
    each = explained.record.images[0].classes[0]
    assert each.index == 1
    shown = np.asarray(Image.open(out / each.file)).astype(float)
    height, width, _ = shown.shape
    assert width / height == pytest.approx(2)
    yellow = np.linalg.norm(shown - color_map(np.array([1.0, 0.0]))[0], axis=2)
    row, column = divmod(int(yellow.argmin()), width)
    assert 160 / 240 <= row / height <= 200 / 240
    assert 360 / 480 <= column / width <= 420 / 480


def shrunk_run(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (160, 3, 16, 16), dtype=torch.uint8)
    labels = images.float().mean((2, 3)).argmax(1)
    split = TensorSplit(images, labels, mean=(0.5,) * 3, std=(0.3,) * 3)
    data = Data(name="d", train=split, validation=split, test=split, classes=("r", "g", HOSTILE))
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), GlobalAverageHead(24, 3),
    )  # fmt: skip
    small, record = obo.shrink(
        net, data, budget="macs=80%", epochs=0, out=tmp_path / "run", leave=["0", "4"],
        calibration_examples=64,
    )  # fmt: skip
    Image.fromarray(data.test.image(0)).save(tmp_path / "x.png")
    return net, small, record


def test_a_layer_of_a_shrunk_run_is_shown_before_and_after(tmp_path):
    net, _, record = shrunk_run(tmp_path)
    site = next(
        choice.site for choice in record.plan.choices if choice.first.rewrite == "factorize"
    )
    out = tmp_path / "out"
    explained = explain(tmp_path / "run", tmp_path / "x.png", original=net, layer=site, out=out)
    image = explained.record.images[0]
    assert {each.name for each in image.classes} == {"r", "g", HOSTILE}
    assert image.layer.error > 0
    assert image.layer.before_file
    assert image.layer.shape == (24, 16, 16)
    assert (out / image.layer.before_file).exists()
    # A layer that nothing was changed before is the same to the last bits.
    same = explain(tmp_path / "run", tmp_path / "x.png", original=net, layer="0").record
    assert same.images[0].layer.error < 1e-10
    # Where the run's network came from memory and is not given, that is said.
    with pytest.raises(OptionError, match="made from a module in memory"):
        explain(tmp_path / "run", tmp_path / "x.png", layer="0")


def test_a_network_that_is_no_classifier_has_layers_to_show(picture):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(1, 2))
    record = explain(net, picture, size=(24, 32), layer="0", **PLAIN).record
    assert record.method == ""
    assert record.images[0].layer.shape == (5, 22, 30)
    assert "Layer 0" in str(record)
    with pytest.raises(ModelError, match="class scores"):
        explain(net, picture, size=(24, 32), **PLAIN)


def test_probabilities_are_shown_only_where_the_outputs_are_known_to_have_some(picture):
    unknown = explain(network(), picture, size=(24, 32), **PLAIN)
    assert all(each.probability is None for each in unknown.record.images[0].classes)
    assert "Task: not known" in str(unknown)
    ended = nn.Sequential(network(), nn.Softmax(1)).eval()
    shown = explain(ended, picture, size=(24, 32), **PLAIN, top=4).record
    plain = explain(network(), picture, size=(24, 32), **PLAIN, top=4, task="classification").record
    assert shown.method == plain.method == "exact"
    for one, other in zip(shown.images[0].classes, plain.images[0].classes, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
        assert one.score == pytest.approx(other.score, rel=1e-4)
    with pytest.raises(
        ModelError, match="scores of classes or labels, but its task is 'embedding'"
    ):
        explain(network(), picture, size=(24, 32), **PLAIN, task="embedding")


def test_nothing_is_written_where_a_picture_cannot_be_read(picture, tmp_path):
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(DataError, match=r"bad\.png is not a picture in a supported format"):
        explain(
            network(), [picture, tmp_path / "bad.png"], out=tmp_path / "o", size=(24, 32), **PLAIN
        )
    assert not (tmp_path / "o").exists()


def test_other_folders_are_left_alone_and_an_earlier_explanation_is_replaced(picture, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"other files, such as 'thesis\.tex'"):
        explain(network(), picture, out=mine, size=(24, 32), **PLAIN)
    assert len(list(mine.iterdir())) == 1
    out = tmp_path / "o"
    explain(network(), picture, out=out, size=(24, 32), top=4, **PLAIN)
    (out / "note.txt").write_text("mine")
    explain(network(), picture, out=out, size=(24, 32), top=1, **PLAIN)
    assert len(list(out.glob("*.png"))) == 3  # the picture, its class, all classes
    assert (out / "note.txt").read_text() == "mine"


def test_bad_arguments_are_refused_by_name(picture):
    with pytest.raises(OptionError, match="`images` must have at least one picture"):
        explain(network(), [], **PLAIN)
    for odd in (3, None, b"x.png", np.zeros((4, 4, 3), np.uint8), [picture, torch.zeros(3, 4, 4)]):
        with pytest.raises(OptionError, match="paths of files or opened pictures, got a"):
            explain(network(), odd, size=(24, 32), **PLAIN)
    with pytest.raises(DataError, match=r"picture that was given has no pixels \(0×0\)"):
        explain(network(), Image.new("RGB", (0, 0)), size=(24, 32), **PLAIN)
    with pytest.raises(UnknownNameError, match="No layer named 'conv'"):
        explain(network(), picture, size=(24, 32), layer="conv", **PLAIN)
    with pytest.raises(OptionError, match="`top`"):
        explain(network(), picture, size=(24, 32), top=0, **PLAIN)


def test_more_images_than_a_batch_come_in_their_order(tmp_path):
    paths = []
    for number in range(11):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
        paths.append(path)
    seen = []
    explained = explain(
        network(), paths, size=(8, 8), **PLAIN, progress=lambda done, total, _: seen.append(done)
    )
    assert [image.path for image in explained.record.images] == list(map(str, paths))
    assert seen == [8, 11]
    alone = explain(network(), paths[10], size=(8, 8), **PLAIN)
    assert_close(alone.maps[0], explained.maps[10])


def test_the_json_is_plain(picture):
    explained = explain(network(), picture, size=(24, 32), **PLAIN, task="classification")
    text = explained.record.to_json()
    assert json.loads(text)["images"][0]["classes"][0]["probability"] <= 1


@given(st.text(max_size=80), st.integers(1, 999))
def test_names_of_files_are_safe_everywhere(text, number):
    name = file_name(number, text)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= 45
    assert name == f"{number:02d}" + (f"-{tail}" if (tail := name.partition("-")[2]) else "")
    assert set(safe(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_channels_shown_are_those_that_vary_most():
    maps = torch.zeros(100, 4, 5)
    maps[::2, 0, 0] = torch.arange(1.0, 51)
    assert set(shown_channels(maps)) >= set(range(0, 100, 2))
    assert len(shown_channels(maps)) == 64
    assert list(shown_channels(maps)) == sorted(shown_channels(maps))
