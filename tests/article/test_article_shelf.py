"""What was finished is found again; what was made otherwise is refused with the difference."""

import dataclasses

import pytest
import torch
from article_records import log
from torch import nn

from onebyone.article.record import SeedRun
from onebyone.article.shelf import Shelf
from onebyone.core.errors import OptionError, OutputError, RecordError, WeightsError
from onebyone.data import Data, TensorSplit

RUN = SeedRun(network="classic", seed=1, log=log())
SETTINGS = {"epochs": 3, "learning rate": 0.01}


def digits(last):
    pixels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    pixels[-1] = last
    split = TensorSplit(pixels, torch.arange(6) % 2)
    return Data(name="digits", train=split, validation=split, test=split)


DATA = digits(1)


def test_a_finished_training_is_found_with_its_weights(tmp_path):
    shelf = Shelf(tmp_path / "new" / "folder", data=DATA)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    shelf.keep("classic", SETTINGS, RUN, network="a", model=model)
    assert shelf.find("classic", SETTINGS, network="a") == RUN
    assert shelf.load("classic", other)
    assert torch.equal(model.weight, other.weight)


def test_what_was_not_finished_is_not_found(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    assert shelf.find("classic", SETTINGS, network="a") is None
    assert not shelf.load("classic", nn.Linear(3, 2))
    assert shelf.checkpoint("classic") == tmp_path / "classic.pt"


def test_a_finished_training_leaves_no_checkpoint(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    shelf.checkpoint("classic").write_bytes(b"state")
    shelf.keep("classic", SETTINGS, RUN, network="a")
    assert [path.name for path in tmp_path.iterdir()] == ["classic.json"]


def test_without_a_folder_nothing_is_kept():
    shelf = Shelf(None, data=DATA)
    shelf.keep("classic", SETTINGS, RUN, network="a")
    assert shelf.find("classic", SETTINGS, network="a") is None
    assert shelf.checkpoint("classic") is None


@pytest.mark.parametrize(
    ("data", "settings", "network", "message"),
    [
        (DATA, {**SETTINGS, "epochs": 5}, "a", "epochs 3 instead of 5"),
        (DATA, {"epochs": 3}, "a", "learning rate 0.01 instead of not given"),
        (digits(2), SETTINGS, "a", "other data"),
        (DATA, SETTINGS, "b", "another network or other weights"),
    ],
)
def test_a_training_of_another_measurement_is_refused(tmp_path, data, settings, network, message):
    Shelf(tmp_path, data=DATA).keep("classic", SETTINGS, RUN, network="a")
    with pytest.raises(OptionError, match=message):
        Shelf(tmp_path, data=data).find("classic", settings, network=network)


def test_the_same_data_under_another_name_is_the_same(tmp_path):
    Shelf(tmp_path, data=DATA).keep("classic", SETTINGS, RUN, network="a")
    renamed = dataclasses.replace(DATA, name="moved")
    assert Shelf(tmp_path, data=renamed).find("classic", SETTINGS, network="a") == RUN


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "classic.json").write_text("{")
    with pytest.raises(RecordError, match=r"classic\.json: .* Delete it to measure it anew"):
        Shelf(tmp_path, data=DATA).find("classic", SETTINGS, network="a")


def test_weights_of_another_network_are_refused(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    shelf.keep("classic", SETTINGS, RUN, network="a", model=nn.Linear(3, 2))
    with pytest.raises(WeightsError, match="not those of classic"):
        shelf.load("classic", nn.Linear(4, 2))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot make the folder"):
        Shelf(tmp_path / "file" / "folder", data=DATA)
