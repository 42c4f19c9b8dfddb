"""One forward pass of a copy -> what each layer costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.errors import ModelError
from onebyone.profiling.counts import RULES, UNCOUNTED
from onebyone.profiling.latency import DISTURBED_SPREAD
from onebyone.records import LayerCost, Timing
from onebyone.sites import (
    Inputs,
    copy_beside,
    evaluation_copy,
    hooks_removed,
    run,
    tensors_in,
)


@dataclass
class _Row:
    """What one module was seen to do; sums over its calls."""

    macs: int = 0
    calls: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()


@dataclass
class _Trace:
    rows: dict[str, _Row] = field(default_factory=dict)
    stack: list[str] = field(default_factory=lambda: [""])  # the network itself at the bottom
    uncounted: Counter[str] = field(default_factory=Counter)

    def row(self, name: str) -> _Row:
        return self.rows.setdefault(name, _Row())


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds each operation's MACs to the innermost module that is running."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket  # noqa: SLF001
        rule = RULES.get(packet)
        if rule is not None:
            self.trace.row(self.trace.stack[-1]).macs += rule(args, output)
        elif packet in UNCOUNTED:
            self.trace.uncounted[str(packet)] += 1
        return output


@dataclass(frozen=True)
class LayerCosts:
    """The layers of a network in order of execution, for one input.

    Attributes:
        uncounted: Operations that multiply but have no rule, with their number.
        output: What the traced pass gave.
    """

    layers: tuple[LayerCost, ...]
    params: int
    macs: int
    uncounted: dict[str, int]
    output: Any = field(compare=False, repr=False)


def trace_layers(model: nn.Module, inputs: Inputs) -> LayerCosts:
    """Run a copy of the network once and count what each layer costs.

    A layer is a module that owns parameters, or inside which (and inside no child of which)
    something is multiplied: functional products are found too, and counted where they happen.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network cannot be copied or run on these inputs.
    """
    network = copy_beside(model, inputs)
    trace = _Trace()
    handles: list[Any] = []
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks: its products count for the module that it is in
        handles.append(module.register_forward_pre_hook(_entering(trace, name), prepend=True))
        handles.append(module.register_forward_hook(_leaving(trace, name), always_call=True))
    with hooks_removed(handles), _plain_attention(), _MacCounter(trace):
        output = run(network, inputs)
    batch = batch_size(inputs)
    layers = _layer_costs(network, trace, batch)
    return LayerCosts(
        layers=layers,
        params=sum(layer.params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        uncounted=dict(trace.uncounted),
        output=output,
    )


def batch_size(inputs: Inputs) -> int:
    """Return how many inputs there are at once: the first size, or pictures in a list."""
    first: Any = inputs
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    elif isinstance(first, (tuple, list)):
        first = next(iter(first), None)
    pictures = isinstance(first, (tuple, list)) and all(
        isinstance(picture, Tensor) and picture.ndim == 3 for picture in first
    )
    if pictures:
        return max(1, len(first))
    return max(1, next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 1))


def _entering(trace: _Trace, name: str) -> Callable[..., None]:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.stack.append(name)
        row = trace.row(name)
        row.calls += 1
        row.input_shape = _shape(args)

    return enter


def _leaving(trace: _Trace, name: str) -> Callable[..., None]:
    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        trace.stack.pop()
        trace.row(name).output_shape = _shape(output)

    return leave


def _shape(value: Any) -> tuple[int, ...]:
    first = next(tensors_in(value), None)
    return () if first is None else tuple(first.shape[1:])


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention from its fused path, whose products no counter can see."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _layer_costs(network: nn.Module, trace: _Trace, batch: int) -> tuple[LayerCost, ...]:
    modules = dict(network.named_modules())
    params = _own_params(modules)
    executed = list(trace.rows)
    names = executed + [name for name in modules if name not in trace.rows]
    layers = []
    for name in names:
        row = trace.rows.get(name, _Row())
        if not (params[name] or row.macs):
            continue
        layers.append(
            LayerCost(
                name=name,
                kind=describe(modules[name]),
                input_shape=row.input_shape,
                output_shape=row.output_shape,
                params=params[name],
                macs=row.macs // batch,
                calls=row.calls,
            )
        )
    return tuple(layers)


def _own_params(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Return each module's own parameters; one that several modules share is counted once."""
    seen: set[int] = set()
    counts = {}
    for name, module in modules.items():
        counts[name] = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"Layers must be initialized, but {name!r} is a lazy {type(module).__name__}. "
                    f"Run the network once on an example before handing it over."
                )
            seen.add(id(parameter))
            counts[name] += parameter.numel()
    return counts


