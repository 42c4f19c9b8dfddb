"""A network of several inputs goes through each stage, or the stage says that it takes one tensor."""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

import onebyone as obo
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import as_calibration
from onebyone.calibration.prefix_cache import ResumedPasses
from onebyone.core.errors import NetworkInputError
from onebyone.core.records import Plan, Profile
from onebyone.data import as_data
from onebyone.profiling.bench import BenchRecord
from onebyone.runtimes import difference, find_runtime, outputs_of


class Two(nn.Module):
    """An image and words, with a number, a tensor in a dictionary, and a mask that may be absent."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, image, ids, scale=1.0, prior=None, mask=None):
        if mask is not None:
            image = image * mask
        x = self.body(image).mean((2, 3)) * scale
        if prior is not None:
            x = x + prior["mean"]
        return self.head(torch.cat([x, self.words(ids).mean(1)], 1))


class Separate(nn.Module):
    """The same layers on one tensor, from which the other inputs are made."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, image):
        return self.inside(image, torch.zeros(len(image), 5, dtype=torch.long))


def network():
    torch.manual_seed(0)
    net = Two()
    nn.init.uniform_(net.body[1].running_mean)
    return net.eval()


def by_keyword(batch=2):
    draw = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(batch, 3, 9, 7, generator=draw),
        "ids": torch.randint(0, 10, (batch, 5), generator=draw),
        "scale": 0.5,
        "prior": {"mean": torch.randn(batch, 8, generator=draw)},
        "mask": None,
    }


def by_position():
    return tuple(by_keyword().values())[:3]


FORMS = pytest.mark.parametrize(
    "example", [by_keyword(), by_position()], ids=["keyword", "position"]
)


@FORMS
def test_a_profile_counts_one_example_and_times_the_batch(example):
    record = obo.profile(network(), example=example, rounds=3)
    alone = obo.profile(Separate(network()), input_shape=(1, 3, 9, 7), timed=False)
    assert record.macs == alone.macs
    assert record.inputs.batch == record.latency["eager"].batch == 2
    assert {layer.name for layer in record.layers if layer.timing} >= {"body.0", "head"}
    assert "image" in str(record) or "2×3×9×7" in str(record)
    assert Profile.from_json(record.to_json()) == record


@FORMS
def test_runtimes_give_the_networks_outputs(example):
    net = network()
    reference = outputs_of(net(**example) if isinstance(example, dict) else net(*example))
    for name in ("eager", "channels-last", "onnxruntime", "openvino"):
        runtime = find_runtime(name)
        assert difference(reference, outputs_of(runtime.on(net, example)())).same, name


def test_a_file_has_no_input_for_a_tensor_that_is_not_read():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, unused, x):
            return self.layer(x)

    net, inputs = Half().eval(), (torch.randn(1, 4), torch.randn(1, 3))
    for name in ("onnxruntime", "openvino"):
        assert difference(
            [net(*inputs).detach()], outputs_of(find_runtime(name).on(net, inputs)())
        ).same


def test_bench_leaves_out_by_name_what_takes_one_tensor():
    record = obo.bench(
        network(), example=by_keyword(), rounds=3, runtimes=["eager", "channels-last"]
    )
    assert BenchRecord.from_json(record.to_json()) == record
    with pytest.raises(NetworkInputError, match=r"The runtime 'packed' needs .* one tensor"):
        obo.bench(network(), example=by_keyword(), rounds=3, runtimes=["eager", "packed"])


def test_networks_are_compared_on_an_example():
    record = obo.compare(network(), network(), example=by_keyword(), rounds=3)
    first, second = record.contenders
    assert first.measured.macs == second.measured.macs
    assert first.measured.peak_activation_bytes is not None
    assert record.inputs.call.startswith("(image=image, ids=ids, scale=0.5, prior={'mean':")


@FORMS
@pytest.mark.parametrize("change", [obo.fold, obo.deepen])
def test_exact_rewrites_keep_the_function_and_their_plan_restructures(change, example):
    net = network()
    changed, plan = change(net, example)
    assert plan.choices
    given = dict(zip(("image", "ids", "scale"), by_position(), strict=True))
    assert_close(changed(**given), net(**given), atol=1e-5, rtol=1e-4)
    again = obo.restructure(net, Plan.from_json(plan.to_json()))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in changed.named_parameters()
    }


