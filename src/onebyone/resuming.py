"""A network run again and again, with modules changed meanwhile, each time only from there on.

Modules that have finished before the changed one starts give what they gave before; everything
else, also what a forward computes between its modules, runs as it is. This needs no graph of the
network. What writes into its input, or is written into afterwards, runs too, but for activations
in place, which are left out with what they write into. Whether a resumed pass gives what a whole
one gives is tried at every site: where it does not, passes are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.errors import ModelError
from onebyone.outputs import Outputs, comparable
from onebyone.sites import has_hooks, hooks_removed, module_at, replace_module, run, tensors_in

# The same operations on the same values: what two runs may differ by, of the largest output.
SAME = 1e-5

# What is kept of all batches together may take so many bytes; sites before which more would have to
# be kept are reached from an earlier one, or from the start.
KEPT_BYTES = 1_500_000_000

Stored = Mapping[str, Tensor]


class ResumedPasses:
    """Passes of a network over the same batches with one of its modules changed.

    Args:
        network: In evaluation mode. Changed while a pass runs, and only then.
        batches: The inputs.
        sites: Names of the modules that are to be changed, in order of execution.

    Attributes:
        reference: The network's own outputs, of each batch.
        resumed: The sites from which passes are resumed.

    Raises:
        ModelError: If the network does not run, or gives no tensors, or some without the batch.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor], sites: Sequence[str]) -> None:
        self._network = network
        self._batches = batches
        self.reference = [
            comparable(run(network, inputs), network, len(inputs)) for inputs in batches
        ]
        examples = sum(len(inputs) for inputs in batches)
        self._kept = _what_to_keep(network, batches[0], sites, examples).at
        self.resumed = tuple(self._kept)
        self._place = -1
        self._stored: list[Stored] = [{} for _ in batches]

    def outputs(self, site: str, new: nn.Module) -> Iterator[Outputs]:
        """Yield the outputs for each batch with a module replaced, which is then put back.

        Args:
            site: Its name. Passes are resumed as long as sites come in order of execution.
            new: What takes its place.

        Raises:
            ModelError: If the network does not run with it.
        """
        stored = self._stored_at(site)
        for inputs, known in zip(self._batches, stored, strict=True):
            with _giving(self._network, known), _replaced(self._network, site, new) as network:
                outputs = comparable(run(network, inputs), network, len(inputs))
            yield outputs

    def _stored_at(self, site: str) -> Sequence[Stored]:
        """Return what to give in each batch, after going on to that site if it is a later one."""
        place = self.resumed.index(site) if site in self._kept else -1
        if place < 0 or place < self._place:
            return [{} for _ in self._batches]
        if place > self._place:
            kept = self._kept[site]
            self._stored = [
                _up_to(self._network, site, kept, inputs, known)
                for inputs, known in zip(self._batches, self._stored, strict=True)
            ]
            self._place = place
        return self._stored