def describe(module: nn.Module) -> str:
    """Return what a layer is in a few words: ``Conv2d 3×3 /2 g32``."""
    name = type(module).__name__
    kernel = getattr(module, "kernel_size", None)
    if not (isinstance(kernel, tuple) and isinstance(module, nn.modules.conv._ConvNd)):  # noqa: SLF001
        return name
    words = [name, "×".join(map(str, kernel))]
    if set(module.stride) != {1}:
        stride = module.stride
        words.append(
            "/" + (str(stride[0]) if len(set(stride)) == 1 else "×".join(map(str, stride)))
        )
    if set(module.dilation) != {1}:
        words.append(f"d{module.dilation[0]}")
    if module.groups > 1:
        words.append(f"g{module.groups}")
    return " ".join(words)


def time_layers(
    model: nn.Module, inputs: Tensor, layers: tuple[LayerCost, ...], *, seconds: float = 2.0
) -> dict[str, Timing]:
    """Time each layer inside the whole network, where caches and neighbours are what they are.

    Args:
        model: Not modified; a copy in evaluation mode is run, eagerly.
        inputs: Shape ``(batch, …)``, on the device to be timed.
        layers: The layers, from :func:`trace_layers`.
        seconds: About how long to go on; at least 5 passes are made.

    Returns:
        The time of all the calls of each layer in one pass, without that of layers inside it.
    """
    network = evaluation_copy(model, device=inputs.device)
    wait = torch.cuda.synchronize if inputs.is_cuda else _nothing
    clock = _ExclusiveClock(wait)
    modules = dict(network.named_modules())
    handles: list[Any] = []
    for layer in layers:
        if layer.calls:
            module = modules[layer.name]
            handles.append(
                module.register_forward_pre_hook(clock.entering(layer.name), prepend=True)
            )
            handles.append(module.register_forward_hook(clock.leaving()))
    passes: list[dict[str, float]] = []
    with hooks_removed(handles), torch.inference_mode():
        for _ in range(3):
            network(inputs)
        started = time.perf_counter()
        while len(passes) < 5 or (time.perf_counter() - started < seconds and len(passes) < 200):
            clock.ms = {}
            network(inputs)
            passes.append(clock.ms)
    return {
        layer.name: _layer_timing([p[layer.name] for p in passes], inputs)
        for layer in layers
        if layer.calls and layer.name in passes[0]
    }


def _nothing() -> None:
    return None


class _ExclusiveClock:
    """Time in each module less the time in timed modules inside it."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.ms: dict[str, float] = {}
        self._wait = wait
        self._stack: list[list[Any]] = []

    def entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, __: tuple[Any, ...]) -> None:
            self._wait()
            self._stack.append([name, time.perf_counter_ns(), 0])

        return enter

    def leaving(self) -> Callable[..., None]:
        def leave(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            self._wait()
            name, start, inside = self._stack.pop()
            elapsed = time.perf_counter_ns() - start
            self.ms[name] = self.ms.get(name, 0.0) + (elapsed - inside) / 1e6
            if self._stack:
                self._stack[-1][2] += elapsed

        return leave


def _layer_timing(samples: list[float], inputs: Tensor) -> Timing:
    q1, median, q3 = (float(q) for q in np.percentile(samples, [25, 50, 75]))
    return Timing(
        runtime="eager",
        device=str(inputs.device),
        threads=torch.get_num_threads(),
        batch=inputs.shape[0],
        repeats=len(samples),
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        disturbed=(q3 - q1) > DISTURBED_SPREAD * median,
    )