def test_a_plan_without_data_is_carried_out():
    net, example = network(), by_keyword()
    full = obo.apply(net, obo.uniform_plan(net, example, ranks=1.0), None)
    assert_close(full(**example), net(**example), atol=1e-5, rtol=1e-4)
    half = obo.uniform_plan(net, example)
    small = obo.apply(net, Plan.from_json(half.to_json()), None)
    traced = obo.profile(small, example=example, timed=False)
    assert traced.macs == half.after.macs
    assert traced.params == half.after.params


def test_stages_that_take_one_tensor_say_so(tmp_path):
    net, out = network(), tmp_path / "out"
    with pytest.raises(NetworkInputError, match=r"Int8 needs .* one tensor .* Wrap it in a module"):
        obo.export(net, out, data=several(12), precision="int8")
    with pytest.raises(NetworkInputError, match=r"explain needs .* one tensor .* Wrap it"):
        obo.explain(net, Image.new("RGB", (7, 9)), data=as_data(several(12)))
    assert not out.exists()


def several(count):
    """Return examples whose labels are the network's own decisions."""
    draw = torch.Generator().manual_seed(2)
    inputs = {
        "image": torch.randn(count, 3, 9, 7, generator=draw),
        "ids": torch.randint(0, 10, (count, 5), generator=draw),
        "scale": 0.5,
    }
    with torch.no_grad():
        return inputs, network()(**inputs).argmax(1)


class Items(Dataset):
    """The same examples one by one, each a mapping as transformers' data sets give."""

    def __init__(self, count):
        inputs, _ = several(count)
        self.inputs = {name: inputs[name] for name in ("image", "ids")}
        with torch.no_grad():
            self.labels = network()(**self.inputs).argmax(1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        own = {name: each[index] for name, each in self.inputs.items()}
        return {**own, "labels": int(self.labels[index])}


def test_a_plan_on_data_is_carried_out_and_compared():
    net, examples = network(), several(40)
    plan = obo.plan(net, examples[0], budget="macs=60%", task="classification")
    assert plan.inputs.call == "(image=image, ids=ids, scale=0.5)"
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert any(option.measured for option in plan.choices)
    small = obo.apply(net, plan, examples[0], task="classification")
    record = obo.compare(net, small, data=examples, task="classification", rounds=3)
    first, second = record.contenders
    assert first.measured.metric.value == 1
    assert second.measured.macs == plan.after.macs
    assert second.agreement.value == second.measured.metric.value
    assert record.inputs == plan.inputs


def test_a_plan_of_full_ranks_is_checked_on_the_data():
    net = network()
    plan = obo.uniform_plan(net, by_keyword(), ranks=1.0)
    full = obo.apply(net, plan, several(8)[0])
    assert_close(full(**by_keyword()), net(**by_keyword()), atol=1e-5, rtol=1e-4)


def test_a_plan_without_data_takes_an_example():
    plan = obo.plan(network(), None, example=by_keyword(), budget="params=70%")
    assert plan.inputs.batch == 1
    assert plan.after.params <= 0.7 * plan.before.params


def test_a_data_set_of_mappings_is_scored():
    net = network()
    scored = obo.evaluate(net, Items(10), task="classification")
    assert scored.value == 1


def test_curvature_and_cached_passes_see_each_input():
    data = as_calibration(several(12)[0])
    net = network()
    meaning = meaning_of(net, data, "classification")
    found = output_curvature(net, ["body.0", "head"], data.batches, meaning=meaning)
    assert set(found) == {"body.0", "head"}
    batches = list(data.batches())
    passes = ResumedPasses(net, batches, ["body.3", "head"])
    with torch.no_grad():
        whole = net(**batches[0])
    (same,) = next(passes.outputs("body.3", net.body[3]))
    assert_close(same, whole)
    assert passes.resumed
