"""Streamed second moments of what layers see and give on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from onebyone.data import Split, as_split
from onebyone.errors import DataError
from onebyone.kernels import (
    bias_of,
    choose_places,
    input_rows,
    is_linear,
    kernel_of,
    output_places,
    output_rows,
    shape_of,
    why_unknown,
)
from onebyone.outputs import Outputs, comparable, is_classifier_output
from onebyone.profiling.trace import trace_layers
from onebyone.records import CalibrationInfo
from onebyone.resuming import Advancing, Reached
from onebyone.sites import (
    as_device,
    evaluation_copy,
    floating_type,
    hooks_removed,
    in_evaluation_mode,
    module_at,
    run,
)

# Float32 sums of this many rows are exact enough to be added up in float64.
ROWS_A_BLOCK = 65_536
# Products of rows with themselves are a symmetric square: so many of its rows are computed at once,
# from the diagonal on, which halves the multiplications of wide layers.
COLUMNS = 256
# Values of unfolded patches held at once: 64 M float32 are 256 MB.
PATCH_VALUES = 64_000_000
# A kernel may see this many values at once: their covariance is a square of that side in float64,
# 0.5 GB, and the regression needs several. Of a wider layer the outputs alone are kept.
MOST_VALUES = 8192
# Neighbouring places say nearly the same: where a map is large, so many rows are drawn for each
# value that the kernel sees; fewer where their products would cost more than so many MACs, but not
# fewer than so many a value.
ROWS_A_VALUE = 512
# Values of inputs in a batch: the activations of all layers, which follow their number, must fit.
BATCH_VALUES = 1_250_000
# The curvature needs a pass forth and back, with gradients of activations alone: twice the MACs of
# one forth. It is a metric, a few hundred examples tell enough of it, and for so many MACs these
# are had.
CURVATURE_MACS = 8e11
FEWEST_CURVATURE_EXAMPLES = 64
# Examples that are drawn where their number is not given: so many rows for each value that a kernel
# sees, if a pass costs no more MACs than that, but not fewer examples than these.
ROWS_TO_FIT = 3
CALIBRATION_MACS = 1e12
FEWEST_EXAMPLES = 1024
# Of outputs that are maps a direction is drawn at each place, so that few examples have many.
DIRECTIONS = 65_536
FEWEST_WITH_MAPS = 8


class Enough(NamedTuple):
    """How many rows of a wide layer are enough.

    Attributes:
        macs: Of their products.
        fewest: For each value that the kernel sees, whatever that costs.
    """

    macs: float
    fewest: int


TO_FIT = Enough(macs=4e11, fewest=8)
# Which options are worth what shows with fewer than the weights need.
TO_COMPARE = Enough(macs=5e10, fewest=4)


@dataclass(frozen=True)
class Moments:
    """First and second moments of inputs ``x`` and outputs ``y`` of a layer, in float64.

    A row is one place of one example: ``x`` is the patch under the kernel (channels first, then
    kernel places; padding included as the layer pads), ``y`` the output channels there.

    Attributes:
        rows: How many were summed.
        mean_x: Shape ``(d,)``.
        mean_y: Shape ``(o,)``.
        xx: Covariance of ``x``, shape ``(d, d)``; ``None`` of a layer too wide for it.
        yx: Covariance of ``y`` with ``x``, shape ``(o, d)``; ``None`` likewise.
        yy: Covariance of ``y``, shape ``(o, o)``.
    """

    rows: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor | None
    yx: Tensor | None
    yy: Tensor


class MomentSum:
    """Adds up rows, block by block; never holds them all.

    Args:
        outputs_only: Keep of the inputs the mean alone.
    """

    def __init__(self, *, outputs_only: bool = False) -> None:
        self.outputs_only = outputs_only
        self.rows = 0
        self._sums: dict[str, Tensor] = {}
        self._origins: dict[str, Tensor] = {}
        # Of the last rows, in their own precision: a square in float64 for every few rows would
        # cost more than their products.
        self._recent: dict[str, Tensor] = {}
        self._recent_rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows of inputs ``(rows, d)`` and, if given, of outputs ``(rows, o)``."""
        for start in range(0, len(x), ROWS_A_BLOCK):
            block = self._shifted("x", x[start : start + ROWS_A_BLOCK])
            if self._recent_rows + len(block) > ROWS_A_BLOCK:
                self._settle()
            self._recent_rows += len(block)
            self._sum("x", block)
            if not self.outputs_only:
                self._products("xx", block, block)
            if y is not None:
                other = self._shifted("y", y[start : start + ROWS_A_BLOCK])
                self._sum("y", other)
                self._products("yy", other, other)
                if not self.outputs_only:
                    self._products("yx", other, block)
        self.rows += len(x)

    def _shifted(self, name: str, rows: Tensor) -> Tensor:
        # About the first block's mean: a channel that is large and hardly varies would otherwise
        # lose its variance, the difference of two large numbers, to float32's rounding.
        if name not in self._origins:
            self._origins[name] = rows.mean(0)
        return rows - self._origins[name]

    def _mean(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean, and the mean about the origin that the sums are about."""
        shifted = self._sums[name] / self.rows
        return shifted + self._origins[name].to(shifted), shifted

    def _sum(self, name: str, rows: Tensor) -> None:
        if name not in self._recent:
            self._recent[name] = rows.new_zeros(rows.shape[1])
        self._recent[name] += rows.sum(0)

    def _products(self, name: str, first: Tensor, second: Tensor) -> None:
        """Add ``first.T @ second``; of a square the part on and above the diagonal."""
        wide, high = first.shape[1], second.shape[1]
        if name not in self._recent:
            self._recent[name] = first.new_zeros(wide, high)
        total = self._recent[name]
        if first is not second:
            total.addmm_(first.T, second)
            return
        for start in range(0, wide, COLUMNS):
            end = min(start + COLUMNS, wide)
            total[start:end, start:].addmm_(first[:, start:end].T, second[:, start:])

    def _settle(self) -> None:
        """Add the last rows' sums to those of all, in float64 on the CPU."""
        for name in list(self._recent):
            recent = self._recent.pop(name).to(device="cpu", dtype=torch.float64)
            if name in self._sums:
                self._sums[name] += recent
            else:
                self._sums[name] = recent
        self._recent_rows = 0

    def moments(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Moments:
        """Return the centered moments; the sums become them, and are then no more.

        Args:
            weight: Shape ``(o, d)``; if no outputs were added, their moments follow from those of
                ``x``, for ``y = weight @ x + bias``.
            bias: Shape ``(o,)``.

        Raises:
            DataError: If no rows were added: the layer never ran.
        """
        if not self.rows:
            raise DataError("Moments need at least one row, got none: the layer never ran.")
        self._settle()
        n = self.rows
        mean_x, near_x = self._mean("x")
        xx = None if self.outputs_only else self._centered("xx", near_x, near_x)
        if "y" not in self._sums:
            assert xx is not None
            assert weight is not None
            mean_y = weight @ mean_x + (0 if bias is None else bias)
            yx = weight @ xx
            return Moments(n, mean_x, mean_y, xx, yx, yx @ weight.T)
        mean_y, near_y = self._mean("y")
        yy = self._centered("yy", near_y, near_y)
        if xx is None:
            return Moments(n, mean_x, mean_y, None, None, yy)
        yx = self._centered("yx", near_y, near_x)
        return Moments(n, mean_x, mean_y, xx, yx, yy)

    def _centered(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        # In place: of the widest layers each such square takes half a gigabyte.
        found = self._sums.pop(name)
        if name[0] == name[1]:
            _mirror(found)
        return found.div_(self.rows).addr_(first, second, alpha=-1)


def _mirror(square: Tensor) -> None:
    """Copy what is above the diagonal below it, in place."""
    for start in range(0, len(square), COLUMNS):
        end = start + COLUMNS
        square[end:, start:end] = square[start:end, end:].T


# ---------------------------------------------------------------- one layer


class LayerSum:
    """The moments of one layer, of each of its groups, over a sample of its output places.

    Args:
        module: The layer; only read.
        examples: How many will be seen, if known: then a large map's places are sampled.
        generator: That draws them.
        enough: Of a wide layer.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: int | None,
        generator: torch.Generator,
        *,
        enough: Enough = TO_FIT,
    ) -> None:
        self.module = module
        self._enough = enough
        self.shape = shape_of(module)
        self._examples = examples
        self._generator = generator
        self._outputs_only = self.shape.values > MOST_VALUES
        self._sums = [MomentSum(outputs_only=self._outputs_only) for _ in range(self.shape.groups)]

    @property
    def ran(self) -> bool:
        """Whether anything was added."""
        return any(total.rows for total in self._sums)

    def add(self, x: Tensor, y: Tensor, *, own: bool) -> None:
        """Add a batch.

        Args:
            x: The layer's input.
            y: What it gives, or should give.
            own: Whether ``y`` is the layer's own output: its moments then follow from those of
                ``x``.
        """
        x, y = _working(x), _working(y)
        places = None
        if self._examples is not None:
            places = choose_places(self.module, y, self._wanted(y), self._generator)
        for inputs, outputs in self._parts(x, y, places):
            rows = input_rows(self.module, inputs, places=places)
            given = None
            if self._outputs_only or not own:
                given = output_rows(self.module, outputs, places=places)
            self._add_rows(rows, given)

    def _wanted(self, y: Tensor) -> int:
        """Return the places to look at: of each example, or of a linear layer's whole batch."""
        values = self.shape.out if self._outputs_only else self.shape.values
        affordable = max(self._enough.fewest * values, int(self._enough.macs) // values**2)
        rows = min(ROWS_A_VALUE * values, affordable)
        share = len(y) if is_linear(self.module) else 1
        return -(-rows * share // max(self._examples or 1, 1))

    def _parts(
        self, x: Tensor, y: Tensor, places: list[Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut a batch so that its unfolded patches are not held all at once."""
        if is_linear(self.module) or x.ndim == len(cast("nn.Conv2d", self.module).kernel_size) + 1:
            yield x, y  # no batch to cut
            return
        count = output_places(self.module, y) if places is None else len(places[0])
        values = count * self.shape.channels * self.shape.taps
        step = max(1, PATCH_VALUES // max(values, 1))
        for start in range(0, len(x), step):
            yield x[start : start + step], y[start : start + step]

    def _add_rows(self, rows: Tensor, given: Tensor | None) -> None:
        for group, total in enumerate(self._sums):
            out = slice(group * self.shape.group_out, (group + 1) * self.shape.group_out)
            seen = slice(group * self.shape.values, (group + 1) * self.shape.values)
            total.add(rows[:, seen], None if given is None else given[:, out])

    def moments(self) -> tuple[Moments, ...]:
        """Return the centered moments of each group."""
        kernel, bias = kernel_of(self.module).flatten(2), bias_of(self.module)
        found = []
        for group, total in enumerate(self._sums):
            out = slice(group * self.shape.group_out, (group + 1) * self.shape.group_out)
            offset = None if bias is None else bias[out]
            found.append(total.moments(weight=kernel[group], bias=offset))
        return tuple(found)


# ---------------------------------------------------------------- passes over the data

Batches = Callable[[], Iterable[Tensor]]
"""Gives the calibration inputs anew, batch by batch, on the network's device."""


@dataclass(frozen=True)
class CalibrationData:
    """Unlabelled inputs that layers are measured and fitted on.

    Attributes:
        split: The examples; their targets are not read.
        name: Of the data, for the record.
        seed: That the examples were drawn with.
        dtype: That floating-point inputs are given in; ``None`` for their own.
    """

    split: Split
    name: str = "calibration data"
    seed: int = 0
    batch_size: int = 128
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.split)

    def batches(self) -> Iterator[Tensor]:
        """Yield the inputs, batch by batch, always the same."""
        fitting = BATCH_VALUES // max(math.prod(self.split.input_shape), 1)
        size = max(1, min(self.batch_size, fitting))
        for inputs, _ in self.split.batches(size, device=self.device):
            typed = inputs
            if self.dtype is not None and inputs.is_floating_point():
                typed = inputs.to(self.dtype)
            # Convolutions on the CPU run up to twice as fast so.
            yield typed.to(memory_format=torch.channels_last) if typed.ndim == 4 else typed

    def first(self, n: int) -> CalibrationData:
        """Return a smaller set, drawn from this one."""
        return replace(self, split=self.split.take(n, self.seed)) if n < len(self) else self

    def within(self, macs: float, each: float, *, fewest: int) -> CalibrationData:
        """Return as many of the examples as this many MACs allow, but not fewer than ``fewest``.

        A rule in MACs, not in seconds, so that no result depends on how busy a machine was.

        Args:
            macs: To spend.
            each: What one example costs.
            fewest: If there are that many.
        """
        return self.first(max(fewest, int(macs / max(each, 1))))

    def example(self) -> Tensor:
        """Return the first input, with a batch of 1."""
        return next(self.batches())[:1]

    def info(self) -> CalibrationInfo:
        """Return the record of what was used."""
        return CalibrationInfo(data=self.name, examples=len(self), seed=self.seed)


def drawn_for(
    network: nn.Module,
    split: Split,
    *,
    examples: int | None = None,
    name: str = "calibration data",
    seed: int = 0,
    device: str = "cpu",
) -> CalibrationData:
    """Draw the inputs that a network's layers are measured and fitted on.

    Args:
        network: Not modified.
        split: That they are drawn from.
        examples: How many. Where not given, 1,024, or as many as give each layer three times as
            many rows as its kernel sees values, if a pass over these costs no more than 1e12 MACs:
            a linear layer gets one row of an example, and fitted on fewer than it has inputs learns
            what is these examples' own.
        name: Of the data, for the record.
        seed: Of the draw.
        device: Where the network is to run.

    Raises:
        ModelError: If the network cannot be run on the data.
    """
    whole = CalibrationData(split, name, seed, device=device, dtype=floating_type(network))
    return whole.first(_enough_for(network, whole) if examples is None else examples)


def _enough_for(network: nn.Module, data: CalibrationData) -> int:
    costs = trace_layers(network, data.example())
    wanted = FEWEST_EXAMPLES
    for layer in costs.layers:
        module = module_at(network, layer.name)
        if not layer.macs or why_unknown(module) is not None:
            continue
        shape = shape_of(module)
        if shape.values <= MOST_VALUES:
            rows = layer.macs / (shape.out * shape.values)  # of one example
            wanted = max(wanted, math.ceil(ROWS_TO_FIT * shape.values / rows))
    affordable = int(CALIBRATION_MACS / max(costs.macs, 1))
    return min(wanted, max(FEWEST_EXAMPLES, affordable))


def as_calibration(
    examples: object, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> CalibrationData:
    """Return calibration data from inputs of any usual form.

    Args:
        examples: Calibration data as it is; a tensor of inputs ``(n, …)``; a split, a torch data
            set or loader, whose targets are then not read.
        device: Where the network runs.
        dtype: Of its weights.

    Raises:
        DataError: If there are no examples, or their form is unknown.
        OptionError: If there is no such device.
    """
    if isinstance(examples, CalibrationData):
        return replace(examples, device=str(as_device(device)), dtype=dtype)
    split = as_split(examples)
    if len(split) == 0:
        raise DataError("Calibration data must have at least one example, got none.")
    return CalibrationData(split=split, device=str(as_device(device)), dtype=dtype)


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    *,
    examples: int | None = None,
    enough: Enough = TO_FIT,
) -> dict[str, tuple[Moments, ...]]:
    """Return the moments of layers' inputs and outputs, of each group, in one pass over the data.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        names: Convolutions and linear layers.
        batches: The inputs.
        examples: How many there are; large maps are then sampled, else every place is taken.
        enough: Rows of a wide layer.
    """
    network = evaluation_copy(model)
    generator = torch.Generator().manual_seed(0)
    sums = {
        name: LayerSum(network.get_submodule(name), examples, generator, enough=enough)
        for name in names
    }

    def recorder(total: LayerSum) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            total.add(_input(args, kwargs), output, own=True)

        return record

    handles = [
        total.module.register_forward_hook(recorder(total), with_kwargs=True)
        for total in sums.values()
    ]
    with hooks_removed(handles), torch.no_grad():
        for inputs in batches():
            network(inputs)
    return {name: total.moments() for name, total in sums.items() if total.ran}


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the one tensor that a layer was called with, by place or by name."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


class Across:
    """Moments across a network and one that it becomes, layer after layer.

    This is the asymmetric regression of Zhang et al. (2016, section 3.3): each layer is fitted to
    give what the original gave, from what it will really see. Where networks allow it, both are run
    on from the layers of the last time, not from the start.

    Args:
        original: Not modified; must be in evaluation mode.
        batches: The inputs, always the same.
        examples: How many there are; large maps are then sampled, else every place is taken.
        start: The other network, in evaluation mode, before any of its layers is rewritten; without
            it every pass is a whole one.
        sites: The layers that will be asked for.

    Attributes:
        resumed: The layers before which a pass leaves what the next one can go on from.
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
        self._passes: tuple[Advancing, ...] = ()
        self.resumed: frozenset[str] = frozenset()
        if start is not None and examples is not None:
            first = next(iter(batches()))
            both = [Advancing(network, first, sites, examples) for network in (start, original)]
            self._passes = tuple(both)
            self.resumed = frozenset(both[0].resumed) & frozenset(both[1].resumed)

    def moments(self, rewritten: nn.Module, names: Sequence[str]) -> dict[str, tuple[Moments, ...]]:
        """Return the moments of layers' inputs in one network with their outputs in the original.

        Args:
            rewritten: The network so far, in evaluation mode; the named layers still the
                original's.
            names: Layers, all fitted from this one pass.

        Raises:
            DataError: If a layer does not run on these inputs.
        """
        generator = torch.Generator().manual_seed(0)
        sums = {
            name: LayerSum(self._original.get_submodule(name), self._examples, generator)
            for name in names
        }
        inputs = _Watched(rewritten, names, before=True)
        outputs = _Watched(self._original, names, before=False)
        with hooks_removed([*inputs.handles, *outputs.handles]), torch.no_grad():
            for place, batch in enumerate(self._batches()):
                for turn, watched in enumerate((inputs, outputs)):
                    watched.seen.clear()
                    with self._going_to(turn, watched.network, place, names):
                        _run_until_reached(watched.network, batch)
                    _check_ran(names, watched.seen)
                for name in names:
                    sums[name].add(inputs.seen[name], outputs.seen[name], own=False)
        return {name: total.moments() for name, total in sums.items()}

    def _going_to(
        self, turn: int, network: nn.Module, batch: int, names: Sequence[str]
    ) -> AbstractContextManager[None]:
        if not self._passes:
            return nullcontext()
        return self._passes[turn].going_to(network, batch, names)


class _Watched:
    """Keeps what layers are given, or what they give, and ends a pass when all have run."""

    def __init__(self, network: nn.Module, names: Sequence[str], *, before: bool) -> None:
        self.network = network
        self.seen: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        for name in names:
            layer = network.get_submodule(name)
            if before:
                hook = self._input_of(name, len(names))
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self.handles.append(layer.register_forward_hook(self._output_of(name, len(names))))

    def _input_of(self, name: str, count: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(name, _input(args, kwargs), count)

        return hook

    def _output_of(self, name: str, count: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._keep(name, output, count)

        return hook

    def _keep(self, name: str, value: Tensor, count: int) -> None:
        # A copy: what follows may write into it.
        self.seen[name] = value.detach().clone()
        if len(self.seen) == count:
            raise Reached


def _check_ran(names: Sequence[str], seen: dict[str, Tensor]) -> None:
    for name in names:
        if name not in seen:
            raise DataError(
                f"The layer {name!r} does not run on the calibration data, so that it cannot be "
                f"fitted. Leave it as it is."
            )


def _run_until_reached(network: nn.Module, inputs: Tensor) -> None:
    try:
        network(inputs)
    except Reached:
        return


def _working(tensor: Tensor) -> Tensor:
    """Return values in the precision that sums are made in: float32 or better."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def curvature_of(
    model: nn.Module, names: Sequence[str], data: CalibrationData, macs: int
) -> dict[str, Tensor]:
    """Return :func:`output_curvature` on as many examples as are worth their time.

    Args:
        model: Not modified.
        names: Layers.
        data: The calibration data.
        macs: Of the network, for one input.
    """
    enough = data.within(CURVATURE_MACS, 2 * macs, fewest=FEWEST_CURVATURE_EXAMPLES)
    network = in_evaluation_mode(model, device=data.device)
    places = places_of(comparable(run(network, data.example()), network, 1))
    if places > 1:
        enough = enough.first(max(FEWEST_WITH_MAPS, DIRECTIONS // places))
    return output_curvature(model, names, enough.batches)


def places_of(outputs: Outputs) -> int:
    """Return at how many places a network says something of an input."""
    return max(math.prod(tensor.shape[2:]) for tensor in outputs)


def output_curvature(
    model: nn.Module, names: Sequence[str], batches: Batches, *, seed: int = 0
) -> dict[str, Tensor]:
    """Return how much the network's output distribution feels errors of each layer's outputs.

    The Fisher information of each layer's output channels, summed over places and averaged over
    examples: for a small error ``e`` of covariance ``E`` at each place, independent between places,
    the divergence of the network's outputs is about ``trace(F @ E) / 2``. For class scores labels
    are drawn from the network's own predictions (Martens 2020, section 5); for other outputs
    directions are drawn, which gives the Gauss-Newton matrix of the squared error relative to the
    outputs' mean square. Of several tensors it is the mean, as of their divergences.

    Args:
        model: Not modified; a copy in evaluation mode is run, with gradients of activations only.
        names: Layers.
        batches: The inputs.
        seed: Of the drawn labels.

    Returns:
        A matrix ``(out, out)`` in float64 for each layer that ran.
    """
    network = evaluation_copy(model)
    for parameter in network.parameters():
        parameter.requires_grad = False
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = output_rows(module, _working(gradient))
                part = (rows.T @ rows).to(device="cpu", dtype=torch.float64)
                sums[name] = sums[name] + part if name in sums else part

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [network.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    examples = 0
    with hooks_removed(handles), torch.enable_grad():
        for inputs in batches():
            probe = inputs.detach().clone()
            probe.requires_grad = True
            given = comparable(network(probe), network, len(inputs))
            _sampled_loss(given, generator).backward()  # type: ignore[no-untyped-call]
            examples += len(inputs)
    return {name: total / examples for name, total in sums.items()}


def _sampled_loss(outputs: Outputs, generator: torch.Generator) -> Tensor:
    # Drawn for each tensor by itself, so that on average products of two have no part in the square
    # of the gradient, which is then the mean of the tensors' own.
    each = [_sampled_loss_of(tensor, generator) for tensor in outputs]
    return torch.stack(each).sum() / math.sqrt(len(each))


def _sampled_loss_of(outputs: Tensor, generator: torch.Generator) -> Tensor:
    if is_classifier_output(outputs):
        probabilities = outputs.detach().float().softmax(dim=1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator).to(outputs.device)
        return -outputs.float().log_softmax(dim=1).gather(1, labels).sum()
    signs = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    power = outputs.detach().float().square().mean().clamp_min(1e-12)
    each = outputs[0].numel()
    return (outputs.float() * signs).sum() * (2.0 / (power * each)).sqrt()
