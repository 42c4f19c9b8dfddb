"""Weights come back as they were saved; what does not fit is refused by name."""

import argparse
import struct
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import OptionError, OutputError, WeightsError
from onebyone.networks.zoo import load, load_weights, read_weights, save_weights


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def network(outputs=5):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, outputs)
    )


def same(first, second):
    for name, tensor in first.state_dict().items():
        assert_close(second.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_saved_weights_come_back(tmp_path):
    model, twin = network(), network()
    model(torch.randn(3, 2, 4, 4))  # so that the running statistics are not the first ones
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(twin, tmp_path / "w.safetensors")
    same(model, twin)


def test_saving_leaves_one_file_and_replaces_the_older(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"older")
    save_weights(network(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert len(read_weights(path)) == len(network().state_dict())


def test_channels_last_weights_are_saved_by_value(tmp_path):
    model, twin = network().to(memory_format=torch.channels_last), network()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(twin, tmp_path / "w.safetensors")
    same(model, twin)


def test_shared_tensors_are_saved_once_and_stay_shared(tmp_path):
    path = tmp_path / "w.safetensors"
    model, twin = Tied(), Tied()
    save_weights(model, path)
    assert len(read_weights(path)) == 2
    load_weights(twin, path)
    same(model, twin)
    assert twin.first.weight is twin.second.weight
    safetensors.torch.load_model(other := Tied(), path)  # others can read them too
    same(model, other)


def test_shared_tensors_that_differ_in_the_file_are_refused(tmp_path):
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["second.weight"] += 1
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"'first.weight' and 'second.weight' are one tensor"):
        load_weights(Tied(), tmp_path / "w.pt")


def test_overlapping_tensors_are_saved_as_copies(tmp_path):
    model = nn.Module()
    model.register_buffer("whole", torch.arange(6.0))
    model.register_buffer("part", model.whole[2:4])
    save_weights(model, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors")["part"].tolist() == [2, 3]


@pytest.mark.parametrize("ending", ["pt", "ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"ema": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"checkpoint": {"teacher": state}, "args": {"lr": 0.1}},
        lambda state: {"state_dict": state, "state_dict_ema": dict(state)},
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {"model." + name: t for name, t in state.items()}},
        lambda state: {"_orig_mod.module." + name: tensor for name, tensor in state.items()},
        lambda state: {name.replace(".", ".module."): tensor for name, tensor in state.items()},
    ],
    ids=[
        "plain",
        "state_dict",
        "model",
        "ema",
        "teacher",
        "twice the same",
        "module.",
        "model.",
        "_orig_mod.",
        "within",
    ],
)
def test_state_dicts_are_read_as_others_save_them(tmp_path, ending, wrap):
    path = tmp_path / f"w.{ending}"
    model, twin = network(), network()
    torch.save(wrap(model.state_dict()), path)
    load_weights(twin, path)
    same(model, twin)


def test_a_counter_that_older_files_lack_is_not_missed(tmp_path):
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    load_weights(network(), tmp_path / "w.pt")


def test_half_precision_is_converted(tmp_path):
    model, twin = network(), network()
    torch.save(model.half().state_dict(), tmp_path / "w.pt")
    load_weights(twin, tmp_path / "w.pt")
    assert twin[0].weight.dtype == torch.float32
    assert torch.equal(twin[0].weight.half(), model[0].weight)


def test_weights_of_another_network_are_refused_in_full_and_change_nothing(tmp_path):
    state = network(outputs=7).state_dict()
    del state["0.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    model, before = network(), None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "w.pt", network="mine")
    message = str(caught.value)
    assert "not those of mine" in message
    assert "1 missing (0.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "2 different (3.weight is float32 (7, 12) in the file and float32 (5, 12)" in message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_many_differences_are_counted_not_listed(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"8 missing \(0.weight, 0.bias, 1.weight, … 5 more\)"):
        load_weights(network(), tmp_path / "w.pt")


def test_integer_codes_are_not_taken_for_weights(tmp_path):
    state = network().state_dict()
    state["0.weight"] = state["0.weight"].to(torch.int8)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"0.weight is int8 .* in the file and float32"):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(tmp_path, value):
    model = network()
    with torch.no_grad():
        model[3].weight[0, :2] = value
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"2 of the 60 values of '3.weight' are not"):
        load_weights(network(), tmp_path / "w.safetensors")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save(network(), tmp_path / "whole.pt")  # the pickled module, not its weights
    with pytest.raises(
        WeightsError,
        match=r"whole pickled object with a torch\.nn.* refused.*trust.*whole\.pt', weights_only=False\)\.state_dict\(\), 'whole-weights\.pt'\)",
    ):
        read_weights(tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"no weights", r"w\.pt cannot be read: .*to the end"),
        ("w.pt", b"\x80\x02}q\x00(", r"w\.pt cannot be read: .*to the end"),
        ("w.pt", b"PK\x03\x04 no weights", r"w\.pt cannot be read: .*to the end"),
        ("w.pt", bytes(range(256)), r"w\.pt cannot be read: .*to the end"),
        ("w.pt", b"", "cannot be read: it is empty"),
        ("w.pt", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer.*git lfs pull"),
        ("w.safetensors", b"<!DOCTYPE html>", "is a web page, not weights"),
        ("w.safetensors", b"PK\x03\x04", r"is a file of PyTorch\. Rename it .*\.pt"),
        ("w.pt", b'\x20\0\0\0\0\0\0\0{"a":', r"is a file of safetensors\. Rename it"),
        ("w.safetensors", b"no weights", "cannot be read as safetensors"),
        ("w.onnx", b"", r"must be a file that ends in .safetensors, .pt, .* or .tar, got w.onnx"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / name)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        if name == "w.pt":
            torch.save(network().state_dict(), path)
        else:
            save_weights(network(), path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(WeightsError, match="Was it copied or downloaded to the end"):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold tensors by their names, but holds a list"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({}, "holds no tensors"),
        ({"state_dict": {}, "epoch": 3}, "holds no tensors"),
        ({"model": {"deep": {"deeper": {"deepest": {}}}}}, "'deep' is a dict"),
        ({"a": {"b": {"c": {"d": {"e": torch.ones(1)}}}}}, "'a' is a dict"),
    ],
)
def test_files_without_tensors_by_name_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pt")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        read_weights(tmp_path)


def test_weights_are_only_written_where_they_can_be(tmp_path):
    with pytest.raises(OutputError, match=r"ends in .safetensors, got"):
        save_weights(network(), tmp_path / "w.pt")
    with pytest.raises(OutputError, match="Cannot write"):
        save_weights(network(), tmp_path / "absent" / "w.safetensors")


def test_a_prefix_is_taken_off_safetensors_too_and_only_where_names_then_match(tmp_path):
    model, twin = network(), network()
    state = {f"model._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(twin, tmp_path / "w.safetensors")
    same(model, twin)
    assert next(iter(read_weights(tmp_path / "w.safetensors"))).startswith("model._orig_mod.")
    own = nn.Sequential()
    own.module = nn.Linear(2, 2)
    save_weights(own, tmp_path / "own.safetensors")
    load_weights(own, tmp_path / "own.safetensors")
    save_file({**state, "loss.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected \(.*loss\.weight"):
        load_weights(twin, tmp_path / "w.safetensors")


def test_a_name_that_was_probably_meant_is_asked_for(tmp_path):
    state = network().state_dict()
    state["0.weights"] = state.pop("0.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"missing \(0.weight\) \(is '0.weight' the file's '0.w"):
        load_weights(network(), tmp_path / "w.pt")


def test_weights_that_differ_in_one_checkpoint_are_not_chosen_from(tmp_path):
    first, second = network().state_dict(), network(outputs=7).state_dict()
    torch.save({"model": first, "ema": second}, tmp_path / "w.pt")
    message = r"more than once: under 'model', 'ema'\. Save .*w\.pt', weights_only=True\)\['ema'\]"
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_with_more_than_tensors_says_how_to_get_at_them(tmp_path, old):
    content = {"state_dict": network().state_dict(), "args": argparse.Namespace()}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    message = r"holds a argparse\.Namespace beside its tensors.*False\)\['state_dict'\], 'w-weights"
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pt")


def test_a_program_of_torchscript_says_how_to_get_at_its_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"TorchScript program.*torch\.jit\.load\(.*state_dict"):
        read_weights(tmp_path / "w.pt")


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(5_000_000))
    with pytest.raises(
        WeightsError, match=r"not unpack to more than 20 times .* unpacks to 5\.00 MB"
    ):
        read_weights(tmp_path / "w.pt")


def test_a_tensor_that_repeats_one_value_does_not_fill_the_memory(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"claim 4\.00 TB: they repeat"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.to(torch.int8),
        lambda t: t.to(torch.bool),
        lambda t: t.to(torch.complex64),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_types_that_are_no_plain_numbers_are_refused_by_name(tmp_path, convert):
    state = network().state_dict()
    state["0.weight"] = convert(state["0.weight"])
    name = str(state["0.weight"].dtype).removeprefix("torch.")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=rf"0\.weight is {name} \(.*\) in the file and float32"):
        load_weights(network(), tmp_path / "w.pt")


def test_sparse_weights_and_ones_without_values_are_refused(tmp_path):
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"a": tensor}, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"must be dense tensors with values: .*'a' is"):
            read_weights(tmp_path / "w.pt")


def test_values_that_the_networks_type_does_not_hold_are_refused(tmp_path):
    state = network().state_dict()
    state["0.weight"] = torch.full_like(state["0.weight"], 1e6)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"values of '0\.weight' .* too large for float16"):
        load_weights(network().half(), tmp_path / "w.pt")


def test_a_state_dict_in_place_of_a_path_says_what_to_do():
    for call in (load_weights, lambda model, state: load("onebyone:classic", weights=state)):
        with pytest.raises(OptionError, match=r"got a OrderedDict.*load_state_dict"):
            call(network(), network().state_dict())


def test_what_a_network_keeps_besides_tensors_stays_its_own(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    load_weights(Counting(2, 2), tmp_path / "w.pt")


def test_a_network_whose_shapes_are_not_known_yet_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(2)
    with pytest.raises(WeightsError, match=r"'weight' is not yet\. Run the network once"):
        load_weights(lazy, tmp_path / "w.pt")


def test_a_header_with_a_name_twice_is_refused(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    head = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    with pytest.raises(WeightsError, match="its header has 'a' twice"):
        read_weights(tmp_path / "w.safetensors")
