"""A machine whose times are a known function of the layers, so that tests depend on no clock."""

import numpy as np
from torch import nn

from onebyone.profiling.latency import Samples
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes import Prepared


class Machine:
    """Takes a time for each call of a layer and for each MAC, and another share in a whole network.

    What is timed is read from the layers, so that these tests depend on no clock.
    """

    def __init__(self, *, overhead=0.02, per_mac=1e-6, worth=0.8, noise=0.002, whole=None):
        self.overhead, self.per_mac, self.noise = overhead, per_mac, noise
        # Half a millisecond of what a network takes is not the layers' own, unless told otherwise.
        self.whole = whole or (lambda layers_ms: 0.5 + worth * layers_ms)
        self.prepared = 0
        self.sampled = []
        self.rng = np.random.default_rng(0)

    def prepare(self, network, example):
        self.prepared += 1
        layers = [layer for layer in trace_layers(network, example).layers if layer.macs]
        ms = sum(self.overhead * layer.calls + self.per_mac * layer.macs for layer in layers)
        ms = ms if isinstance(network, nn.Sequential) else self.whole(ms)
        return Prepared(lambda: None, {"ms": repr(ms * example.shape[0])})

    def interleave(self, callables, *, rounds, device, seconds, **_):
        self.sampled.append(list(callables))
        return Samples(
            ms={
                name: float(each.options["ms"])
                * (1 + self.noise * self.rng.standard_normal(rounds))
                for name, each in callables.items()
            },
            device=device,
            threads=1,
        )