class Advancing:
    """Passes of a network over the same batches, each up to a later module than the last time.

    Each is resumed where the last one of the batch began to be of interest; modules from there on
    may have been changed since.

    Args:
        network: In evaluation mode; as it is before any change.
        batch: The first batch.
        sites: Names of the modules that passes are to go to.
        examples: Of all batches together.

    Attributes:
        resumed: The sites before which a pass leaves what the next one is resumed from, in order
            of execution.
    """

    def __init__(
        self, network: nn.Module, batch: Tensor, sites: Sequence[str], examples: int
    ) -> None:
        found = _what_to_keep(network, batch, sites, examples)
        self._kept, self._places = found.at, found.places
        self.resumed = tuple(self._kept)
        self._left: dict[int, tuple[int, Stored]] = {}

    @contextmanager
    def going_to(self, network: nn.Module, batch: int, sites: Sequence[str]) -> Iterator[None]:
        """Let the pass that is made inside begin where the last one of that batch left off.

        Args:
            network: The network as it is now.
            batch: Which of the batches the pass is for, from 0.
            sites: What it goes to; it must get as far as the first of them in order of execution.
        """
        first = min(sites, key=lambda name: self._places.get(name, 0))
        place = self._places.get(first, 0)
        left, known = self._left.get(batch, (0, {}))
        if left > place:  # modules after this one may have been changed
            known = {}
        kept = self._kept.get(first, {})
        found: dict[str, Tensor] = {}
        with _keeping(network, kept, found), _giving(network, known):
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
def _giving(network: nn.Module, known: Stored) -> Iterator[None]:
    """Let modules give, inside, what they are known to give."""
    changed = [network.get_submodule(name) for name in known]
    before = [vars(module).get("forward") for module in changed]
    try:
        for module, output in zip(changed, known.values(), strict=True):
            vars(module)["forward"] = _giver(output)
        yield
    finally:
        for module, forward in zip(changed, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _giver(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


class Reached(Exception):  # noqa: N818 - not an error: the pass need not go on
    """What a pass was made for has run, or is about to."""


def _up_to(
    network: nn.Module, site: str, kept: Mapping[str, bool], inputs: Tensor, known: Stored
) -> Stored:
    """Run a network up to a site and return what the modules to be kept gave.

    Args:
        network: Not modified.
        site: Where to stop.
        kept: Names of modules, and whether their values are read from there on.
        inputs: Of the network.
        known: The same of an earlier site: the pass is resumed from there.
    """
    found: dict[str, Tensor] = {}

    def stop(_: nn.Module, __: object) -> None:
        raise Reached

    handles = [module_at(network, site).register_forward_pre_hook(stop)]
    keeping = _keeping(network, kept, found)
    with hooks_removed(handles), keeping, _giving(network, known), suppress(Reached):
        run(network, inputs)
    return found


@contextmanager
def _keeping(
    network: nn.Module, kept: Mapping[str, bool], found: dict[str, Tensor]
) -> Iterator[None]:
    """Put into ``found`` what modules give inside."""

    def keep(name: str, *, read: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output if read else _of_shape(output)

        return hook

    handles = [
        network.get_submodule(name).register_forward_hook(keep(name, read=read))
        for name, read in kept.items()
    ]
    with hooks_removed(handles):
        yield


def _of_shape(output: Tensor) -> Tensor:
    """Return a tensor of that shape which takes no memory: nothing reads its values."""
    return output.new_zeros(()).expand(output.shape)


# ---------------------------------------------------------------- what to keep


@dataclass(frozen=True)
class _Kept:
    """What need not run before sites.

    Attributes:
        at: Site -> the modules; ``True`` where their values are read. In order of execution.
        places: Where every site that runs stands in that order.
    """

    at: Mapping[str, Mapping[str, bool]]
    places: Mapping[str, int]


def _what_to_keep(network: nn.Module, batch: Tensor, sites: Sequence[str], count: int) -> _Kept:
    """Return for each site what need not run before it, if all that fits into the memory.

    Sites at which a resumed pass does not give what a whole one gives are not among them. That is
    tried on two examples in turns, so that what a module remembers of its last run is noticed.
    """
    trials = [(example, run(network, example)) for example in (batch[:1], batch[-1:])]
    runs = _watched(network, batch[:1])
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
    """Return what is held for one example; what nothing reads takes no memory."""
    storages = [tensor.untyped_storage() for tensor in stored.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tried(
    network: nn.Module,
    site: str,
    names: Sequence[str],
    trials: Sequence[tuple[Tensor, Any]],
    before: Sequence[Stored],
) -> tuple[list[Stored], dict[str, bool]]:
    """Return what a resumed pass is given for each example, and which of it is read.

    Nothing, if the pass does not give what a whole one gives.

    Args:
        network: Not modified.
        site: That passes are to be resumed at.
        names: Modules to be left out.
        trials: Examples, each with the network's output.
        before: What a pass is given that is resumed at an earlier site, for each example.
    """
    every = dict.fromkeys(names, True)
    (first, _), (second, _) = trials
    try:
        stored: list[Stored] = [
            _up_to(network, site, every, example, known)
            for (example, _), known in zip(trials, before, strict=True)
        ]
        reads = _Reads()
        with _giving(network, stored[0]), reads:
            outputs = [run(network, first)]
        read = {name: reads.has(stored[0][name]) for name in names}
        shrunk: list[Stored] = [
            {name: output if read[name] else _of_shape(output) for name, output in each.items()}
            for each in stored
        ]
        with _giving(network, shrunk[1]):
            outputs.append(run(network, second))
    except ModelError:
        return [], {}  # it does not bear it
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
    """Remembers the memory that operations read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: set[int] = set()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor, or another in the same memory, was read."""
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
    """What was seen of a module in a pass.

    ``start``, of the first call, and ``end``, of the last, count the starts and ends of all.
    """

    calls: int = 0
    start: int = 0
    end: int = 0
    hooked: bool = False
    given: tuple[int, ...] = ()  # versions of its arguments: raised by whatever writes into them
    writes: bool = False
    output: Any = None
    version: int = 0

    @property
    def answers(self) -> bool:
        """Whether it gives one tensor, once, and nothing else looks on."""
        return self.calls == 1 and not self.hooked and isinstance(self.output, Tensor)

    @property
    def in_place(self) -> bool:
        """Whether it writes into the one tensor that it is given, and gives that."""
        return self.writes and len(self.given) == 1 and self.version > self.given[0]

    @property
    def last(self) -> int:
        """The version of its output when the pass has ended."""
        return int(self.output._version)  # noqa: SLF001 - raised by whatever writes into it

    @property
    def place(self) -> int:
        """Of its output in memory."""
        return int(self.output.untyped_storage().data_ptr())


def _watched(network: nn.Module, example: Tensor) -> dict[str, _Seen]:
    """Run a network and return what was seen of its modules, but for itself."""
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
            mine.version = output._version if isinstance(output, Tensor) else 0  # noqa: SLF001

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(entering(seen[name]), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(seen[name]), with_kwargs=True))
    # Without gradients, but not in inference mode, in which tensors have no versions.
    with hooks_removed(handles):
        run(network, example)
    return seen


def _versions(arguments: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors_in(arguments))  # noqa: SLF001


def _skippable(seen: Mapping[str, _Seen], site: str) -> Iterator[list[str]]:
    """Yield the outermost modules that have finished before a site starts and may be left out.

    First with those that write into what they are given and give that, as activations in place do:
    left out together with what they write into. Then without, for what they write into may be read
    elsewhere too.
    """
    if seen[site].calls != 1:
        return
    start = seen[site].start
    done = {name: one for name, one in seen.items() if 0 < one.end < start and one.answers}
    writers = {(one.place, one.given[0]): one for one in done.values() if one.in_place}
    with_writers = _outermost(name for name, one in done.items() if _settles(one, writers))
    without = _outermost(name for name, one in done.items() if _settles(one, {}))
    if with_writers != without:
        yield with_writers
    if without:
        yield without


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the modules that lie in none of the others."""
    given = dict.fromkeys(names)
    return [name for name in given if not any(above in given for above in _above(name))]


def _settles(one: _Seen, writers: Mapping[tuple[int, int], _Seen]) -> bool:
    """Whether a module writes nowhere but as these do, and they alone into its output since."""
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
    """Yield the names of the modules that a module is in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
