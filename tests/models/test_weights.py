"""Weights come back as they were saved; what does not fit is refused by name."""

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.errors import OutputError, WeightsError
from onebyone.models import load_weights, read_weights, save_weights


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


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {"module." + name: t for name, t in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "module.", "both"],
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
    with pytest.raises(WeightsError, match="could run code, so it is refused"):
        read_weights(tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"no weights", "could run code|cannot be read"),
        ("w.pt", b"", "cannot be read"),
        ("w.safetensors", b"no weights", "cannot be read as safetensors"),
        ("w.onnx", b"", r"must be a file that ends in .safetensors, .pt, .pth or .bin, got w.onnx"),
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
