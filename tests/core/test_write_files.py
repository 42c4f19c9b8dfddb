"""Files are written whole or not at all; folders are checked before any work."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from onebyone.core.errors import OutputError, WeightsError
from onebyone.core.records import Record
from onebyone.core.write_files import (
    OWN,
    check_file,
    check_folder,
    contents,
    remove_leftovers,
    write_bytes,
    write_file,
    write_text,
    written_together,
)
from onebyone.networks.zoo import save_weights


def full(_path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a", "one")
    write_bytes(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_text() == "two"
    assert names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda what: order.append("sync") or sync(what))
    monkeypatch.setattr(Path, "replace", lambda *paths: order.append("rename") or rename(*paths))
    write_text(tmp_path / "a", "content")
    assert order == ["sync", "rename", "sync"]


def test_a_new_file_has_the_rights_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    save_weights(nn.Linear(2, 1), tmp_path / "w.safetensors")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), MemoryError(), ValueError("x")])
def test_what_stops_a_writer_leaves_the_earlier_file_and_nothing_else(tmp_path, stopped):
    def write(aside):
        aside.write_text("half")
        raise stopped

    write_text(tmp_path / "a", "one")
    with pytest.raises(type(stopped)):
        write_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    write_text(tmp_path / "a", "one")
    with pytest.raises(OutputError, match=r"Cannot write .*a: No space left on device\."):
        write_file(tmp_path / "a", full)
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_found_below_a_librarys_own_error(tmp_path):
    def write(aside):
        try:
            full(aside)
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    with pytest.raises(OutputError, match="No space left on device"):
        write_file(tmp_path / "a", write)


def test_what_cannot_be_read_back_is_not_kept(tmp_path):
    @dataclass(frozen=True)
    class Loss(Record):
        value: float

    Loss(1.0).save(tmp_path / "loss.json")
    with pytest.raises(OutputError, match=r"loss\.json cannot be read back"):
        write_text(tmp_path / "loss.json", '{"value": null}', check=Loss.load)
    assert Loss.load(tmp_path / "loss.json") == Loss(1.0)
    assert names(tmp_path) == ["loss.json"]


def test_weights_that_cannot_be_read_back_are_not_kept(tmp_path, monkeypatch):
    def cut_off(tensors, path, metadata):
        path.write_bytes(b"\x00" * 12)

    monkeypatch.setattr("onebyone.networks.zoo.weights.save_file", cut_off)
    with pytest.raises(OutputError, match=r"w\.safetensors cannot be read back"):
        save_weights(nn.Linear(2, 1), tmp_path / "w.safetensors")
    assert names(tmp_path) == []


def test_a_name_that_is_too_long_is_an_error(tmp_path):
    for attempt in (
        write_text,
        lambda path, _: check_file(path),
        lambda path, _: check_folder(path),
    ):
        with pytest.raises(OutputError, match="name too long"):
            attempt(tmp_path / ("n" * 300), "")
    assert names(tmp_path) == []


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    write_text(tmp_path / ("n" * 255), "x")
    assert names(tmp_path) == ["n" * 255]


def test_files_that_belong_together_come_together(tmp_path):
    folder = tmp_path / "a" / "b"
    with written_together(folder) as aside:
        write_text(aside / "one", "1")
        write_text(aside / "two", "2")
        assert contents(folder) == []
    assert names(folder) == ["one", "two"]


def test_a_failed_attempt_leaves_no_folder(tmp_path):
    with (
        pytest.raises(OutputError, match="No space"),
        written_together(tmp_path / "a" / "b") as aside,
    ):
        write_file(aside / "one", full)
    assert names(tmp_path) == []


def test_own_temporary_files_are_swept_and_no_others(tmp_path):
    (tmp_path / f"{OWN}aside-1f").write_text("half")
    (tmp_path / f"{OWN}aside-2f").mkdir()
    (tmp_path / f"{OWN}aside-2f" / "x").write_text("half")
    (tmp_path / ".aside-of-another").write_text("theirs")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".aside-of-another"]


def test_a_folder_of_own_temporary_files_counts_as_empty(tmp_path):
    (tmp_path / f"{OWN}aside-1f").write_text("half")
    assert check_folder(tmp_path, owner="a run's", marks=["run.json"]) == tmp_path


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"new, empty, or a run's, but .*'thesis\.tex'"):
        check_folder(tmp_path, owner="a run's", marks=["run.json"])
    (tmp_path / "run.json").write_text("")
    check_folder(tmp_path, owner="a run's", marks=["run.json"])
    with pytest.raises(OutputError, match="other files"):
        check_folder(tmp_path, owner="a run's", marks=["run.json"], known=["run.json"])


def test_checking_leaves_nothing_behind(tmp_path):
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "c" / "page.html")
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/further"])
def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="folder"):
        check_folder(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_way_of_a_file_is_an_error(tmp_path):
    with pytest.raises(OutputError, match=r"must be a file, but .* is a folder"):
        check_file(tmp_path)


def test_a_folder_that_may_not_be_written_is_an_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.open", refused)  # root may write anywhere
    with pytest.raises(OutputError, match=r"Cannot write to the folder .*: Permission denied"):
        check_folder(tmp_path)


def test_weights_are_refused_by_the_error_they_always_had(tmp_path):
    model = nn.Linear(2, 1)
    model.register_buffer("text", torch.zeros(1))
    model.state_dict = lambda: {"text": "no tensor"}
    with pytest.raises(WeightsError, match="Only tensors"):
        save_weights(model, tmp_path / "w.safetensors")
