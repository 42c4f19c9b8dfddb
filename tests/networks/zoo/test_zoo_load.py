"""Networks by name: the right one, its shape, and messages that lead on where a name is wrong."""

import sys
import textwrap
import urllib.error

import pytest
import torch
from torch import nn

from onebyone.core.errors import ModelError, OptionError, UnknownNameError, WeightsError
from onebyone.core.records import InputSpec, ModelSource
from onebyone.networks.zoo import available, build, load, save_weights

NET = """
    from torch import nn
    from neighbour import WIDTH

    class Net(nn.Module):
        input_shape = (2, 9, 11)

        def __init__(self, width=WIDTH):
            super().__init__()
            self.conv = nn.Conv2d(2, width, 3)

        def forward(self, x):
            return self.conv(x)

    def make(*, width=3):
        return Net(width)

    def fails():
        raise KeyError("weights")

    def returns_text():
        return "a network"

    def _hidden():
        pass
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    path = tmp_path / "net.py"
    path.write_text(textwrap.dedent(NET))
    yield path
    sys.modules.pop("neighbour", None)


def message(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", [n for n in available("onebyone") if n != "nin-imagenet"])
def test_every_network_of_ours_runs_on_its_input_shape(name):
    loaded = load(f"onebyone:{name}")
    with torch.inference_mode():
        scores = loaded.model(torch.randn(2, *loaded.inputs.single("a test").sample))
    assert scores.shape[:2] == (2, {"nin-cifar100": 100, "extra-nonlinearity": 8}.get(name, 10))


def test_options_reach_our_networks_and_their_input_shape():
    loaded = load("onebyone:classic", in_channels=3, size=20, num_classes=4)
    assert loaded.inputs == InputSpec.of_shape((1, 3, 20, 20))
    assert loaded.model(torch.randn(1, 3, 20, 20)).shape == (1, 4)
    assert loaded.source == ModelSource(
        name="classic",
        spec="onebyone:classic",
        options={"in_channels": 3, "size": 20, "num_classes": 4},
    )


def test_a_source_is_enough_to_build_the_network_again(tmp_path):
    torch.manual_seed(1)
    first = load("onebyone:convolution-only", num_classes=4)
    save_weights(first.model, tmp_path / "w.safetensors")
    source = ModelSource.from_json(first.source.to_json())
    again = load(source.spec, weights=tmp_path / "w.safetensors", **source.options)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(first.model(x), again.model(x))
    assert again.source.weights == "w.safetensors"


def test_built_networks_train_and_loaded_ones_do_not():
    assert build("onebyone:classic").training
    assert not load("onebyone:classic").model.training


@pytest.mark.parametrize("weights", [None, "random"])
def test_random_weights_that_were_asked_for_are_said_in_the_record(weights):
    assert load("onebyone:classic", weights=weights).source.weights == weights


def test_torchvision_networks_are_built_whole():
    loaded = load("torchvision:squeezenet1_1", num_classes=7)
    assert loaded.inputs == InputSpec.of_shape((1, 3, 224, 224))
    assert loaded.source.name == "squeezenet1_1"
    assert sum(p.numel() for p in loaded.model.parameters()) == 722_496 + 7 * 513
    with torch.inference_mode():
        assert loaded.model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [("resnet18", {}, (3, 224, 224)), ("mobilenetv3_small_050", {"in_chans": 1}, (1, 224, 224))],
)
def test_timm_networks_know_their_input(name, options, shape):
    loaded = load(f"timm:{name}", num_classes=7, **options)
    assert loaded.inputs == InputSpec.of_shape((1, *shape))
    with torch.inference_mode():
        assert loaded.model(torch.randn(1, shape[0], 64, 64)).shape == (1, 7)


def test_a_vision_transformer_keeps_the_size_it_was_built_for():
    with torch.device("meta"):
        assert load("torchvision:vit_b_16", image_size=64).inputs == InputSpec.of_shape(
            (1, 3, 64, 64)
        )


@pytest.mark.slow
def test_inception_takes_299_pixels_and_does_not_warn():
    assert load("torchvision:inception_v3").inputs == InputSpec.of_shape((1, 3, 299, 299))


def test_segmentation_networks_do_not_download_a_backbone(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert load("torchvision:lraspp_mobilenet_v3_large").inputs is None


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_a_failed_download_says_what_to_do(monkeypatch, spec):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr("timm.create_model", offline)
    text = message(WeightsError, lambda: load(spec, weights="pretrained"))
    assert "no route to host" in text
    assert "Check the network or its proxy, or download a file elsewhere" in text


@pytest.mark.parametrize("spec", ["onebyone:classic", "{net}:make"])
def test_only_libraries_have_pretrained_weights(net, spec):
    spec = spec.format(net=net)
    with pytest.raises(WeightsError, match="no pretrained weights to download"):
        load(spec, weights="pretrained")


def test_a_factory_in_a_file_is_called_with_options_and_may_import_its_neighbours(net):
    path = list(sys.path)
    assert load(f"{net}:make").model.conv.out_channels == 3
    assert load(f"{net}:make", width=5).model.conv.out_channels == 5
    assert load(f"{net}:Net").model.conv.out_channels == 4
    assert sys.path == path
    compiled = {file.name.partition(".")[0] for file in net.parent.rglob("*.pyc")}
    assert "net" not in compiled


def test_a_module_may_declare_its_input_shape(net):
    assert load(f"{net}:make").inputs == InputSpec.of_shape((1, 2, 9, 11))
    net.write_text("from torch import nn\ndef make():\n    return nn.Conv2d(1, 2, 3)\n")
    assert load(f"{net}:make").inputs is None
    net.write_text(
        net.read_text().replace("return", "m =") + "    m.input_shape = 9\n    return m\n"
    )
    with pytest.raises(ModelError, match=r"`input_shape` of the module .* got 9"):
        load(f"{net}:make")


def test_a_changed_file_is_run_anew(net):
    assert build(f"{net}:make").conv.out_channels == 3
    net.write_text(net.read_text().replace("width=3", "width=6"))
    assert build(f"{net}:make").conv.out_channels == 6


def test_errors_of_a_file_name_it_and_the_line(net):
    text = message(ModelError, lambda: build(f"{net}:fails"))
    assert text == f"{net}, line 19: KeyError: 'weights'"
    net.write_text("import nowhere_at_all\n")
    text = message(ModelError, lambda: build(f"{net}:make"))
    assert f"{net}, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'" in text
    net.write_text("x = 1\ndef make(:\n")
    assert f"{net}, line 2: SyntaxError" in message(ModelError, lambda: build(f"{net}:make"))
    net.write_text("import sys\n\nsys.exit('usage')\n")
    assert f"{net}, line 3: SystemExit: usage" in message(ModelError, lambda: build(f"{net}:make"))


def test_a_failed_file_leaves_no_module_behind(net):
    before = set(sys.modules)
    net.write_text("raise ValueError\n")
    message(ModelError, lambda: build(f"{net}:make"))
    assert set(sys.modules) == before


def test_a_factory_must_return_a_module(net):
    with pytest.raises(ModelError, match=r"must return an nn.Module: 'returns_text' .* a str"):
        build(f"{net}:returns_text")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("onebyone:clasic", ["Did you mean 'classic'?", "convolution-only"]),
        ("onebyone:nin-cifar", ["'nin-cifar10'", "'nin-cifar100'"]),
        ("torchvision:resnet81", ["No model of torchvision named 'resnet81'", "'resnet18'"]),
        ("timm:resnet18x", ["No model of timm named 'resnet18x'", "'resnet18'"]),
        ("timm:resnet18.nope", ["resnet18.a1_in1k"]),
        ("torchvison:resnet18", ["No library of models named 'torchvison'", "'torchvision'?"]),
        ("resnet18", ["timm:resnet18", "torchvision:resnet18"]),
        (
            "nothing-like-it",
            ["onebyone:NAME", "path/net.py:FACTORY", "net.onnx", "folder of a run"],
        ),
        ("runs/none", ["looks like a run's folder, but nothing is there", "onebyone:NAME"]),
        ("{net}:mkae", ["function in", "Did you mean 'make'?", "Net, fails, make, returns_text."]),
        ("{net}", ["net.py:make"]),
        ("{folder}/tiny.onx", ["Did you mean", "tiny.onnx"]),
        ("{folder}/nett.py:make", ["No Python file named", "Did you mean", "net.py'"]),
        ("nowhere/net.py:make", ["no .py file in nowhere"]),
    ],
)
def test_names_that_are_wrong_lead_to_the_right_ones(net, spec, parts):
    (net.parent / "tiny.onnx").touch()
    text = message(UnknownNameError, lambda: build(spec.format(net=net, folder=net.parent)))
    for part in parts:
        assert part in text
    assert "_hidden" not in text


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("onebyone:classic", {"clases": 3}, r"with clases=3.*It takes: .*num_classes"),
        ("torchvision:resnet18", {"clases": 3}, "cannot be built with clases=3: .*unexpected"),
        ("timm:resnet18", {"clases": 3}, "cannot be built with clases=3: .*unexpected"),
        ("onebyone:classic", {"num_classes": [3]}, "`num_classes` is a list"),
    ],
)
def test_options_that_are_not_taken_are_refused(spec, options, text):
    with pytest.raises(OptionError, match=text):
        load(spec, **options)


def test_options_of_a_files_factory_are_checked_before_it_runs(net):
    with pytest.raises(
        OptionError, match=r"cannot be called with widht=5.*It takes: \*, width=3|width=3"
    ):
        build(f"{net}:make", widht=5)


def test_weights_of_another_network_name_the_network(tmp_path):
    save_weights(build("onebyone:classic"), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="not those of onebyone:convolution-only"):
        load("onebyone:convolution-only", weights=tmp_path / "w.safetensors")


def test_names_of_an_unknown_library_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'timm'"):
        available("tim")


@pytest.mark.parametrize("prefix", ["onebyone", "torchvision", "timm"])
def test_available_names_are_sorted_and_can_be_asked_for(prefix):
    names = available(prefix)
    assert names == sorted(names)
    assert {"onebyone": "classic"}.get(prefix, "resnet18") in names


def test_loaded_records_compare_by_what_they_hold():
    loaded = load("onebyone:classic")
    assert isinstance(loaded.model, nn.Module)
    with pytest.raises(AttributeError):
        loaded.model = None
