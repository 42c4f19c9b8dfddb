"""Prefix cache: after a module changes, re-runs the network from there on cached activations.

Modules that finish before the changed one starts give the same outputs as before, so their outputs
are cached. Everything else runs, also what a forward computes between its modules. This needs no
graph of the network. A module is not cached if it writes into its input, or if something writes
into its output afterwards. In-place activations are the exception: they are cached together with
the module whose output they change. At every site a trial compares a resumed pass with a full one;
if they differ, passes for that site are full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, batch_size, first_examples, sliced, tensors_in
from onebyone.networks.outputs import Outputs, comparable
from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import (
    hooks_removed,
    module_at,
    replace_module,
    run,
)

# How much two runs of the same operations may differ, relative to the largest output.
SAME = 1e-5

# Most bytes cached over all batches. A site that needs more resumes from an earlier site, or from
# the start.
KEPT_BYTES = 1_500_000_000

Stored = Mapping[str, Tensor]


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
        self._kept = _what_to_keep(network, batches[0], sites, examples).at
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
                _returning_cached(self._network, known),
                _replaced(self._network, site, new) as network,
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
                _outputs_up_to(self._network, site, kept, inputs, known)
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
        found = _what_to_keep(network, batch, sites, examples)
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
        with _recording(network, kept, found), _returning_cached(network, known):
            yield
        if kept:
            self._left[batch] = place, found
        elif left > place:
            del self._left[batch]


@contextmanager
def _replaced(network: nn.Module, site: str, new: nn.Module) -> Iterator[nn.Module]:
    old = module_at(network, site)
    try:
        yield replace_module(network, site, new)
    finally:
        if site:
            replace_module(network, site, old)


# ---------------------------------------------------------------- a pass that is resumed


@contextmanager
def _returning_cached(network: nn.Module, known: Stored) -> Iterator[None]:
    """Make modules return their cached outputs in this context."""
    changed = [network.get_submodule(name) for name in known]
    before = [vars(module).get("forward") for module in changed]
    try:
        for module, output in zip(changed, known.values(), strict=True):
            vars(module)["forward"] = _constant(output)
        yield
    finally:
        for module, forward in zip(changed, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


class Reached(BaseException):
    """Ends a pass: the module of interest has run or is about to.

    It is not an ``Exception``, so a forward that catches exceptions of its layers lets it through.
    """


def _outputs_up_to(
    network: nn.Module, site: str, kept: Mapping[str, bool], inputs: Inputs, known: Stored
) -> Stored:
    """Run a network up to a site and return the outputs of the modules to cache.

    Args:
        network: Not modified.
        site: Where to stop.
        kept: Names of the modules, and whether anything from the site on reads their values.
        inputs: Inputs of the network.
        known: Cached outputs of an earlier site, from which the pass resumes.
    """
    found: dict[str, Tensor] = {}

    def stop(_: nn.Module, __: object) -> None:
        raise Reached

    handles = [module_at(network, site).register_forward_pre_hook(stop)]
    keeping = _recording(network, kept, found)
    with hooks_removed(handles), keeping, _returning_cached(network, known), suppress(Reached):
        run(network, inputs)
    return found


@contextmanager
def _recording(
    network: nn.Module, kept: Mapping[str, bool], found: dict[str, Tensor]
) -> Iterator[None]:
    """Store the outputs of modules in ``found`` while in this context."""

    def keep(name: str, *, read: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output if read else _without_memory(output)

        return hook

    handles = [
        network.get_submodule(name).register_forward_hook(keep(name, read=read))
        for name, read in kept.items()
    ]
    with hooks_removed(handles):
        yield


def _without_memory(output: Tensor) -> Tensor:
    """Return a tensor of the same shape that takes no memory, for values that nothing reads."""
    return output.new_zeros(()).expand(output.shape)


# ---------------------------------------------------------------- what to keep


@dataclass(frozen=True)
class _Kept:
    """The modules to cache for each site.

    Attributes:
        at: Site -> modules, with ``True`` if their values are read; sites in order of execution.
        places: The index in that order of every site that runs.
    """

    at: Mapping[str, Mapping[str, bool]]
    places: Mapping[str, int]


def _what_to_keep(network: nn.Module, batch: Inputs, sites: Sequence[str], count: int) -> _Kept:
    """Return for each site the modules to cache, if their outputs fit into ``KEPT_BYTES``.

    It leaves out sites at which a resumed pass differs from a full one. The trial alternates
    between two examples, to notice a module that remembers its last run.
    """
    size = batch_size(batch)
    ends = first_examples(batch, 1), sliced(batch, size - 1, size)
    trials = [(example, run(network, example)) for example in ends]
    runs = _watched(network, ends[0])
    ordered = sorted((site for site in sites if site in runs), key=lambda site: runs[site].start)
    kept: dict[str, dict[str, bool]] = {}
    before: list[Stored] = [{}, {}]
    for site in ordered:
        for names in _skippable(runs, site):
            stored, reads = _tried(network, site, names, trials, before)
            if stored:
                before = stored
                if count * _bytes_of(stored[0]) <= KEPT_BYTES:
                    kept[site] = reads
                break
    return _Kept(kept, {site: place for place, site in enumerate(ordered)})


def _bytes_of(stored: Stored) -> int:
    """Return the bytes cached for one example; unread values take none."""
    storages = [tensor.untyped_storage() for tensor in stored.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tried(
    network: nn.Module,
    site: str,
    names: Sequence[str],
    trials: Sequence[tuple[Inputs, Any]],
    before: Sequence[Stored],
) -> tuple[list[Stored], dict[str, bool]]:
    """Return the cached outputs for each example, and which of them are read.

    Both are empty if a resumed pass differs from a full one.

    Args:
        network: Not modified.
        site: Where passes would resume.
        names: Modules to cache.
        trials: Examples, each with the network's output.
        before: Cached outputs of an earlier site, for each example.
    """
    every = dict.fromkeys(names, True)
    (first, _), (second, _) = trials
    try:
        stored: list[Stored] = [
            _outputs_up_to(network, site, every, example, known)
            for (example, _), known in zip(trials, before, strict=True)
        ]
        reads = _Reads()
        with _returning_cached(network, stored[0]), reads:
            outputs = [run(network, first)]
        read = {name: reads.has(stored[0][name]) for name in names}
        shrunk: list[Stored] = [
            {
                name: output if read[name] else _without_memory(output)
                for name, output in each.items()
            }
            for each in stored
        ]
        with _returning_cached(network, shrunk[1]):
            outputs.append(run(network, second))
    except ModelError:
        return [], {}  # the network fails when resumed
    same = all(_is_same(whole, out) for (_, whole), out in zip(trials, outputs, strict=True))
    return (shrunk, read) if same else ([], {})


def _is_same(whole: Any, resumed: Any) -> bool:
    pairs = [list(tensors_in(given)) for given in (whole, resumed)]
    if not pairs[0] or len(pairs[0]) != len(pairs[1]):
        return False
    return all(_is_same_tensor(*pair) for pair in zip(*pairs, strict=True))


def _is_same_tensor(whole: Tensor, resumed: Tensor) -> bool:
    scale = float(whole.abs().max()) if whole.numel() else 0.0
    return whole.shape == resumed.shape and torch.allclose(
        whole, resumed, rtol=0, atol=SAME * scale, equal_nan=True
    )


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which memory operations read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: set[int] = set()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor, or another one in the same memory, was read."""
        return tensor.untyped_storage().data_ptr() in self._places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        for tensor in tensors_in([args, kwargs or {}]):
            self._places.add(tensor.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- what modules do in a pass


@dataclass(eq=False)
class _Seen:
    """What a module did in a pass.

    Starts and ends of all modules are numbered together. ``start`` is the number of its first
    start, ``end`` that of its last end.
    """

    calls: int = 0
    start: int = 0
    end: int = 0
    hooked: bool = False
    given: tuple[int, ...] = ()  # versions of its arguments; each write increases a version
    writes: bool = False
    output: Any = None
    version: int = 0

    @property
    def answers(self) -> bool:
        """Whether it runs once, returns one tensor whose writes are counted, and has no hooks."""
        if self.calls != 1 or self.hooked or not isinstance(self.output, Tensor):
            return False
        return not self.output.is_inference()

    @property
    def in_place(self) -> bool:
        """Whether it writes into its only input tensor and returns it."""
        return self.writes and len(self.given) == 1 and self.version > self.given[0]

    @property
    def last(self) -> int:
        """The version of its output at the end of the pass."""
        return int(self.output._version)  # noqa: SLF001 - each write increases it

    @property
    def place(self) -> int:
        """The address of its output in memory."""
        return int(self.output.untyped_storage().data_ptr())


def _watched(network: nn.Module, example: Inputs) -> dict[str, _Seen]:
    """Run a network and return what each of its submodules did."""
    modules = {
        name: module
        for name, module in network.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    }
    seen = {name: _Seen(hooked=has_hooks(module)) for name, module in modules.items()}
    now = 0

    def entering(mine: _Seen) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal now
            now += 1
            if not mine.calls:
                mine.start = now
            mine.calls, mine.given = mine.calls + 1, _versions([args, kwargs])

        return hook

    def leaving(mine: _Seen) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal now
            now += 1
            mine.end, mine.output = now, output
            mine.writes |= mine.given != _versions([args, kwargs])
            mine.version = _version(output) if isinstance(output, Tensor) else 0

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(entering(seen[name]), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(seen[name]), with_kwargs=True))
    # `run` does not use inference mode, in which tensors have no versions.
    with hooks_removed(handles):
        run(network, example)
    return seen


