"""Runs calibration data through a network and records the moments of its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.calibration.inputs import Batches
from onebyone.calibration.moments import TO_FIT, Enough, LayerSum, Moments, Part
from onebyone.calibration.prefix_cache import Advancing
from onebyone.calibration.resumed_pass import Reached
from onebyone.core import processes
from onebyone.core.errors import DataError
from onebyone.core.tensor_trees import Inputs, batch_size, first_examples, sliced
from onebyone.networks.held import to_run
from onebyone.networks.surgery import hooks_removed, run
from onebyone.profiling.trace import trace_layers


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    *,
    examples: int | None = None,
    enough: Enough = TO_FIT,
) -> dict[str, tuple[Moments, ...]]:
    """Return the moments of layers' inputs and outputs, per group, from one pass over the data.

    Several processes each run their part of every batch; all return the moments of the whole.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        names: Convolutions and linear layers.
        batches: The inputs.
        examples: Number of examples. If given, large maps are sampled; else every position counts.
        enough: How many rows a wide layer needs.
    """
    network = to_run(model)
    generator = torch.Generator().manual_seed(0)
    sums = {
        name: LayerSum(network.get_submodule(name), examples, generator, enough=enough, name=name)
        for name in names
    }

    part: Part | None = None

    def recorder(total: LayerSum) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            total.add(_input(args, kwargs), output, own=True, part=part)

        return record

    handles = [
        total.module.register_forward_hook(recorder(total), with_kwargs=True)
        for total in sums.values()
    ]
    with hooks_removed(handles), torch.no_grad():
        for batch in batches():
            inputs, part = _part_of(batch)
            run(network, inputs)
    _add_up(sums)
    return {name: total.moments() for name, total in sums.items() if total.ran}


def _part_of(batch: Inputs) -> tuple[Inputs, Part | None]:
    """Return the part of a batch that this process runs, and which one it is."""
    if processes.count() == 1:
        return batch, None
    n = batch_size(batch)
    mine = processes.share(n)
    if n >= processes.count():
        part = sliced(batch, mine.start, mine.stop)
        if batch_size(part) == mine.stop - mine.start:
            return part, Part(mine.start, mine.stop, n)
    return batch, Part(0, n, n, counts=processes.is_main())  # it cannot be divided


def _add_up(sums: Mapping[str, LayerSum]) -> None:
    if processes.count() > 1:
        for total in sums.values():
            total.add_up()


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the one tensor that a layer was called with, as positional or keyword argument."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


class Across:
    """Moments of a rewritten network's inputs with the original's outputs, layer after layer.

    This is the asymmetric regression of Zhang et al. (2016, section 3.3): each layer is fitted to
    reproduce the original's output from the input that it gets in the rewritten network. If
    possible, each pass resumes where the last one stopped, in both networks, instead of at the
    start.

    Args:
        original: Not modified; must be in evaluation mode.
        batches: The inputs, always the same.
        examples: Number of examples. If given, large maps are sampled; else every position counts.
        start: The network to rewrite, in evaluation mode, before any rewrite. Without it every pass
            starts at the beginning.
        sites: The layers whose moments will be needed.

    Attributes:
        resumed: The layers from which the next pass can resume.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Batches,
        *,
        examples: int | None = None,
        start: nn.Module | None = None,
        sites: Sequence[str] = (),
    ) -> None:
        self._original = original
        self._batches = batches
        self._examples = examples
        # A layer that runs for several maps is fitted to all of them.
        traced = trace_layers(original, first_examples(next(iter(batches())), 1))
        self._calls = {layer.name: layer.calls for layer in traced.layers}
        self._passes: tuple[Advancing, ...] = ()
        self.resumed: frozenset[str] = frozenset()
        if start is not None and examples is not None:
            first, _ = _part_of(next(iter(batches())))
            both = [Advancing(network, first, sites, examples) for network in (start, original)]
            self._passes = tuple(both)
            self.resumed = frozenset(both[0].resumed) & frozenset(both[1].resumed)

    def moments(
        self, rewritten: nn.Module, names: Sequence[str], *, since: Sequence[str] = ()
    ) -> dict[str, tuple[Moments, ...]]:
        """Return the moments of layers' inputs in one network with their outputs in the original.

        Args:
            rewritten: The network so far, in evaluation mode; the named layers not yet rewritten.
            names: Layers, all measured in this one pass.
            since: Layers before these that are rewritten once this pass is done: what they give
                must not be kept for the next one.

        Raises:
            DataError: If a layer does not run on these inputs.
        """
        generator = torch.Generator().manual_seed(0)
        sums = {
            name: LayerSum(rewritten.get_submodule(name), self._examples, generator, name=name)
            for name in names
        }
        calls = {name: self._calls.get(name, 0) for name in names}
        inputs = _Watched(rewritten, calls, before=True)
        outputs = _Watched(self._original, calls, before=False)
        with hooks_removed([*inputs.handles, *outputs.handles]), torch.no_grad():
            for place, whole in enumerate(self._batches()):
                batch, part = _part_of(whole)
                for turn, watched in enumerate((inputs, outputs)):
                    watched.seen.clear()
                    with self._going_to(turn, watched.network, place, [*since, *names]):
                        _run_until_reached(watched.network, batch)
                    _check_ran(calls, watched.seen)
                for name in names:
                    for pair in zip(inputs.seen[name], outputs.seen[name], strict=True):
                        sums[name].add(*pair, own=False, part=part)
        _add_up(sums)
        return {name: total.moments() for name, total in sums.items()}

    def _going_to(
        self, turn: int, network: nn.Module, batch: int, names: Sequence[str]
    ) -> AbstractContextManager[None]:
        if not self._passes:
            return nullcontext()
        return self._passes[turn].going_to(network, batch, names)


class _Watched:
    """Records the inputs or outputs of layers, and ends a pass when all have run.

    Args:
        network: Runs the passes.
        calls: The layers, and how often each of them runs in one pass.
        before: Whether inputs are recorded, not outputs.
    """

    def __init__(self, network: nn.Module, calls: Mapping[str, int], *, before: bool) -> None:
        self.network = network
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self._wanted = sum(calls.values())
        self.handles: list[Any] = []
        for name in calls:
            layer = network.get_submodule(name)
            if before:
                hook = self._input_of(name)
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self.handles.append(layer.register_forward_hook(self._output_of(name)))

    def _input_of(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(name, _input(args, kwargs))

        return hook

    def _output_of(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._keep(name, output)

        return hook

    def _keep(self, name: str, value: Tensor) -> None:
        # Cloned, because a later operation may write into it.
        self.seen[name].append(value.detach().clone())
        if sum(map(len, self.seen.values())) == self._wanted:
            raise Reached


def _check_ran(calls: Mapping[str, int], seen: Mapping[str, list[Tensor]]) -> None:
    for name, expected in calls.items():
        if name not in seen:
            raise DataError(
                f"The layer {name!r} does not run on the calibration data, so it cannot be "
                f"fitted. Skip it."
            )
        if len(seen[name]) != expected:
            raise DataError(
                f"The layer {name!r} must run as often for all of the calibration data, but it "
                f"runs {expected} and {len(seen[name])} times, so it cannot be fitted. Skip it."
            )


def _run_until_reached(network: nn.Module, inputs: Inputs) -> None:
    try:
        run(network, inputs)
    except Reached:
        return
