"""Streamed second moments of what layers see and give on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.data import Split, as_split
from onebyone.errors import DataError, ModelError
from onebyone.records import CalibrationInfo
from onebyone.sites import evaluation_copy, hooks_removed

# Float32 sums of this many rows are exact enough to be added up in float64.
ROWS_A_BLOCK = 65_536
# Values of unfolded patches held at once: 64 M float32 are 256 MB.
PATCH_VALUES = 64_000_000


@dataclass(frozen=True)
class Moments:
    """First and second moments of inputs ``x`` and outputs ``y`` of a layer, in float64.

    A row is one place of one example: ``x`` is the patch under the kernel (channels first, then
    kernel places; padding included as the layer pads), ``y`` the output channels there.

    Attributes:
        rows: How many were summed.
        mean_x: Shape ``(d,)``.
        mean_y: Shape ``(o,)``.
        xx: Covariance of ``x``, shape ``(d, d)``.
        yx: Covariance of ``y`` with ``x``, shape ``(o, d)``.
        yy: Covariance of ``y``, shape ``(o, o)``.
    """

    rows: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor


class MomentSum:
    """Adds up rows, block by block; never holds them all."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[str, Tensor] = {}
        self._origins: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows of inputs ``(rows, d)`` and, if given, of outputs ``(rows, o)``."""
        for start in range(0, len(x), ROWS_A_BLOCK):
            block = self._shifted("x", x[start : start + ROWS_A_BLOCK])
            self._accumulate("x", block.sum(0))
            self._accumulate("xx", block.T @ block)
            if y is not None:
                other = self._shifted("y", y[start : start + ROWS_A_BLOCK])
                self._accumulate("y", other.sum(0))
                self._accumulate("yx", other.T @ block)
                self._accumulate("yy", other.T @ other)
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

    def _accumulate(self, name: str, value: Tensor) -> None:
        value = value.to(device="cpu", dtype=torch.float64)
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value

    def moments(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Moments:
        """Return the centered moments.

        Args:
            weight: Shape ``(o, d)``; with it the moments of ``y = weight @ x + bias`` follow from
                those of ``x`` alone.
            bias: Shape ``(o,)``.

        Raises:
            DataError: If no rows were added: the layer never ran.
        """
        if not self.rows:
            raise DataError("Moments need at least one row, got none: the layer never ran.")
        n = self.rows
        mean_x, near_x = self._mean("x")
        xx = self._sums["xx"] / n - torch.outer(near_x, near_x)
        if weight is not None:
            mean_y = weight @ mean_x + (0 if bias is None else bias)
            yx = weight @ xx
            return Moments(n, mean_x, mean_y, xx, yx, yx @ weight.T)
        mean_y, near_y = self._mean("y")
        yx = self._sums["yx"] / n - torch.outer(near_y, near_x)
        yy = self._sums["yy"] / n - torch.outer(near_y, near_y)
        return Moments(n, mean_x, mean_y, xx, yx, yy)


# ---------------------------------------------------------------- rows


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a layer's kernel as ``(out, in × kernel places)`` in float64 on the CPU."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(device="cpu", dtype=torch.float64).flatten(1)


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield what the kernel meets at each place, as rows ``(places, in × kernel places)``."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    assert isinstance(module, nn.Conv2d)
    if x.ndim == 3:
        x = x.unsqueeze(0)
    padded = pad(module, x)
    values = padded[0].numel() * module.kernel_size[0] * module.kernel_size[1]
    step = max(1, PATCH_VALUES // max(values, 1))
    for start in range(0, len(padded), step):
        part = padded[start : start + step]
        if module.kernel_size == (1, 1):
            places = part[:, :, :: module.stride[0], :: module.stride[1]].flatten(2)
        else:
            places = F.unfold(
                part, module.kernel_size, dilation=module.dilation, stride=module.stride
            )
        yield places.transpose(1, 2).reshape(-1, places.shape[1])


def pad(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad an input ``(batch, channels, height, width)`` as the convolution does by itself."""
    # The convolution keeps the amounts, last axis first, also for ``padding="same"``.
    amounts = module._reversed_padding_repeated_twice  # noqa: SLF001
    if not any(amounts):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, amounts, mode=mode)


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Return a layer's output as rows ``(places, out)``."""
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    if y.ndim == 3:
        y = y.unsqueeze(0)
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


def _working(tensor: Tensor) -> Tensor:
    """Return values in the precision that sums are made in: float32 or better."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


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
    """

    split: Split
    name: str = "calibration data"
    seed: int = 0
    batch_size: int = 128
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.split)

    def batches(self) -> Iterator[Tensor]:
        """Yield the inputs, batch by batch, always the same."""
        for inputs, _ in self.split.batches(self.batch_size, device=self.device):
            yield inputs

    def first(self, n: int) -> CalibrationData:
        """Return a smaller set, drawn from this one."""
        return replace(self, split=self.split.take(n, self.seed)) if n < len(self) else self

    def example(self) -> Tensor:
        """Return the first input, with a batch of 1."""
        return next(self.batches())[:1]

    def info(self) -> CalibrationInfo:
        """Return the record of what was used."""
        return CalibrationInfo(data=self.name, examples=len(self), seed=self.seed)


