"""From the options or the file of a sweep to a command line of shrink for each trial."""

import itertools
import re

import pytest

from onebyone.cli import main, make_parser
from onebyone.cli.sweep_trials import asked_words, merged, networks_of, parsed, trials_of

COMMAND = [
    "runs/a", "net.py:make", "--data", "digits", "--budget", "macs=50%,params=40%", "--budget",
    "latency=5ms", "--runtime", "eager,onnxruntime", "--seed", "0,1", "--seed", "2",
    "--precision", "float32", "--precision", "int8", "--effort", "quick", "--epochs", "0",
    "--leave", "head", "--leave", "stem", "--no-capture", "--threads", "1",
]  # fmt: skip
FILE = """
model = ["runs/a", "net.py:make"]
data = "digits"
budget = ["macs=50%,params=40%", "latency=5ms"]
runtime = ["eager", "onnxruntime"]
seed = [0, 1, 2]
precision = ["float32", "int8"]
effort = "quick"
epochs = 0
leave = ["head", "stem"]
no-capture = true
threads = 1
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def asked(*arguments):
    args = make_parser(["sweep"]).parse_args(["sweep", *arguments])
    del args.command
    return merged(args)


def made(*arguments, out="out"):
    options = asked(*arguments)
    return trials_of(networks_of(options), options, out)


def test_there_is_a_trial_for_each_combination_with_the_command_that_makes_it():
    trials = made(*COMMAND)
    axes = [
        ("runs/a", "net.py:make"), ("macs=50%,params=40%", "latency=5ms"),
        ("eager", "onnxruntime"), (0, 1, 2), ("float32", "int8"),
    ]  # fmt: skip
    seen = []
    for trial in trials:
        args = parsed(trial.command)
        seen.append((args.model, args.budget[0], args.runtimes[0], args.seed, args.precision))
        assert (args.data, args.epochs, args.leave) == ("digits", 0, ["head", "stem"])
        assert (args.num_threads, args.capture, args.effort) == (1, False, "quick")
        assert args.out == f"out/trials/{trial.name}"
    assert seen == list(itertools.product(*axes))
    assert len({trial.name for trial in trials}) == len(trials)
    assert all(re.fullmatch(r"[\w.=-]+", trial.name) for trial in trials)


def test_a_file_says_what_the_command_line_says(tmp_path):
    (tmp_path / "a.toml").write_text(FILE)
    assert made("a.toml") == made(*COMMAND)


def test_the_command_line_replaces_what_the_file_says(tmp_path):
    (tmp_path / "a.toml").write_text(FILE)
    trials = made("a.toml", "--seed", "7", "--epochs", "3")
    assert {trial.seed for trial in trials} == {7}
    assert {parsed(trial.command).epochs for trial in trials} == {3}


def test_a_network_of_the_file_has_options_of_its_own(tmp_path):
    (tmp_path / "a.toml").write_text(
        'model = "runs/a"\ndata = "digits"\nlimit = 9\n[[network]]\nmodel = "timm:resnet18"\n'
        'weights = "w.safetensors"\ndata = "imagefolder:x"\nmodel-option = ["num_classes=4"]\n'
    )
    first, second = (parsed(trial.command) for trial in made("a.toml"))
    assert (first.model, first.weights, first.data, first.limit) == ("runs/a", None, "digits", 9)
    assert (second.model, second.weights) == ("timm:resnet18", "w.safetensors")
    assert (second.data, second.limit) == ("imagefolder:x", 9)
    assert second.model_option == ["num_classes=4"]


def test_trials_share_a_survey_if_only_budgets_runtimes_or_precisions_differ():
    trials = made(*COMMAND)
    groups = {(trial.network, trial.seed): set() for trial in trials}
    for trial in trials:
        groups[trial.network, trial.seed].add(trial.group)
    assert len({group for each in groups.values() for group in each}) == len(groups) == 6


def test_with_a_limit_on_the_loss_no_budget_is_given():
    (trial,) = made("runs/a", "--data", "digits", "--max-drop", "0.5")
    args = parsed(trial.command)
    assert (args.max_drop, args.budget) == (0.5, None)


def test_every_option_that_decides_is_in_the_words_that_a_resumed_sweep_must_have():
    options = asked(*COMMAND)
    words = asked_words(networks_of(options), options)
    changes = [
        ["--budget", "macs=10%"], ["--runtime", "packed"], ["--seed", "9"], ["--effort", "normal"],
        ["--precision", "auto"], ["--epochs", "1"], ["--threads", "2"], ["--leave", "x"],
        ["--data", "mnist"], ["--only-faster"], ["--weights", "w.pt"], ["--limit", "3"],
    ]  # fmt: skip
    for change in changes:
        other = asked(*COMMAND, *change)
        assert asked_words(networks_of(other), other) != words, change
    same = asked(*COMMAND, "--out", "x", "--resume", "--address", "auto", "--node", "a")
    assert asked_words(networks_of(same), same) == words


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["a", "--budget", "macks=50%"], None, "No .* named 'macks'.*Did you mean 'macs'"),
        (["a", "--seed", "0,x"], None, "must be a whole number, got 'x'"),
        (["a", "--seed", "0,,1"], None, "--seed must not be empty"),
        (["a", "--effort", "slow"], None, "invalid choice: 'slow'"),
        (["a", "--epochs", "-1"], None, "must be 0 or more"),
        (["a", "--max-drop", "1", "--budget", "macs=50%"], None, "either --budget or --max-drop"),
        (["a", "--resume", "--overwrite"], None, "only one of --resume"),
        (["none.toml"], None, "none.toml does not exist"),
        (["a.toml"], "model = ", "a.toml must be a TOML file"),
        (["a.toml"], 'model = "a"\nepoch = 1', "No option in a.toml named 'epoch'.*'epochs'"),
        (["a.toml"], 'model = "a"\nepochs = "x"', "must be a whole number, got 'x'"),
        (["a.toml"], 'model = "a"\nseed = [true]', "must be texts or numbers, got True"),
        (["a.toml"], "", "needs a network"),
        (["a.toml"], "[network]\nmodel = 'a'", r"must be a table \[\[network\]\]"),
        (["a.toml"], "[[network]]\nmodel = 'a'\nweight = 'w'", "named 'weight'.*'weights'"),
        (["a.toml"], "[[network]]\nweights = 'w'", "must have one `model`"),
        (["a.toml", "b"], "", "name the networks in the file"),
    ],
)
def test_a_slip_is_told_before_any_work(arguments, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "a.toml").write_text(content)
    assert main(["sweep", *arguments, "--data", "digits", "--out", "out"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


def test_data_must_be_given(capsys):
    assert main(["sweep", "runs/a", "--out", "out"]) == 2
    assert "needs data for runs/a: give --data" in capsys.readouterr().err
