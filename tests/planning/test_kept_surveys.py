"""Options of the same network, data and settings are measured once."""

import pytest
import torch
from torch import nn

from onebyone.planning import Planner, kept_surveys
from onebyone.planning.layer_options import Surveyor


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Other(Small):
    def forward(self, x):
        return self.second(self.first(x).relu() + 0 * x.sum())


Other.__qualname__ = Small.__qualname__  # as after an edit of the file


@pytest.fixture
def measured(monkeypatch):
    """Counts the surveys that measure options, and keeps them however little time they took."""
    monkeypatch.setattr(kept_surveys, "LEAST_SECONDS", 0.0)
    found, own = [], Surveyor.layer_options

    def counting(self, *args):
        found.append(1)
        return own(self, *args)

    monkeypatch.setattr(Surveyor, "layer_options", counting)
    return found


def inputs(seed=0):
    return torch.randn(64, 12, generator=torch.Generator().manual_seed(seed))


def planned(folder, network=None, data=None, budget="macs=60%", **settings):
    data = inputs() if data is None else data
    planner = Planner(network or Small(), data, task="classification", cache=folder, **settings)
    return planner.plan([budget])


def test_another_budget_measures_nothing_and_gives_the_same_plan_bit_for_bit(tmp_path, measured):
    first = planned(tmp_path)
    again = planned(tmp_path)
    assert len(measured) == 1
    assert again == first
    planned(tmp_path, budget="macs=80%")
    assert len(measured) == 1


def test_heads_are_fitted_the_same_whether_options_were_kept(tmp_path, measured):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 4)
    )
    images = torch.randn(64, 3, 8, 8)
    first, again = (
        planned(tmp_path, network, images, head="gap", budget="macs=100%") for _ in "ab"
    )
    assert len(measured) == 1
    assert again == first
    assert any(option.first.rewrite == "head" for option in first.choices)


@pytest.mark.parametrize("other", ["weights", "code", "data", "effort", "leave", "type"])
def test_whatever_options_depend_on_is_measured_anew(tmp_path, measured, other):
    planned(tmp_path)
    changed = {}
    if other == "weights":
        changed["network"] = Small()
        with torch.no_grad():
            changed["network"].second.weight[0, 0] += 1e-3
    elif other == "code":
        changed["network"] = Other()
    elif other == "data":
        changed["data"] = inputs(seed=1)
    elif other == "effort":
        changed["effort"] = "thorough"
    elif other == "leave":
        changed["leave"] = ["second"]
    else:
        changed["data"] = inputs() * 1.0
        changed["network"] = Small().double()
    planned(tmp_path, **changed, budget="macs=90%")
    assert len(measured) == 2


def test_a_damaged_file_and_a_folder_that_cannot_be_written_are_done_without(tmp_path, measured):
    planned(tmp_path)
    (file,) = (tmp_path / "surveys").glob("*.json")
    file.write_text(file.read_text()[:-20])
    planned(tmp_path)
    assert len(measured) == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert planned(blocked).choices == planned(tmp_path).choices


def test_a_survey_that_took_no_time_is_not_kept(tmp_path):
    planned(tmp_path)
    assert not (tmp_path / "surveys").exists()


def test_only_the_latest_are_kept(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(kept_surveys, "MOST_FILES", 2)
    for seed in range(4):
        planned(tmp_path, data=inputs(seed))
    assert len(list((tmp_path / "surveys").glob("*.json"))) == 2
    assert len(measured) == 4
