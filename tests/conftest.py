"""What tests of several parts need, and what a run of the tests says at its end."""

import faulthandler
import gc
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

from onebyone.core.rounds import ENVIRONMENT as ROUNDS
from onebyone.data.named import data_directory

FEW_ROUNDS = "3"
# Files of minutes: they begin first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_blocks.py",
    "test_demo.py",
    "test_latency_planner.py",
    "test_shrink.py",
    "test_torchrun.py",
    "test_zoo_sample.py",
)
TRACES = ".pytest_faults"  # a file for each process: where it was when it died

# All timing in tests is short, also in the processes that tests start, and on a busy machine.
os.environ.setdefault(ROUNDS, FEW_ROUNDS)

# A run of the tests tries the same random cases each time; `make fuzz` is where new ones are tried.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if (
    "ONEBYONE_FUZZ" not in os.environ
    and hypothesis.settings.get_current_profile_name() == "default"
):
    hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """Keep all that is imported by now out of garbage collections: timing makes many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_many_rounds_as_users_get(request, monkeypatch):
    if request.node.get_closest_marker("clock") or request.node.get_closest_marker("rounds"):
        monkeypatch.delenv(ROUNDS, raising=False)


@pytest.fixture
def fashion_mnist():
    """Return the data set's name where its files are; elsewhere skip, and download nothing."""
    root = data_directory()[0]
    places = [root / place for place in ("fashion_mnist", "FashionMNIST/raw")]
    if not any(any(place.glob("train-images*")) for place in places):  # an empty folder is no data
        pytest.skip("Fashion-MNIST is not in the data directory")
    return "fashion-mnist"


# ---------------------------------------------------------------- processes that die


def _trace_file(config, worker):
    return Path(config.rootpath, TRACES, f"{worker}.txt")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Keep the trace of a fault in a file: pytest's own goes to a terminal that may be gone."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    path = _trace_file(config, worker)
    path.parent.mkdir(exist_ok=True)
    stream = path.open("w")
    config.stash[_STREAM] = stream
    faulthandler.enable(stream, all_threads=True)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config):
    stream = config.stash.get(_STREAM, None)
    if stream is not None:
        faulthandler.disable()
        stream.close()
        path = Path(stream.name)
        if path.exists() and not path.stat().st_size:
            path.unlink(missing_ok=True)  # another run in this folder may have
    if not hasattr(config, "workerinput") and _SKIPS in config.stash:
        print(wanting(config.stash[_SKIPS]))


_STREAM = pytest.StashKey()
_SKIPS = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """Say how a worker died and where its trace is; its test is already named."""
    worker = getattr(report.node, "gateway", None)
    name = worker.id if worker is not None else "gw*"
    trace = f"Its last trace is in {TRACES}/{name}.txt."
    report.longrepr = f"{report.longrepr}\n{_end_of(worker)}{trace}"


def _end_of(worker):
    """Return how a worker's process ended, in words; nothing where that is not known."""
    process = getattr(getattr(worker, "_io", None), "popen", None)
    try:
        status = None if process is None else process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "Its process still runs. "
    if status is None:
        return ""
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"Its process ended with {how}. "


# ---------------------------------------------------------------- the last line


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    config.stash[_SKIPS] = Counter(_reason(report) for report in skipped)


def _reason(report):
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"^Skipped: ", "", text)


def wanting(skips):
    """Return the last line: which tests were skipped, and for want of what."""
    if not skips:
        return "Nothing was skipped."
    each = "; ".join(f"{count} ({reason})" for reason, count in skips.most_common())
    return f"Skipped {sum(skips.values())}: {each}"
