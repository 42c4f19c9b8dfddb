"""The measurement measures: true counts, real times, pictures that are what they are said to be."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from onebyone.article import layer as layer_module
from onebyone.article import measure, networks, pictures, render_article
from onebyone.article.measure import default_epochs, measure_article
from onebyone.article.networks import MAKERS, Trainer, best_trial, network_cost, seeded
from onebyone.article.pictures import activation_maps, variance_kept, weighting, wide_network
from onebyone.article.record import ArticleRecord, SeedRun
from onebyone.article.shelf import Shelf
from onebyone.core.errors import ModelError, OptionError
from onebyone.core.records import Cost
from onebyone.data import Data, TensorSplit
from onebyone.networks.layers import Pointwise
from onebyone.networks.zoo import convolution_only


def split(n, seed, classes=10):
    """Make pictures whose class can be seen: a bright row for each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.rand((n, 1, 28, 28), generator=generator) * 40
    images[torch.arange(n), 0, 2 * labels + 4] += 200
    return TensorSplit(images.to(torch.uint8), labels, mean=(0.1,), std=(0.2,))


@pytest.fixture(scope="module")
def data():
    return Data(
        name="rows",
        train=split(60, 0),
        validation=split(20, 1),
        test=split(40, 2),
        classes=tuple("abcdefghij"),
    )


def pixels(address):
    head, _, body = address.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


# ---------------------------------------------------------------- counts and times


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        (
            "classic",
            Cost(params=316_532, macs=27 * 784 + 1728 * 196 + 313_600 + 1_000, bytes=4 * 316_532),
        ),
        (
            "convolution-only",
            Cost(params=4_232, macs=27 * 784 + 1728 * 196 + (2048 + 320) * 49, bytes=4 * 4_232),
        ),
        (
            "plain",
            Cost(params=254 + 3_930, macs=27 * 784 + 216 * 196 + 3_920, bytes=4 * (254 + 3_930)),
        ),
        (
            "extra-nonlinearity",
            Cost(
                params=326 + 3_930,
                macs=27 * 784 + 216 * 196 + 64 * 49 + 3_920,
                bytes=4 * (326 + 3_930),
            ),
        ),
    ],
)
def test_costs_are_those_of_the_layers(name, cost):
    assert network_cost(name) == cost


@pytest.mark.slow
@pytest.mark.clock
def test_the_layers_are_counted_and_timed_warm_and_cold():
    told = []
    found = layer_module.compare_layers(rounds=3, cold_processes=1, step=told.append)
    assert found.pointwise == Cost(params=16_416, macs=512 * 32 * 144, bytes=4 * 16_416)
    assert found.spatial == Cost(params=147_488, macs=9 * 512 * 32 * 144, bytes=4 * 147_488)
    assert found.output_shape == (32, 12, 12)
    assert {times.batch for times in found.times} == {1, 32}
    assert {times.pointwise.threads for times in found.times} == {1, torch.get_num_threads()}
    assert {calls.first for calls in found.cold} == {"pointwise", "spatial"}
    assert all(min(calls.pointwise_ms, calls.spatial_ms) > 0 for calls in found.cold)
    assert len(told) == len(found.times) + len(found.cold)


def test_a_process_that_cannot_be_started_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(layer_module.sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match=r"fresh Python process .* /nowhere/python failed"):
        layer_module._cold_calls(("spatial", "pointwise"))


# ---------------------------------------------------------------- training


def test_a_seed_gives_the_same_network_and_leaves_the_global_state():
    state = torch.random.get_rng_state()
    first, second, other = (seeded(MAKERS["classic"], seed) for seed in (3, 3, 4))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.head.hidden.weight, other.head.hidden.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_rate_that_diverges_is_passed_over(data, monkeypatch):
    def diverge(*args, **kwargs):
        raise ModelError("The loss must stay finite")

    monkeypatch.setattr(networks, "train", diverge)
    trainer = Trainer(data, epochs=1, shelf=Shelf(None, data=data))
    assert trainer.trial("plain", 1e6, lambda fraction, message: None) is None
    with pytest.raises(ModelError, match="must stay finite"):
        trainer.run("plain", 0, 1e6, lambda fraction, message: None)


def test_the_rate_is_chosen_by_validation_then_by_loss(data):
    from article_records import log

    good = SeedRun(network="a", seed=9, log=log(0.1, validation=0.9, losses=(0.2,)))
    better = SeedRun(network="a", seed=9, log=log(0.2, validation=0.9, losses=(0.1,)))
    worse = SeedRun(network="a", seed=9, log=log(0.3, validation=0.8, losses=(0.0,)))
    assert best_trial((good, better, worse)) is better


@pytest.mark.parametrize(("examples", "epochs"), [(1_200, 25), (3_000, 10), (55_000, 6), (1, 25)])
def test_small_data_is_passed_over_more_often(examples, epochs):
    assert default_epochs(examples) == epochs


# ---------------------------------------------------------------- pictures


def test_the_weighting_is_a_multiplication_by_four(data):
    found = weighting(convolution_only().eval(), data)
    assert_close(
        torch.tensor(found.after_range, dtype=torch.float64),
        4 * torch.tensor(found.before_range, dtype=torch.float64),
    )
    assert pixels(found.before).shape == pixels(found.after).shape == pixels(found.image).shape


