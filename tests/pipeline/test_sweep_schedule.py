"""Every trial ends once, whatever happens to processes and nodes; a survey is made once."""

import random

import pytest

from onebyone.core.errors import SweepError
from onebyone.core.records import SweepTrial
from onebyone.pipeline.sweep.one_trial import Ended
from onebyone.pipeline.sweep.schedule import MOST_STARTS, Lost, carry_out


def trial(name, group="g"):
    return SweepTrial(
        name=name, network="n", data="d", group=group, budget="macs=50%", runtime="eager", seed=0,
        precision="float32", effort="normal", command=("onebyone", "shrink"),
    )  # fmt: skip


class Nodes:
    """Nodes that end trials in any order, and lose those that are asked for."""

    def __init__(self, count, *, loses=lambda trial, start: False, seed=0):
        self.nodes = [f"node{number}" for number in range(count)]
        self.loses = loses
        self.started, self.most = [], 0
        self._random = random.Random(seed)
        self._running = {}

    def free(self):
        return [node for node in self.nodes if node not in self._running]

    def running(self):
        return list(self._running.values())

    def start(self, trial, node):
        assert node in self.free(), "one trial at a time on a node"
        self._running[node] = trial
        self.started.append(trial.name)
        self.most = max(self.most, len(self._running))

    def ended(self, seconds):
        if not self._running:
            return []
        node = self._random.choice(sorted(self._running))
        trial = self._running.pop(node)
        if self.loses(trial, self.started.count(trial.name)):
            self.nodes.remove(node)
            self.nodes.append(f"{node}+")
            return [(trial, Lost("it was killed"))]
        return [(trial, Ended("", node, 1.0))]


def carried_out(trials, nodes, has_plan=lambda trial: True, **options):
    ended = []
    carry_out(
        trials,
        nodes,
        has_plan=has_plan,
        started=lambda trial: None,
        ended=lambda trial, how: ended.append((trial.name, how)),
        lost=lambda trial, how: None,
        **options,
    )
    return ended


@pytest.mark.parametrize("seed", range(5))
def test_each_trial_ends_once_although_processes_and_nodes_are_lost(seed):
    lost = random.Random(seed).sample(range(24), 8)
    trials = [trial(str(number)) for number in range(24)]
    nodes = Nodes(3, loses=lambda t, start: int(t.name) in lost and start == 1, seed=seed)
    ended = carried_out(trials, nodes)
    assert sorted(name for name, _ in ended) == sorted(each.name for each in trials)
    assert not any(how.error for _, how in ended)
    assert len(nodes.started) == 24 + 8


def test_a_trial_that_takes_its_process_down_each_time_is_given_up():
    nodes = Nodes(2, loses=lambda trial, start: trial.name == "bad")
    ended = dict(carried_out([trial("bad"), trial("good")], nodes))
    assert ended["good"].error == ""
    assert (
        ended["bad"].error == f"Its process or its node ended {MOST_STARTS} times: it was killed."
    )
    assert nodes.started.count("bad") == MOST_STARTS


def test_without_a_node_the_sweep_ends_and_says_how_to_go_on():
    with pytest.raises(SweepError, match=r"needs a node.* with 2 trials to go\. .*--resume"):
        carried_out([trial("a"), trial("b")], Nodes(0), node_seconds=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_while_a_survey_is_made_only_trials_of_other_surveys_start(seed):
    trials = [trial(f"{group}{number}", group) for group in "ab" for number in range(4)]
    ended = []
    nodes = Nodes(4, seed=seed)
    start = nodes.start

    def checked(new, node):
        known = {name[0] for name in ended}
        assert new.group in known or all(each.group != new.group for each in nodes.running())
        start(new, node)

    nodes.start = checked
    carry_out(
        trials,
        nodes,
        has_plan=lambda trial: trial.group in {name[0] for name in ended},
        started=lambda trial: None,
        ended=lambda trial, how: ended.append(trial.name),
        lost=lambda trial, how: None,
    )
    assert len(ended) == len(trials)
    assert nodes.most == 4  # the others of a group start together, once its survey is there


def test_a_trial_that_has_its_plan_holds_up_no_other_one():
    nodes = Nodes(3)
    carried_out([trial(str(number)) for number in range(3)], nodes, has_plan=lambda trial: True)
    assert nodes.most == 3
