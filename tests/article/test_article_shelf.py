"""What was finished is found again; what was made otherwise is refused with the difference."""

import dataclasses

import pytest
import torch
from article_records import log, record
from torch import nn

from onebyone.article.record import SeedRun
from onebyone.article.shelf import Shelf
from onebyone.errors import OptionError, OutputError, RecordError, WeightsError

RUN = SeedRun(network="classic", seed=1, log=log())
SETTINGS = {"epochs": 3, "learning rate": 0.01}
DATA = record().data


def test_a_finished_training_is_found_with_its_weights(tmp_path):
    shelf = Shelf(tmp_path / "new" / "folder", data=DATA)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    shelf.keep("classic", SETTINGS, RUN, model=model)
    assert shelf.find("classic", SETTINGS) == RUN
    assert shelf.load("classic", other)
    assert torch.equal(model.weight, other.weight)


def test_what_was_not_finished_is_not_found(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    assert shelf.find("classic", SETTINGS) is None
    assert not shelf.load("classic", nn.Linear(3, 2))
    assert shelf.checkpoint("classic") == tmp_path / "classic.pt"


def test_a_finished_training_leaves_no_checkpoint(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    shelf.checkpoint("classic").write_bytes(b"state")
    shelf.keep("classic", SETTINGS, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["classic.json"]


def test_without_a_folder_nothing_is_kept():
    shelf = Shelf(None, data=DATA)
    shelf.keep("classic", SETTINGS, RUN)
    assert shelf.find("classic", SETTINGS) is None
    assert shelf.checkpoint("classic") is None


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (DATA, {**SETTINGS, "epochs": 5}, "epochs 3 instead of 5"),
        (DATA, {"epochs": 3}, "learning rate 0.01 instead of None"),
        (
            dataclasses.replace(DATA, name="mnist", train=55_000),
            SETTINGS,
            r"data digits \(1,200 to train, seed 0\) instead of mnist \(55,000",
        ),
    ],
)
def test_a_training_of_another_measurement_is_refused(tmp_path, data, settings, message):
    Shelf(tmp_path, data=DATA).keep("classic", SETTINGS, RUN)
    with pytest.raises(OptionError, match=message):
        Shelf(tmp_path, data=data).find("classic", settings)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "classic.json").write_text("{")
    with pytest.raises(RecordError, match=r"classic\.json: .* Delete it to measure it anew"):
        Shelf(tmp_path, data=DATA).find("classic", SETTINGS)


def test_weights_of_another_network_are_refused(tmp_path):
    shelf = Shelf(tmp_path, data=DATA)
    shelf.keep("classic", SETTINGS, RUN, model=nn.Linear(3, 2))
    with pytest.raises(WeightsError, match="not those of classic"):
        shelf.load("classic", nn.Linear(4, 2))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot make the folder"):
        Shelf(tmp_path / "file" / "folder", data=DATA)