def _versions(arguments: Any) -> tuple[int, ...]:
    return tuple(map(_version, tensors_in(arguments)))


def _version(tensor: Tensor) -> int:
    # A forward may itself enter inference mode, where tensors have no versions.
    return 0 if tensor.is_inference() else int(tensor._version)  # noqa: SLF001


def _skippable(seen: Mapping[str, _Seen], site: str) -> Iterator[list[str]]:
    """Yield lists of the outermost modules that finish before a site starts and can be cached.

    The first list includes in-place modules such as activations, together with the modules whose
    output they change. The second leaves these out, because something else may read that output
    too.
    """
    if seen[site].calls != 1:
        return
    start = seen[site].start
    done = {name: one for name, one in seen.items() if 0 < one.end < start and one.answers}
    writers = {(one.place, one.given[0]): one for one in done.values() if one.in_place}
    with_writers = _outermost(name for name, one in done.items() if _can_be_cached(one, writers))
    without = _outermost(name for name, one in done.items() if _can_be_cached(one, {}))
    if with_writers != without:
        yield with_writers
    if without:
        yield without


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the modules that are not inside another one of them."""
    given = dict.fromkeys(names)
    return [name for name in given if not any(above in given for above in _above(name))]


def _can_be_cached(one: _Seen, writers: Mapping[tuple[int, int], _Seen]) -> bool:
    """Whether only these in-place modules write into a module's input or output."""
    if one.writes and not (one.in_place and writers):
        return False
    version = one.version
    while version != one.last:
        writer = writers.get((one.place, version))
        if writer is None:
            return False
        version = writer.version
    return True


def _above(name: str) -> Iterator[str]:
    """Yield the names of the modules that contain a module."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