def maps_of(rank, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(channels, rank, generator=generator, dtype=torch.float64)
    return torch.einsum(
        "cr,nrhw->nchw", basis, torch.randn(5, rank, 4, 3, generator=generator, dtype=torch.float64)
    )


def test_as_many_sums_as_the_maps_have_rank_keep_everything():
    kept, best = variance_kept(iter(maps_of(3).split(2)), Pointwise(6, 3, dtype=torch.float64))
    assert (kept, best) == pytest.approx((1.0, 1.0))


def test_principal_components_keep_the_most_that_can_be_kept():
    maps = maps_of(6)
    flat = maps.movedim(1, -1).reshape(-1, 6)
    components = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors[:, -2:]
    layer = Pointwise(6, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(components.T[:, :, None, None])
    kept, best = variance_kept(iter(maps.split(2)), layer)
    assert kept == pytest.approx(best)
    layer.weight.data.mul_(-7)  # another basis of the same sums
    assert variance_kept(iter(maps.split(2)), layer)[0] == pytest.approx(best)


def test_the_share_that_is_kept_is_that_of_the_least_squares_fit():
    maps, layer = maps_of(6), Pointwise(6, 2, dtype=torch.float64)
    flat = maps.movedim(1, -1).reshape(-1, 6)
    flat = flat - flat.mean(dim=0)
    sums = flat @ layer.weight.detach()[:, :, 0, 0].T
    left = flat - sums @ torch.linalg.lstsq(sums, flat).solution
    kept, best = variance_kept(iter(maps.split(2)), layer)
    assert kept == pytest.approx(1 - float(left.square().sum() / flat.square().sum()))
    assert kept < best


def test_dead_and_doubled_filters_are_no_harm():
    layer = Pointwise(6, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2] = layer.weight[0]
    kept, best = variance_kept(iter([maps_of(6)]), layer)
    assert 0 < kept < best <= 1


def test_the_wide_network_has_the_articles_512_maps_of_12_by_12():
    network = wide_network()
    maps = network[:5](torch.zeros(1, 1, 28, 28))
    assert maps.shape == (1, 512, 12, 12)
    assert network[5](maps).shape == (1, 32, 12, 12)


def test_activation_maps_are_of_right_answers_first_then_of_mistakes(data):
    torch.manual_seed(0)
    network = convolution_only().eval()
    found = activation_maps(network, data)
    rights = [example.right for example in found]
    assert rights == sorted(rights, reverse=True)
    assert len({example.label for example in found if example.right}) == sum(rights)
    with torch.inference_mode():
        scores = torch.cat([network(inputs) for inputs, _ in data.test.batches(40)])
    for example in found:
        assert data.classes[int(scores[example.index].argmax())] == example.predicted
        assert data.classes[int(data.test.targets[example.index])] == example.label
        assert bool(example.label_map) is not example.right


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("article")
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "WIDE_PICTURES", 60)
        state = torch.random.get_rng_state()
        record = measure_article(
            data,
            seeds=2,
            epochs=2,
            rounds=3,
            cold_processes=1,
            folder=folder,
            progress=lambda *step: steps.append(step),
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        yield record, folder, steps


@pytest.mark.slow
def test_a_measurement_has_every_figure_of_every_seed(measured, data):
    record, _, _ = measured
    for duel in (record.heads, record.nonlinearity):
        for network in (duel.before, duel.after):
            assert [run.seed for run in network.runs] == [0, 1]
            assert {run.log.augmentation for run in network.runs} == {"none"}
            assert len(network.trials) == 3
            assert all(trial.test is None for trial in network.trials)
            assert all(run.test.n == 40 and run.train.n == 60 for run in network.runs)
    assert record.data == data.info()
    assert record.reduction.kept <= record.reduction.best <= 1
    assert set(record.seconds) == {"layers", "heads", "extra non-linearity", "pictures"}


@pytest.mark.slow
def test_a_measurement_saves_prints_and_makes_a_page(measured, tmp_path):
    record, _, _ = measured
    record.save(tmp_path / "article.json")
    assert ArticleRecord.load(tmp_path / "article.json") == record
    assert "75 times fewer" in str(record)
    assert "<title>What is a 1×1 convolution good for?</title>" in render_article(record)


@pytest.mark.slow
def test_progress_never_goes_back_and_ends_at_the_end(measured):
    _, _, steps = measured
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert {step[1] for step in steps} == {steps[-1][0]}


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on_where_it_stopped(measured, data, monkeypatch):
    record, folder, _ = measured
    (folder / "extra-nonlinearity-seed1.json").unlink()
    trained = []
    original = networks.train

    def count(model, *args, **kwargs):
        trained.append(kwargs["seed"])
        return original(model, *args, **kwargs)

    monkeypatch.setattr(networks, "train", count)
    monkeypatch.setattr(pictures, "train", None)
    again = measure_article(data, seeds=2, epochs=2, rounds=3, cold_processes=1, folder=folder)
    assert trained == [1]
    assert again.heads.before.runs == record.heads.before.runs
    # The missing one was trained anew to the same figures.
    assert again.nonlinearity.after.test == record.nonlinearity.after.test
    assert again.activations == record.activations
    assert again.reduction == record.reduction


@pytest.mark.slow
def test_a_folder_of_another_measurement_is_refused(measured, data, monkeypatch):
    _, folder, _ = measured
    monkeypatch.setattr(measure, "compare_layers", lambda **kwargs: None)
    with pytest.raises(OptionError, match="epochs 2 instead of 3"):
        measure_article(data, seeds=2, epochs=3, rounds=3, folder=folder)


def test_other_pictures_are_refused():
    color = TensorSplit(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10)
    data = Data(
        name="color", train=color, validation=color, test=color, classes=tuple("0123456789")
    )
    with pytest.raises(OptionError, match=r"28×28 pixels in 10 classes, got 3×32×32 in 10"):
        measure_article(data)


@pytest.mark.parametrize("name", ["seeds", "epochs", "cold_processes"])
def test_numbers_below_one_are_refused(data, name):
    with pytest.raises(OptionError, match=f"`{name}` must be at least 1, got 0"):
        measure_article(data, **{name: 0})
