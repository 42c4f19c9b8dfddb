"""A network run again and again with one module changed, each time only from that module on.

Modules that have finished before the changed one starts give what they gave before; everything
else, also what a forward computes between its modules, runs as it is. This needs no graph of the
network. What writes into its input, or is written into afterwards, runs too; and whether a resumed
pass gives what a whole one gives is tried at every site: where it does not, passes are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.errors import ModelError
from onebyone.evaluation import one_tensor
from onebyone.sites import hooks_removed, module_at, replace_module, run, tensors_in

# The same operations on the same values: what two runs may differ by, of the largest output.
SAME = 1e-5

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
        ModelError: If the network does not run, or gives something that is not one tensor.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor], sites: Sequence[str]) -> None:
        self._network = network
        self._batches = batches
        self.reference = [one_tensor(run(network, inputs), network) for inputs in batches]
        self._kept = _what_to_keep(network, batches[0], sites)
        self.resumed = tuple(self._kept)
        self._place = -1
        self._stored: list[Stored] = [{} for _ in batches]

    def outputs(self, site: str, new: nn.Module) -> Iterator[Tensor]:
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
                output = one_tensor(run(network, inputs), network)
            yield output

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


class _Reached(Exception):  # noqa: N818 - not an error: the pass need not go on
    """The site is about to run."""


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

    def keep(name: str, *, read: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output if read else _of_shape(output)

        return hook

    def stop(_: nn.Module, __: object) -> None:
        raise _Reached

    handles = [module_at(network, site).register_forward_pre_hook(stop)]
    for name, read in kept.items():
        handles.append(network.get_submodule(name).register_forward_hook(keep(name, read=read)))
    with hooks_removed(handles), _giving(network, known), suppress(_Reached):
        run(network, inputs)
    return found


def _of_shape(output: Tensor) -> Tensor:
    """Return a tensor of that shape which takes no memory: nothing reads its values."""
    return output.new_zeros(()).expand(output.shape)


# ---------------------------------------------------------------- what to keep


def _what_to_keep(
    network: nn.Module, batch: Tensor, sites: Sequence[str]
) -> dict[str, dict[str, bool]]:
    """Return for each site what need not run before it; ``True`` where its values are read.

    Sites at which a resumed pass does not give what a whole one gives are not among them. That is
    tried on two examples in turns, so that what a module remembers of its last run is noticed.
    """
    examples = [batch[:1], batch[-1:]]
    wholes = [run(network, example) for example in examples]
    runs = _watched(network, examples[0])
    kept: dict[str, dict[str, bool]] = {}
    before: list[Stored] = [{}, {}]
    for site in sites:
        names = _skippable(runs, site)
        try:
            stored, reads = _tried(network, site, names, examples, before)
            outputs = []
            for example, known in zip(examples, stored, strict=True):
                with _giving(network, known):
                    outputs.append(run(network, example))
        except ModelError:
            continue  # it does not bear it
        if names and all(_is_same(a, b) for a, b in zip(wholes, outputs, strict=True)):
            before, kept[site] = stored, reads
    return kept


def _tried(
    network: nn.Module,
    site: str,
    names: Sequence[str],
    examples: Sequence[Tensor],
    before: Sequence[Stored],
) -> tuple[list[Stored], dict[str, bool]]:
    """Return what a resumed pass is given for each example, and which of it is read."""
    every = dict.fromkeys(names, True)
    stored: list[Stored] = [
        _up_to(network, site, every, example, known)
        for example, known in zip(examples, before, strict=True)
    ]
    reads = _Reads()
    with _giving(network, stored[0]), reads:
        run(network, examples[0])
    read = {name: reads.has(stored[0][name]) for name in names}
    shrunk: list[Stored] = [
        {name: output if read[name] else _of_shape(output) for name, output in each.items()}
        for each in stored
    ]
    return shrunk, read


def _is_same(whole: Any, resumed: Any) -> bool:
    if not isinstance(whole, Tensor) or not isinstance(resumed, Tensor):
        return False
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


@dataclass
class _Seen:
    """What was seen of a module in a pass; ``start`` and ``end`` count starts and ends of all."""

    calls: int = 0
    start: int = 0
    end: int = 0
    hooked: bool = False
    given: tuple[int, ...] = ()  # versions of its arguments: raised by whatever writes into them
    writes: bool = False
    output: Any = None
    version: int = 0

    @property
    def stays(self) -> bool:
        """Whether it can be left out of a pass, its output being known."""
        if self.calls != 1 or self.hooked or self.writes or not isinstance(self.output, Tensor):
            return False
        return self.output._version == self.version  # noqa: SLF001 - else something wrote into it


def _watched(network: nn.Module, example: Tensor) -> dict[str, _Seen]:
    """Run a network and return what was seen of its modules, but for itself."""
    modules = {
        name: module
        for name, module in network.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    }
    seen = {name: _Seen(hooked=_has_hooks(module)) for name, module in modules.items()}
    now = 0

    def entering(mine: _Seen) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal now
            now += 1
            mine.calls, mine.start, mine.given = mine.calls + 1, now, _versions([args, kwargs])

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


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _skippable(seen: Mapping[str, _Seen], site: str) -> list[str]:
    """Return the outermost modules that have finished before a site starts and may be left out."""
    if site not in seen:
        return []
    start = seen[site].start
    done = {name: one for name, one in seen.items() if 0 < one.end < start and one.stays}
    return [name for name in done if not any(above in done for above in _above(name))]


def _above(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module is in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
