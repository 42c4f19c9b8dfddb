"""The comparison with peers: the search for a share, what is kept, and going on."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from onebyone.data import Data, TensorSplit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTH = 40


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_in_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def peers():
    import peers

    return peers


@pytest.fixture(scope="module")
def tools():
    import peer_tools

    return peer_tools


def network(width=WIDTH):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip


def narrower(task, removed):
    return network(max(1, round(WIDTH * (1 - removed))))


def data():
    generator = torch.Generator().manual_seed(0)

    def split(n):
        images = torch.randn(n, 3, 4, 4, generator=generator)
        return TensorSplit(images, torch.arange(n) % 4)

    return Data(
        name="noise", train=split(96), validation=split(16), test=split(32),
        classes=("a", "b", "c", "d"), seed=0,
    )  # fmt: skip


def task(tools, model=None):
    return tools.Task(model or network(), torch.zeros(1, 3, 4, 4), data().train, Path())


# ---------------------------------------------------------------- the search for a share


def test_macs_are_those_of_the_formula(tools):
    assert tools.count_macs(network(), torch.zeros(1, 3, 4, 4)) == 16 * (9 * 3 + 4) * WIDTH


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.05])
def test_the_largest_network_within_the_share_is_found(tools, share):
    small = tools.at_share(narrower, task(tools), share)
    assert small[0].out_channels == int(share * WIDTH)


def test_where_macs_jump_up_again_the_larger_of_those_within_is_kept(tools):
    def jumps(_, removed):
        # Within the share at the middle, then far below it just before.
        return network(20 if removed >= 0.49 else 2 if removed >= 0.24 else WIDTH)

    assert tools.at_share(jumps, task(tools), 0.5)[0].out_channels == 20


def test_a_share_that_no_setting_reaches_is_refused(tools):
    with pytest.raises(ValueError, match="no setting leaves 50% of the MACs"):
        tools.at_share(lambda *_: network(), task(tools), 0.5)


@pytest.mark.parametrize("name", ["fasterai", "tltorch", "torch-pruning", "aimet-spatial"])
def test_a_peer_leaves_the_given_network_alone(tools, name, tmp_path):
    peer = tools.PEERS[name]
    module = {"tensorly-torch": "tltorch"}.get(peer.package, peer.package.replace("-", "_"))
    pytest.importorskip(module)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = tools.Task(model, torch.zeros(1, 3, 4, 4), data().train, tmp_path)
    small = peer.make(given, 0.5)
    assert small(given.example).shape == (1, 4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- what is kept


def row(peers, **changes):
    record = {
        "network": "net", "by": "fasterai", "version": "1.0", "share": 50.0, "epochs": 0,
        "macs": 0.49, "params": 0.6, "metric": "accuracy", "before": 0.9, "after": 0.5,
        "change": (-0.4, -0.5, -0.3), "n": 100, "test": "exact McNemar test", "agreement": 0.5,
        "divergence": 2.0, "held_out": 10, "held_out_agreement": 0.6, "held_out_divergence": 1.5,
        "less": None, "less_agreement": None,
        "calibration": 0, "examples": 0, "rate": 0.0, "seed": 0, "seconds": 1.0,
        "runtime": "eager", "time": (0.8, 0.7, 0.9), "equal": False, "faster": None,
        "ours_divergence": None, "machine": "this", "threads": 1,
    }  # fmt: skip
    return peers.Row(**(record | changes))


def test_lines_are_told_apart_by_what_makes_other_networks_and_by_nothing_measured(peers):
    one = row(peers)
    others = {
        "network": "other", "by": "tltorch", "share": 40.0, "epochs": 2, "examples": 10,
        "seed": 1, "runtime": "openvino", "equal": True,
    }  # fmt: skip
    for name, value in others.items():
        assert row(peers, **{name: value}).key != one.key
    for name in {field.name for field in dataclasses.fields(peers.Row)} - set(others):
        assert row(peers, **{name: "other"}).key == one.key


def test_the_last_line_of_a_kind_counts_and_reads_back_as_it_was(peers, tmp_path):
    last = row(peers, after=0.7)
    for record in (row(peers), row(peers, epochs=2), last):
        peers.keep(tmp_path / "results.jsonl", record)
    rows, failures = peers.load(tmp_path)
    assert rows == [last, row(peers, epochs=2)]
    assert failures == []


def test_a_failure_is_shown_until_the_tool_gives_that_network(peers, tmp_path):
    for epochs in (0, 2):
        failure = peers.Failure("net", "fasterai", "1.0", 50.0, epochs, 0, 0, "OSError: no")
        peers.keep(tmp_path / "failures.jsonl", failure)
    peers.keep(tmp_path / "results.jsonl", row(peers))
    rows, failures = peers.load(tmp_path)
    assert [failure.epochs for failure in failures] == [2]
    (table,) = peers.tables(rows, failures)
    assert table.notes[-1] == "fasterai 1.0, Tucker gave no network, after 2 epochs: OSError: no"


def test_the_table_has_the_best_first_and_the_distilled_after_the_one_shot(peers):
    rows = [
        row(peers, by="onebyone", epochs=2, examples=512, rate=1e-3, held_out_divergence=0.1),
        row(peers, held_out_divergence=2.0),
        row(
            peers, by="tltorch", held_out_divergence=1.0,
            less=(-0.1, -0.2, 0.0), less_agreement=(-0.02, -0.03, -0.01),
        ),
    ]  # fmt: skip
    (table,) = peers.tables(rows, [])
    assert [line[:2] for line in table.rows] == [
        ["tltorch 1.0, Tucker", "one-shot"],
        ["fasterai 1.0, Tucker", "one-shot"],
        ["**onebyone**", "2 epochs of 512 images, rate 0.001"],
    ]
    assert table.rows[0][2:] == [
        "49.0 %", "60.0 %", "50.0 %", "-40.0 [-50.0 … -30.0]", "-10.0 [-20.0 … +0.0]",
        "60.0 %", "-2.0 [-3.0 … -1.0]", "1", "80 % [70–90]",
    ]  # fmt: skip
    assert table.rows[1][6] == table.rows[1][8] == ""


# ---------------------------------------------------------------- going on


@pytest.fixture
def bench(peers, tools, tmp_path, monkeypatch):
    """Benches of one folder on a small network, and what their peer was asked for."""
    asked = []

    def make(given, removed):
        asked.append(removed)
        return narrower(given, removed)

    def failing(*_):
        raise OSError("no")

    subject = SimpleNamespace(network=network, data=data, metric="accuracy", examples=16)
    monkeypatch.setitem(peers.SUBJECTS, "small", subject)
    monkeypatch.setitem(peers.PEERS, "made", tools.Peer("torch", "made {}", make))
    monkeypatch.setitem(peers.PEERS, "failing", tools.Peer("torch", "failing {}", failing))

    def new(**changes):
        options = {
            "network": "small", "by": ["made"], "macs": [50.0], "runtime": "eager",
            "calibration": None, "epochs": 0, "train": None, "held_out": 24, "seed": 0,
            "equal_divergence": False, "shares": [60.0], "folder": tmp_path,
        }  # fmt: skip
        return peers.Bench(SimpleNamespace(**(options | changes)))

    return SimpleNamespace(new=new, asked=asked, folder=tmp_path)


def test_a_second_run_makes_and_scores_nothing_again(bench, peers):
    bench.new(epochs=1).run()
    count, lines = len(bench.asked), (bench.folder / "results.jsonl").read_text()
    assert [json.loads(line)["epochs"] for line in lines.splitlines()] == [0, 1]
    bench.new(epochs=1).run()
    assert len(bench.asked) == count
    assert (bench.folder / "results.jsonl").read_text() == lines


def test_a_line_that_was_lost_is_scored_again_from_the_kept_network(bench, peers):
    bench.new(epochs=1).run()
    count = len(bench.asked)
    before, _ = peers.load(bench.folder)
    (bench.folder / "results.jsonl").unlink()
    bench.new(epochs=1).run()
    after, _ = peers.load(bench.folder)
    assert len(bench.asked) == count
    untimed = [[dataclasses.replace(line, time=None) for line in both] for both in (before, after)]
    assert untimed[0] == untimed[1]  # the rate and the seconds of the making too
    assert after[1].rate > 0


def test_a_peer_is_set_beside_ours_on_the_same_examples_whichever_is_asked_first(bench, peers):
    bench.new(by=["made", "onebyone"]).run()
    (ours, theirs), _ = peers.load(bench.folder)
    assert (ours.by, ours.less, ours.less_agreement) == ("onebyone", None, None)
    assert theirs.less[0] == pytest.approx(theirs.after - ours.after)
    gap = theirs.held_out_agreement - ours.held_out_agreement
    assert theirs.less_agreement[0] == pytest.approx(gap)
    assert theirs.less[1] <= theirs.less[0] <= theirs.less[2]
    (bench.folder / "results.jsonl").unlink()
    bench.new(by=["made"]).run()  # ours is on the disk
    (again,), _ = peers.load(bench.folder)
    assert again.less == theirs.less


def test_what_fails_is_kept_and_the_others_go_on(bench, peers):
    bench.new(by=["failing", "made"]).run()
    rows, failures = peers.load(bench.folder)
    assert [line.by for line in rows] == ["made"]
    assert [failure.why for failure in failures] == ["OSError: no"]


def test_images_held_out_are_neither_trained_nor_calibrated_on(bench):
    made = bench.new()
    held = {tuple(image.flatten().tolist()) for image, _ in made.held_out.batches(1)}
    assert len(held) == 24
    for part in (made.data.train, made.inputs):
        assert held.isdisjoint(tuple(image.flatten().tolist()) for image, _ in part.batches(1))
    assert len(made.data.train) == 96 - 24


def test_ours_of_equal_divergence_is_the_fastest_that_is_not_farther(bench, monkeypatch):
    made = bench.new(equal_divergence=True, shares=[80.0, 60.0, 40.0])
    small = {80.0: 0.01, 60.0: 0.1, 40.0: 3.0}

    def ours(budget):
        share = float(budget.removeprefix("latency=").removesuffix("%"))
        other = network()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + small[share])
        return other

    monkeypatch.setattr(made, "_ours", ours)
    peer = ours("latency=40%")
    with torch.no_grad():
        peer[0].weight.mul_(0.5)
    limits = [made._at_equal_divergence(peer, limit) for limit in (0.0, 1e9)]
    assert limits[0] == (None, None)
    apart = limits[1][1]
    between = made._at_equal_divergence(peer, apart * 0.99)[1]
    assert 0 < between < apart
    assert between == made._at_equal_divergence(peer, between)[1]
