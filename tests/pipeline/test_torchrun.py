"""Several processes do what one does, and an error in one of them ends them all."""

import json
import os
import subprocess
import sys

import in_processes
import pytest
import torch
from torch.testing import assert_close

from onebyone.cli import main

pytestmark = pytest.mark.slow  # each start of several processes imports torch in all of them

# A share of a batch sums its gradients in another order, so the weights differ by rounding.
CLOSE = {"rtol": 0, "atol": 1e-5}
# Fails in its training once a process of that rank has run it that often.
NET = """
import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 10),
        )
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 30 and os.environ["RANK"] == "1" and "BAD" in os.environ:
            if os.environ["BAD"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("too bad")
        return self.body(x)

def make():
    return Net()
"""


def torchrun(count, *command, cwd=None, **environment):
    """Run a command in several processes; return what it printed and its status."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *map(str, command)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        launch, env=variables, capture_output=True, text=True, timeout=300, check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    """What three processes make of each work."""
    out = tmp_path_factory.mktemp("works") / "results.pt"
    ended = torchrun(3, in_processes.__file__, out, *in_processes.WORKS)
    assert ended.returncode == 0, ended.stderr
    return torch.load(out, weights_only=False) | {"folder": out.with_name("run")}


@pytest.fixture(scope="module")
def of_one():
    threads = torch.get_num_threads()
    yield in_processes.done(in_processes.WORKS)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("work", in_processes.WORKS)
def test_three_processes_find_the_weights_of_one(of_one, of_three, work):
    weights, epochs, how = of_three["results"][work]
    alone, epochs_alone, how_alone = of_one[work]
    assert how == how_alone  # also the rate that trials chose
    losses, losses_alone = ([loss for loss, _ in each] for each in (epochs, epochs_alone))
    # A loss near zero is a difference of outputs that rounding moves more.
    assert_close(losses, losses_alone, rtol=1e-3, atol=1e-3 * max(losses_alone))
    assert weights.keys() == alone.keys()
    for name in alone:
        assert_close(weights[name], alone[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_processes_share_the_loading(of_one, of_three):
    alone, together = in_processes.READ[0], of_three["read"][0]
    # Before the training all look at some examples, and the last batch is too small to share.
    assert alone <= together < 2 * alone


def test_all_processes_have_the_same_weights(of_three):
    first, *others = of_three["alike"]
    for other in others:
        for work in first:
            assert all(torch.equal(first[work][name], other[work][name]) for name in first[work])


def test_three_processes_sum_the_moments_of_one(of_three):
    ours, across = in_processes.moments()
    theirs, theirs_across = of_three["moments"]
    for one, other in zip([ours, *across], [theirs, *theirs_across], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            for mine, yours in zip(one[name], other[name], strict=True):
                for value, wanted in zip(vars(yours).values(), vars(mine).values(), strict=True):
                    assert_close(value, wanted, rtol=5e-5, atol=1e-6)  # sums in float32


def test_three_processes_make_the_plan_of_one(of_three):
    plan, _, outputs = in_processes.planned()
    for other, _, others_outputs in of_three["plans"]:
        assert [choice_of(option) for option in other.choices] == list(map(choice_of, plan.choices))
        assert other.after == plan.after
        assert other.left_alone == plan.left_alone
        assert_close(other.harm, plan.harm, rtol=1e-2, atol=0)
        # Fitted weights may be far apart where the outputs hardly depend on them.
        assert_close(others_outputs, outputs, rtol=0, atol=1e-4 * float(outputs.abs().max()))
    first, *rest = of_three["plans"]
    for other in rest:
        assert other[0] == first[0]
        assert all(torch.equal(first[1][name], other[1][name]) for name in first[1])


def choice_of(option):
    return option.site, option.steps


def test_all_processes_have_the_plan_that_one_has_timed(of_three):
    first, *rest = of_three["timed"]
    assert first.latency is not None
    assert all(other == first for other in rest)


def test_three_processes_make_the_run_of_one(of_three, tmp_path):
    alone = in_processes.shrunk(tmp_path / "run")
    run = of_three["run"]
    assert {path.name for path in of_three["folder"].iterdir()} == {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert list(map(choice_of, run.plan.choices)) == list(map(choice_of, alone.plan.choices))
    assert run.status == alone.status
    losses, losses_alone = ([e.loss for e in each.training.epochs] for each in (run, alone))
    assert min(losses_alone) > 1e-3
    # The fitted weights differ by rounding, so the trainings start a little apart.
    assert_close(losses, losses_alone, rtol=5e-2, atol=0)
    assert run.comparison is not None


def test_only_the_main_process_reports(of_three):
    main, *others = of_three["calls"]
    assert main > 1
    assert others == [0, 0]


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(tmp_path):
    """A training of the command line."""
    (tmp_path / "net.py").write_text(NET)
    asked = ["train", "net.py:make", "--data", "digits", "--limit", "333", "--epochs", "3"]
    return ["-m", "onebyone", *asked, "--threads", "1", "--out", "run"]


def status_of(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def losses_of(folder):
    lines = (folder / "log.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[1]) for line in lines]


def test_a_run_whose_process_is_killed_ends_and_is_resumed(command, tmp_path):
    ended = torchrun(2, *command, cwd=tmp_path, BAD="kill")
    assert ended.returncode
    # On a busy machine torchrun may end the other process before that notices.
    told = ended.stderr.count("Another process of this run ended without a message")
    assert (told, status_of(tmp_path / "run")["state"]) in [(1, "failed"), (0, "interrupted")]
    done = losses_of(tmp_path / "run")
    assert len(done) == 1
    resumed = torchrun(2, *command, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("Report: run/report.html") == 1
    assert resumed.stderr.count("train (1 of 2): finished") == 1
    assert status_of(tmp_path / "run")["state"] == "finished"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0"}
    alone = [sys.executable, *command[:-1], "alone"]
    subprocess.run(alone, cwd=tmp_path, env=variables, check=True, capture_output=True, timeout=300)
    losses = losses_of(tmp_path / "run")
    assert losses[0] == done[0]
    assert_close(losses, losses_of(tmp_path / "alone"), rtol=1e-3, atol=0)  # of bf16


def test_an_error_of_one_process_ends_all_and_is_printed_once(command, tmp_path):
    ended = torchrun(2, *command, cwd=tmp_path, BAD="raise")
    assert ended.returncode
    assert ended.stderr.count("too bad") == 1
    detail = status_of(tmp_path / "run")["detail"]
    assert detail.startswith("The process of rank 1 of 2 failed")
    assert "too bad" in detail


def test_a_command_that_processes_do_not_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "torchrun goes with train" in capsys.readouterr().err
