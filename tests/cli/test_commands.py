"""The command line as a user meets it: statuses, whole outputs, and one-line errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onebyone.cli import COMMANDS, main
from onebyone.core.compared import Compared
from onebyone.core.records import Plan, Profile, RunRecord
from onebyone.networks.zoo import classic, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classic.safetensors"
    save_weights(classic(), path)
    return str(path)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    """Run the command as a user's shell does."""
    return subprocess.run(
        [sys.executable, "-m", "onebyone", *arguments], capture_output=True, text=True, check=False
    )


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys; from onebyone.cli import main; "
        "status = main(['--help']) + main(['shrink', '--help']); "
        "heavy = {'torch', 'numpy', 'scipy', 'rich', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: onebyone" in out
    assert "onebyone" in out.split("usage:", 1)[1]


def test_a_command_with_a_slip_is_suggested(capsys):
    assert main(["shrnk"]) == 2
    assert "Did you mean 'shrink'?" in capsys.readouterr().err


def test_an_option_with_a_slip_is_suggested(capsys):
    assert main(["profile", "onebyone:classic", "--jsonn"]) == 2
    assert "Did you mean --json?" in capsys.readouterr().err


BAD = {
    "model typo": (
        ["profile", "torchvision:resnet81"], 2, r"No .*'.*resnet81'.*Did you mean",
    ),
    "prefix typo": (["profile", "torchvison:resnet18"], 2, "torchvision"),
    "missing weights": (
        ["shrink", "onebyone:classic", "--weights", "no.safetensors", "--data", "digits"],
        1, "no.safetensors",
    ),
    "no weights": (["shrink", "onebyone:classic", "--data", "digits"], 1, "needs trained weights"),
    "a slip in a name": (["shrink", "onebyone:clasic", "--data", "digits"], 2, "'classic'"),
    "other weights": (
        ["compare", "onebyone:convolution-only", "onebyone:classic", "--weights", "WEIGHTS",
         "--data", "digits"],
        1, "missing|unexpected|shape",
    ),
    "unreadable folder": (
        ["train", "onebyone:classic", "--data", "imagefolder:broken"], 1, "broken",
    ),
    "no such folder": (["train", "onebyone:classic", "--data", "imagefolder:nowhere"], 1, "nowhere"),
    "empty data": (["train", "onebyone:classic", "--data", "data.py:empty"], 1, "example|empty"),
    "data typo": (["train", "onebyone:classic", "--data", "digit"], 2, "Did you mean 'digits'"),
    "latency zero": (
        ["shrink", "onebyone:classic", "--weights", "WEIGHTS", "--data", "digits", "--budget",
         "latency=0%", "--out", "r"],
        2, "above 0%",
    ),
    "macs fifty": (
        ["shrink", "onebyone:classic", "--weights", "WEIGHTS", "--data", "digits", "--budget",
         "macs=fifty", "--out", "r"],
        2, "percentage or a number.*'fifty'",
    ),
    "budget typo": (
        ["plan", "onebyone:classic", "--weights", "WEIGHTS", "--data", "digits", "--budget",
         "mac=50%"],
        2, "Did you mean 'macs'",
    ),
    "budget typo before all else": (
        ["plan", "net.py:fails", "--data", "nowhere", "--budget", "latency=5furlongs"],
        2, "time with its unit.*'5furlongs'",
    ),
    "budget typo before shrinking": (
        ["shrink", "net.py:fails", "--data", "nowhere", "--budget", "mac=50%", "--out", "r"],
        2, "Did you mean 'macs'",
    ),
    "foreign folder": (
        ["shrink", "onebyone:classic", "--weights", "WEIGHTS", "--data", "digits", "--out", "mine"],
        1, "other files, such as 'thesis.tex'",
    ),
    "no convolution": (
        ["shrink", "net.py:nothing", "--data", "digits", "--out", "r"], 1,
        "must have a convolution or a linear layer",
    ),
    "not a number": (
        ["shrink", "net.py:broken", "--weights", "random", "--data", "digits", "--out", "r"], 1,
        "finite",
    ),
    "forgotten weights": (
        ["shrink", "net.py:broken", "--data", "digits", "--out", "r"], 1,
        "new random weights at each call: give --weights FILE",
    ),
    "factory fails": (["profile", "net.py:fails"], 1, r"net\.py.*line"),
    "no such factory": (["profile", "net.py:nothin"], 2, "Did you mean 'nothing'"),
    "runtime typo": (["profile", "onebyone:classic", "--runtime", "eagr"], 2, "'eager'"),
    "shape": (["profile", "onebyone:classic", "--input-shape", "1,one"], 2, "sizes"),
    "wrong shape": (["profile", "onebyone:classic", "--input-shape", "1,7,28,28"], 1, "1×7×28×28"),
    "not a run": (["profile", "mine"], 1, "must be a run's"),
    "device": (["profile", "onebyone:classic", "--device", "gpu"], 2, "cpu or cuda"),
    "zero epochs": (
        ["train", "onebyone:classic", "--data", "digits", "--epochs", "0"], 2, "1 or more",
    ),
    "not a plan": (
        ["shrink", "onebyone:classic", "--weights", "WEIGHTS", "--data", "digits", "--plan",
         "net.py"],
        1, "not a saved Plan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_line_and_leaves_nothing_half_written(case, weights, capsys, tmp_path):
    arguments, status, message = BAD[case]
    mine = Path("mine")
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    broken = Path("broken")
    for name in ("cat", "dog"):
        (broken / name).mkdir(parents=True)
        for number in range(8):
            (broken / name / f"{number}.png").write_text("this is no picture")
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def nothing(): return nn.Sequential(nn.ReLU(), nn.Flatten())\n"
        "def broken():\n"
        "    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(2704, 10))\n"
        "    with torch.no_grad(): net[0].weight[0] = float('nan')\n"
        "    return net\n"
        "def fails(): return 1 / 0\n"
    )
    Path("data.py").write_text(
        "import torch\n"
        "def empty():\n"
        "    none = torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64)\n"
        "    return none, none, none\n"
    )
    there = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert main([weights if a == "WEIGHTS" else a for a in arguments]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    stages = re.compile(r"[a-z-]+ \(\d of \d\): finished after")  # of work before the error
    lines = [line for line in err.splitlines() if line.strip() and not stages.match(line)]
    assert len(lines) == 1, err
    assert re.search(message, lines[0]), lines[0]
    made = {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts} - there
    # A run that failed says so in its folder; nothing else may be left, and no weights.
    assert all(path.parts[len(tmp_path.parts)] in {"r", "runs"} for path in made)
    assert not [path for path in made if path.suffix in {".safetensors", ".tmp"}]
    for path in made:
        if path.name == "run.json":
            assert RunRecord.load(path).status.state == "failed"
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert len(list(mine.iterdir())) == 1


def test_profile_prints_json_and_nothing_else(capsys):
    arguments = ["profile", "onebyone:classic", "--threads", "1", "--json", "--out", "p"]
    assert main(arguments) == 0
    record = Profile.from_json(capsys.readouterr().out)
    assert record.params == 316_532
    assert record.latency["eager"].threads == 1
    assert Profile.load("p/profile.json") == record


def test_plan_writes_what_it_prints(weights, capsys):
    arguments = ["plan", "onebyone:classic", "--weights", weights, "--data", "digits"]
    common = [*arguments, "--budget", "params=30%", "--calibration", "100", "--head", "keep"]
    assert main([*common, "--json", "--out", "p"]) == 0
    record = Plan.from_json(capsys.readouterr().out)
    assert record == Plan.load("p/plan.json")
    assert record.after.params <= 0.3 * record.before.params


def test_the_line_from_train_to_compare(capsys):
    data = ["--data", "digits", "--limit", "120", "--threads", "1"]
    assert main(["train", "onebyone:classic", *data, "--epochs", "2", "--out", "a"]) == 0
    assert "Report: a/report.html" in capsys.readouterr().out
    shrink = ["shrink", "a", *data, "--budget", "params=10%", "--epochs", "1", "--out", "b"]
    assert main([*shrink, "--json"]) == 0
    record = RunRecord.from_json(capsys.readouterr().out)
    assert record.status.state == "finished"
    assert record.command[:3] == ("onebyone", "shrink", "a")
    assert main(["compare", "a", "b", *data, "--json", "--out", "c"]) == 0
    compared = Compared.from_json(capsys.readouterr().out).pair()
    assert compared.before.params == record.before.params
    assert compared.after.metric == record.after.metric
    assert Compared.load("c/compare.json").pair() == compared
    assert Path("c/report.html").exists()
    assert main(["profile", "b", "--no-time"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_json_of_a_failed_command_is_no_output():
    done = run("profile", "onebyone:clasic", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean" in done.stderr
