import pytest
from known_machine import Machine

from onebyone.planning.latency import builds
from onebyone.planning.latency import layer_timer as timing
from onebyone.runtimes import RUNTIMES, Runtime


@pytest.fixture
def machine(monkeypatch):
    def install(**settings):
        made = Machine(**settings)
        monkeypatch.setitem(RUNTIMES, "known", Runtime("known", made.prepare))
        for module in (builds, timing):
            monkeypatch.setattr(module, "interleave", made.interleave)
        return made

    return install
