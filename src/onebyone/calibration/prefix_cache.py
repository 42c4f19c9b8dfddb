"""Prefix cache: after a module changes, re-runs the network from there on cached activations.

Modules that finish before the changed one starts give the same outputs as before, so their outputs
are cached. Everything else runs, also what a forward computes between its modules. This needs no
graph of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from onebyone.calibration.cached_modules import what_to_keep
from onebyone.calibration.resumed_pass import Stored, outputs_up_to, recording, returning_cached
from onebyone.core.tensor_trees import Inputs, batch_size
from onebyone.networks.outputs import Outputs, comparable
from onebyone.networks.surgery import replaced, run


class ResumedPasses:
    """Runs a network over the same batches with one of its modules replaced at a time.

    Args:
        network: In evaluation mode. Changed only while a pass runs.
        batches: The inputs.
        sites: Names of the modules to replace, in order of execution.

    Attributes:
        reference: The unchanged network's outputs, for each batch.
        resumed: The sites from which passes resume.

    Raises:
        ModelError: If the network does not run, gives no tensors, or gives one without the batch.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Inputs], sites: Sequence[str]) -> None:
        self._network = network
        self._batches = batches
        self.reference = [
            comparable(run(network, inputs), network, batch_size(inputs)) for inputs in batches
        ]
        examples = sum(map(batch_size, batches))
        self._kept = what_to_keep(network, batches[0], sites, examples).at
        self.resumed = tuple(self._kept)
        self._place = -1
        self._stored: list[Stored] = [{} for _ in batches]

    def outputs(self, site: str, new: nn.Module) -> Iterator[Outputs]:
        """Yield the outputs for each batch with one module replaced, then restore the module.

        Args:
            site: The module's name. Passes resume as long as sites come in order of execution.
            new: The replacement.

        Raises:
            ModelError: If the network does not run with the replacement.
        """
        stored = self._stored_at(site)
        for inputs, known in zip(self._batches, stored, strict=True):
            with (
                returning_cached(self._network, known),
                replaced(self._network, {site: new}) as network,
            ):
                outputs = comparable(run(network, inputs), network, batch_size(inputs))
            yield outputs

    def _stored_at(self, site: str) -> Sequence[Stored]:
        """Return the cached outputs of each batch, after advancing the cache to that site."""
        place = self.resumed.index(site) if site in self._kept else -1
        if place < 0 or place < self._place:
            return [{} for _ in self._batches]
        if place > self._place:
            kept = self._kept[site]
            self._stored = [
                outputs_up_to(self._network, site, kept, inputs, known)
                for inputs, known in zip(self._batches, self._stored, strict=True)
            ]
            self._place = place
        return self._stored


class Advancing:
    """Resumes passes over the same batches, each up to a later module than the last.

    Each pass starts where the previous pass of that batch stopped. Modules after that point may
    have changed since.

    Args:
        network: In evaluation mode, before any change.
        batch: The first batch.
        sites: Names of the modules up to which passes run.
        examples: Number of examples in all batches.

    Attributes:
        resumed: The sites from which the next pass can resume, in order of execution.
    """

    def __init__(
        self, network: nn.Module, batch: Inputs, sites: Sequence[str], examples: int
    ) -> None:
        found = what_to_keep(network, batch, sites, examples)
        self._kept, self._places = found.at, found.places
        self.resumed = tuple(self._kept)
        self._left: dict[int, tuple[int, Stored]] = {}

    @contextmanager
    def going_to(self, network: nn.Module, batch: int, sites: Sequence[str]) -> Iterator[None]:
        """Make the pass in this context start where the last one of that batch stopped.

        Args:
            network: The network in its present state.
            batch: Index of the batch.
            sites: Modules that the pass must reach; at least the first in order of execution.
        """
        first = min(sites, key=lambda name: self._places.get(name, 0))
        place = self._places.get(first, 0)
        left, known = self._left.get(batch, (0, {}))
        if left > place:  # modules after this one may have changed
            known = {}
        kept = self._kept.get(first, {})
        found: dict[str, Tensor] = {}
        with recording(network, kept, found), returning_cached(network, known):
            yield
        if kept:
            self._left[batch] = place, found
        elif left > place:
            del self._left[batch]
