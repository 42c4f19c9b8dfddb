"""One pass of a network that stops at a module, stores outputs, or resumes from stored ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import Tensor, nn

from onebyone.core.tensor_trees import Inputs
from onebyone.networks.surgery import hooks_removed, module_at, run

Stored = Mapping[str, Tensor]


@contextmanager
def returning_cached(network: nn.Module, known: Stored) -> Iterator[None]:
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


def outputs_up_to(
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
    keeping = recording(network, kept, found)
    with hooks_removed(handles), keeping, returning_cached(network, known), suppress(Reached):
        run(network, inputs)
    return found


@contextmanager
def recording(
    network: nn.Module, kept: Mapping[str, bool], found: dict[str, Tensor]
) -> Iterator[None]:
    """Store the outputs of modules in ``found`` while in this context."""

    def keep(name: str, *, read: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output if read else without_memory(output)

        return hook

    handles = [
        network.get_submodule(name).register_forward_hook(keep(name, read=read))
        for name, read in kept.items()
    ]
    with hooks_removed(handles):
        yield


def without_memory(output: Tensor) -> Tensor:
    """Return a tensor of the same shape that takes no memory, for values that nothing reads."""
    return output.new_zeros(()).expand(output.shape)
