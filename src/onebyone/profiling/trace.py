"""Counts and times each layer of a network during forward passes of a copy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.core.errors import ModelError
from onebyone.core.records import Cost, LayerCost, Timing
from onebyone.core.rounds import limited
from onebyone.core.shared_state import SharedChange
from onebyone.core.tensor_trees import Inputs, batch_size, device_of, fresh, tensors_in
from onebyone.networks.held import copy_runs_alone, to_run, to_run_beside
from onebyone.networks.surgery import (
    call,
    hooks_removed,
    run,
    writes_into_inputs,
)
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.profiling.counts import has_rule, macs_of, name_of
from onebyone.profiling.latency import DISTURBED_SPREAD

# Number of passes for timing the layers.
FEWEST_PASSES = 5
MOST_PASSES = 200


@dataclass
class _Row:
    """MACs, calls and shapes of one module, summed over its calls."""

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
        kwargs = kwargs or {}
        if not has_rule(func) and hasattr(func, "decompose"):
            # If the forward enters inference mode, composite operations arrive undecomposed.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        macs = macs_of(func, args, output)
        if macs is None:
            self.trace.uncounted[name_of(func)] += 1
        elif macs:
            self.trace.row(self.trace.stack[-1]).macs += macs
        return output


@dataclass(frozen=True)
class LayerCosts:
    """The layers of a network in order of execution, for one input.

    Attributes:
        layers: The layers.
        params: Parameters of the network; shared ones count once.
        macs: MACs of the network.
        bytes: Bytes of all weights and saved buffers.
        uncounted: Operations whose MACs are unknown, with their number of calls.
        output: The output of the traced pass.
    """

    layers: tuple[LayerCost, ...]
    params: int
    macs: int
    bytes: int
    uncounted: dict[str, int]
    output: Any = field(compare=False, repr=False)

    @property
    def cost(self) -> Cost:
        """The cost of the whole network."""
        return Cost(params=self.params, macs=self.macs, bytes=self.bytes)


def trace_layers(model: nn.Module, inputs: Inputs) -> LayerCosts:
    """Run a copy of the network once and count each layer's parameters and MACs.

    A layer is a module that owns parameters, or whose own forward (outside its children) contains a
    matrix product. So functional products are found too, and count for the module that calls them.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network cannot be copied or run on these inputs.
    """
    network = to_run_beside(model, inputs)
    trace = _Trace()
    handles: list[Any] = []
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks: its MACs count for its parent
        handles.append(
            module.register_forward_pre_hook(_entering(trace, name), prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(_leaving(trace, name), always_call=True))
    given = fresh(inputs)  # before counting, so that the copying is not recorded
    with (
        hooks_removed(handles),
        _plain_attention(),
        copy_runs_alone(model, network),
        _MacCounter(trace),
    ):
        output = run(network, given, given_away=True)
    batch = batch_size(inputs)
    layers = _layer_costs(network, trace, batch)
    return LayerCosts(
        layers=layers,
        params=sum(layer.params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        bytes=weight_bytes(network),
        uncounted=dict(trace.uncounted),
        output=output,
    )


def _entering(trace: _Trace, name: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.stack.append(name)
        row = trace.row(name)
        row.calls += 1
        row.input_shape = _shape((*args, *kwargs.values()), module)

    return enter


def _leaving(trace: _Trace, name: str) -> Callable[..., None]:
    def leave(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        trace.stack.pop()
        trace.row(name).output_shape = _shape(output, module)

    return leave


def _shape(value: Any, module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the first tensor, without the batch dimension if it has one."""
    first = next(tensors_in(value), None)
    if first is None:
        return ()
    convolves = isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001
    unbatched = convolves and first.ndim == len(cast("nn.Conv2d", module).kernel_size) + 1
    return tuple(first.shape if unbatched else first.shape[1:])


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: Turns off the fused path of nn.MultiheadAttention, whose products no counter can see.
_plain_attention = SharedChange(_without_fast_path)


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
    """Return the number of parameters of each module itself; a shared one counts once."""
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
                    f"Run the network once on an example first."
                )
            seen.add(id(parameter))
            counts[name] += parameter.numel()
    return counts


def describe(module: nn.Module) -> str:
    """Return a short description of a layer, such as ``Conv2d 3×3 /2 g32``."""
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
    model: nn.Module, inputs: Inputs, layers: tuple[LayerCost, ...], *, seconds: float = 2.0
) -> dict[str, Timing]:
    """Time each layer while the whole network runs, under realistic cache conditions.

    Args:
        model: Not modified; a copy in evaluation mode is run, eagerly.
        inputs: As for :func:`trace_layers`, on the device to be timed.
        layers: The layers, from :func:`trace_layers`.
        seconds: About how long to measure; makes at least ``FEWEST_PASSES`` passes.

    Returns:
        The time of all calls of each layer in one pass, without the layers inside it.
    """
    device = device_of(inputs)
    network = to_run(model, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    # With one thread, all computing is in this thread. Its thread time does not include waits for a
    # processor.
    alone = torch.get_num_threads() == 1 and device.type != "cuda"
    clock = _ExclusiveClock(wait, time.thread_time_ns if alone else time.perf_counter_ns)
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
    writes = writes_into_inputs(network, inputs)
    with hooks_removed(handles), torch.inference_mode():
        for _ in range(3):
            call(network, fresh(inputs))
        started = time.perf_counter()
        most = limited(MOST_PASSES)
        while len(passes) < min(FEWEST_PASSES, most) or (
            time.perf_counter() - started < seconds and len(passes) < most
        ):
            given = fresh(inputs) if writes else inputs
            clock.ms = {}
            call(network, given)
            passes.append(clock.ms)
    return {
        layer.name: _layer_timing([p[layer.name] for p in passes], inputs)
        for layer in layers
        if layer.calls and layer.name in passes[0]
    }


def _nothing() -> None:
    return None


class _ExclusiveClock:
    """Measures the time in each module, minus the time in timed modules inside it."""

    def __init__(self, wait: Callable[[], None], now: Callable[[], int]) -> None:
        self.ms: dict[str, float] = {}
        self._wait = wait
        self._now = now
        self._stack: list[list[Any]] = []

    def entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, __: tuple[Any, ...]) -> None:
            self._wait()
            self._stack.append([name, self._now(), 0])

        return enter

    def leaving(self) -> Callable[..., None]:
        def leave(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            self._wait()
            name, start, inside = self._stack.pop()
            elapsed = self._now() - start
            self.ms[name] = self.ms.get(name, 0.0) + (elapsed - inside) / 1e6
            if self._stack:
                self._stack[-1][2] += elapsed

        return leave


def _layer_timing(samples: list[float], inputs: Inputs) -> Timing:
    q1, median, q3 = (float(q) for q in np.percentile(samples, [25, 50, 75]))
    return Timing(
        runtime="eager",
        device=str(device_of(inputs)),
        threads=torch.get_num_threads(),
        batch=batch_size(inputs),
        repeats=len(samples),
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        disturbed=(q3 - q1) > DISTURBED_SPREAD * median,
    )
