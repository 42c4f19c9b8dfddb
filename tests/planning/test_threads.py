"""Two threads that plan at once give the plans that each gives alone, and leave the process alone."""

import gc
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from onebyone.networks.fx_forward import trace_calls
from onebyone.planning import plan
from onebyone.rewrites.head import fit as head_fit

EXAMPLES = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))
BUDGETS, HEADS = ("macs=60%", "params=50%"), ("auto", "keep")


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 36, 4),
    )


NETWORKS = [network(seed) for seed in (0, 1)]  # drawn before there are threads


def planned(place):
    return plan(NETWORKS[place], EXAMPLES, budget=BUDGETS[place], head=HEADS[place])


def process_state():
    return (
        sys.stdout,
        sys.stderr,
        list(sys.path),
        list(warnings.filters),
        gc.isenabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.fixture
def short_fits(monkeypatch):
    monkeypatch.setattr(head_fit, "FIT_STEPS", 3)


@pytest.mark.usefixtures("short_fits")
def test_two_threads_that_plan_give_the_plans_made_alone_and_lose_no_output(capfd):
    alone = [planned(place) for place in (0, 1)]
    before = process_state()
    start = threading.Barrier(2)
    found = {}

    def work(place):
        start.wait(60)
        # In one write each: print writes the line's end by itself, and threads may come between.
        print(f"thread {place} begins\n", end="", flush=True)
        found[place] = planned(place)
        print(f"thread {place} ends\n", end="", flush=True)

    workers = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("all ended", flush=True)
    for place in (0, 1):
        assert found[place].to_json() == alone[place].to_json()
    assert process_state() == before
    heard = capfd.readouterr().out.splitlines()
    said = {f"thread {place} {what}" for place in (0, 1) for what in ("begins", "ends")}
    assert said | {"all ended"} <= set(heard)


def test_a_network_that_another_thread_runs_is_not_traced():
    ours, theirs = network(0).eval(), network(1).eval()
    found = []

    def meanwhile(self, inputs):
        worker = threading.Thread(target=lambda: found.append(theirs(EXAMPLES)))
        worker.start()
        worker.join()
        return nn.Sequential.forward(self, inputs)

    class Watched(nn.Sequential):
        forward = meanwhile

    graph = trace_calls(Watched(*ours))
    assert [node.op for node in graph.nodes].count("call_module") == len(ours)
    torch.testing.assert_close(found, [theirs(EXAMPLES)])
