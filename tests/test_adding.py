"""Each diff of docs/adding.md applies to the source, and what it adds is used without another change."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding.md"
SECTIONS = re.findall(
    r"^## (.*?)\n.*?```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
NETWORK = """
from dataclasses import replace
import torch
from torch import nn
import onebyone as obo
from onebyone.core.records import Step
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12)).eval()
inputs = torch.randn(64, 3, 12, 12)
def carried_out(plan, site, rewrite, settings):
    first = plan.choices[0]
    choice = replace(first, site=site, steps=(Step(rewrite=rewrite, settings=settings),))
    return obo.apply(net, replace(plan, choices=(choice,)), inputs)
"""
# What a user does with each addition.
USES = {
    "A rewrite of one layer": NETWORK
    + """
from onebyone.rewrites.registry import layer_rewrite
obo.check_rewrite(layer_rewrite("thin"), name="thin")
assert any(row.rewrite == "thin" and row.reason is None for row in obo.applies(net, inputs).sites)
small = carried_out(obo.uniform_plan(net, inputs), "6", "thin", {"rank": 12})
torch.testing.assert_close(small(inputs), net(inputs))
assert small[6][0].weight.shape == (12, 16)
""",
    "A rewrite of a group of layers": NETWORK
    + """
from onebyone.rewrites.registry import group_rewrite
obo.check_rewrite(group_rewrite("loudest"), name="loudest")
plan = obo.plan(net, inputs, budget="macs=90%")
small = carried_out(plan, "0", "loudest", {"channels": 12})
assert small[0].out_channels == small[2].in_channels == 12
""",
    "A runtime": NETWORK
    + """
from onebyone.runtimes import find_runtime
obo.check_runtime(find_runtime("exported"))
record = obo.bench(net, input_shape=(1, 3, 12, 12), runtimes=["eager", "exported"], rounds=3)
assert record.entries[1].runtime == "exported" and record.entries[1].same
""",
    "A precision of the runtimes": """
import onebyone as obo
from onebyone.runtimes import find_runtime, runtime_names
assert {"eager:fp16", "channels-last:fp16", "compile:fp16"} <= set(runtime_names())
obo.check_runtime(find_runtime("eager:fp16"))
""",
    "A data set": """
import os, struct
from pathlib import Path
import numpy as np
import onebyone as obo
from onebyone.cli import main
folder = Path(os.environ["ONEBYONE_DATA"], "kmnist")
folder.mkdir()
for part, count in (("train", 5100), ("t10k", 20)):
    images, labels = np.zeros((count, 28, 28), np.uint8), np.arange(count).astype(np.uint8) % 10
    for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
        header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
        (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
data = obo.load_data("kmnist")
assert (len(data.train), len(data.validation), len(data.test)) == (100, 5000, 20)
assert data.classes[0] == "o"
try:
    main(["train", "--help"])
except SystemExit:
    pass
""",
    "A section of the report": """
import sys
sys.path.insert(0, "tests/report")
from run_records import run_record
from onebyone.report.html import render_run
page = render_run(run_record())
assert 'id="heaviest"' in page and 'href="#heaviest"' in page
""",
}


def files_of(diff):
    return re.findall(r"^diff --git a/(\S+)", diff, re.MULTILINE)


def test_every_diff_is_used():
    assert [title for title, _ in SECTIONS] == list(USES)


def test_the_table_counts_the_files():
    rows = re.findall(r"^\| (a .*?) \| (\d) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    counts = {title[0].lower() + title[1:]: len(files_of(diff)) for title, diff in SECTIONS}
    assert {name: int(count) for name, count in rows} == counts
    assert max(counts.values()) <= 2


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
@pytest.mark.parametrize(("title", "diff"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_diff_applies_and_what_it_adds_works(title, diff, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # Outside of a repository, so that git looks at these files alone.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    applied = subprocess.run(
        ["git", "apply", "-"],
        input=diff,
        text=True,
        cwd=copy,
        env=outside,
        capture_output=True,
        check=False,
    )
    assert applied.returncode == 0, f"{applied.stderr}\nMake the diff in {PAGE.name} anew."
    (tmp_path / "data").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "COLUMNS": "200"}
    environment["ONEBYONE_DATA"] = str(tmp_path / "data")
    used = subprocess.run(
        [sys.executable, "-c", USES[title]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
    if title == "A data set":
        assert "fashion-mnist, kmnist, cifar10" in used.stdout