def as_calibration(examples: object, *, device: str = "cpu") -> CalibrationData:
    """Return calibration data from inputs of any usual form.

    Args:
        examples: Calibration data as it is; a tensor of inputs ``(n, …)``; a split, a torch data
            set or loader, whose targets are then not read.
        device: Where the network runs.

    Raises:
        DataError: If there are no examples, or their form is unknown.
    """
    if isinstance(examples, CalibrationData):
        return replace(examples, device=device)
    split = as_split(examples)
    if len(split) == 0:
        raise DataError("Calibration data must have at least one example, got none.")
    return CalibrationData(split=split, device=device)


def collect(model: nn.Module, names: Sequence[str], batches: Batches) -> dict[str, Moments]:
    """Return the moments of layers' inputs, and of their outputs, in one pass over the data.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        names: Convolutions and linear layers.
        batches: The inputs.
    """
    network = evaluation_copy(model)
    modules = {name: network.get_submodule(name) for name in names}
    sums = {name: MomentSum() for name in names}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            for rows in input_rows(module, _working(args[0])):
                sums[name].add(rows)

        return record

    handles = [m.register_forward_pre_hook(recorder(name)) for name, m in modules.items()]
    with hooks_removed(handles), torch.no_grad():
        for inputs in batches():
            network(inputs)
    return {
        name: sums[name].moments(weight=weight_matrix(module), bias=_bias(module))
        for name, module in modules.items()
        if sums[name].rows
    }


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    if bias is None:
        return None
    assert isinstance(bias, Tensor)
    return bias.detach().to(device="cpu", dtype=torch.float64)


class _Reached(Exception):  # noqa: N818 - not an error: the pass need not go on
    """The layers of interest have all run."""


def collect_across(  # noqa: C901 - two hooks and a pass
    original: nn.Module, rewritten: nn.Module, names: Sequence[str], batches: Batches
) -> dict[str, Moments]:
    """Return moments of the rewritten network's inputs with the original's outputs.

    This is the asymmetric regression of Zhang et al. (2016, section 3.3): each layer is fitted to
    give what the original gave, from what it will really see.

    Args:
        original: Not modified; must be in evaluation mode.
        rewritten: The network so far, in evaluation mode; the named layers still the original's.
        names: Layers, all fitted from this one pass.
        batches: The inputs.

    Raises:
        DataError: If a layer does not run on these inputs.
    """
    sums = {name: MomentSum() for name in names}
    seen_x: dict[str, Tensor] = {}
    seen_y: dict[str, Tensor] = {}

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            # A copy: what follows may write into it.
            seen_x[name] = args[0].detach().clone()
            if len(seen_x) == len(names):
                raise _Reached

        return hook

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            seen_y[name] = output.detach().clone()
            if len(seen_y) == len(names):
                raise _Reached

        return hook

    handles = []
    for name in names:
        handles.append(rewritten.get_submodule(name).register_forward_pre_hook(keep_input(name)))
        handles.append(original.get_submodule(name).register_forward_hook(keep_output(name)))
    with hooks_removed(handles), torch.no_grad():
        for inputs in batches():
            seen_x.clear()
            seen_y.clear()
            for network in (rewritten, original):
                _run_until_reached(network, inputs)
            _check_ran(names, seen_y)
            _check_ran(names, seen_x)
            for name in names:
                module = original.get_submodule(name)
                _add_pair(sums[name], module, _working(seen_x[name]), _working(seen_y[name]))
    return {name: total.moments() for name, total in sums.items()}


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
    except _Reached:
        return


def _add_pair(total: MomentSum, module: nn.Module, x: Tensor, y: Tensor) -> None:
    outputs = output_rows(module, y)
    start = 0
    for rows in input_rows(module, x):
        total.add(rows, outputs[start : start + len(rows)])
        start += len(rows)


def output_curvature(
    model: nn.Module, names: Sequence[str], batches: Batches, *, seed: int = 0
) -> dict[str, Tensor]:
    """Return how much the network's output distribution feels errors of each layer's outputs.

    The Fisher information of each layer's output channels, summed over places and averaged over
    examples: for a small error ``e`` of covariance ``E`` at each place, independent between places,
    the Kullback-Leibler divergence of the network's outputs is about ``trace(F @ E) / 2``. Labels
    are drawn from the network's own predictions (Martens 2020, section 5); for outputs that are
    not class scores, directions are drawn, which gives the Gauss-Newton matrix of the squared
    error relative to the outputs' mean square.

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
            _sampled_loss(network(probe), generator).backward()  # type: ignore[no-untyped-call]
            examples += len(inputs)
    return {name: total / examples for name, total in sums.items()}


def _sampled_loss(outputs: Any, generator: torch.Generator) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"The network's output must be one tensor in evaluation mode, got "
            f"{type(outputs).__name__}. Wrap it in a module that returns the tensor that matters."
        )
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        probabilities = outputs.detach().float().softmax(dim=1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator).to(outputs.device)
        return -outputs.float().log_softmax(dim=1).gather(1, labels).sum()
    signs = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    power = outputs.detach().float().square().mean().clamp_min(1e-12)
    each = outputs[0].numel()
    return (outputs.float() * signs).sum() * (2.0 / (power * each)).sqrt()
