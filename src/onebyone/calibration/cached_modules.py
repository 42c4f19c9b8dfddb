"""Chooses the modules whose outputs a prefix cache keeps for each site.

A module is not cached if it writes into its input, or if something writes into its output
afterwards. In-place activations are the exception: they are cached together with the module whose
output they change. At every site a trial compares a resumed pass with a full one; if they differ,
passes for that site are full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.calibration.resumed_pass import (
    Stored,
    outputs_up_to,
    returning_cached,
    without_memory,
)
from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, batch_size, first_examples, sliced, tensors_in
from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import hooks_removed, run

# How much two runs of the same operations may differ, relative to the largest output.
SAME = 1e-5

# Most bytes cached over all batches. A site that needs more resumes from an earlier site, or from
# the start.
KEPT_BYTES = 1_500_000_000


@dataclass(frozen=True)
class _Kept:
    """The modules to cache for each site.

    Attributes:
        at: Site -> modules, with ``True`` if their values are read; sites in order of execution.
        places: The index in that order of every site that runs.
    """

    at: Mapping[str, Mapping[str, bool]]
    places: Mapping[str, int]


def what_to_keep(network: nn.Module, batch: Inputs, sites: Sequence[str], count: int) -> _Kept:
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
            outputs_up_to(network, site, every, example, known)
            for (example, _), known in zip(trials, before, strict=True)
        ]
        reads = _Reads()
        with returning_cached(network, stored[0]), reads:
            outputs = [run(network, first)]
        read = {name: reads.has(stored[0][name]) for name in names}
        shrunk: list[Stored] = [
            {
                name: output if read[name] else without_memory(output)
                for name, output in each.items()
            }
            for each in stored
        ]
        with returning_cached(network, shrunk[1]):
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
