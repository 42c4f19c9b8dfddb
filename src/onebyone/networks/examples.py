"""Example inputs: what a network is traced and timed on, given or drawn at random."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError
from onebyone.core.records import InputSpec, TensorSpec
from onebyone.core.tensor_trees import Inputs, first_examples, map_tensors, spec_of
from onebyone.networks.surgery import as_device, floating_type, home_of


def example_input(
    shape: tuple[int, ...], *, device: str = "cpu", seed: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a standard normal input of that shape, batch included.

    Raises:
        OptionError: If a size is not a positive int, or there is no such device.
    """
    _check_sizes(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype).to(as_device(device))


def _check_sizes(shape: object) -> None:
    sizes: Sequence[object] = shape if isinstance(shape, tuple | list) else ()
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise OptionError(
            "`input_shape` must be positive sizes with the batch in front, such as "
            f"(1, 3, 224, 224), got {_in_short(shape)}."
        )


def _in_short(shape: object) -> str:
    if isinstance(shape, Tensor):
        return f"a tensor of shape {tuple(shape.shape)}"
    return repr(shape)


def example_of(
    model: nn.Module,
    spec: InputSpec,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    blank: bool = False,
) -> Inputs:
    """Return random or blank inputs as a record describes them.

    Floating-point tensors are standard normal and of the type of the network's weights. The record
    says between which two numbers integers are drawn. A mask is all ``True``.

    Args:
        model: Gives the type. Not modified.
        spec: The inputs.
        device: Where the inputs are; default: that of the network.
        seed: Random seed.
        blank: Whether floating-point tensors are zero instead.

    Raises:
        OptionError: If there is no such device.
    """
    place = home_of(model) if device is None else as_device(device)
    draw = _Draw(torch.Generator().manual_seed(seed), floating_type(model), blank)
    drawn = {each.name: draw.tensor(each).to(place) for each in spec.tensors}
    inputs: Inputs = spec.arguments(drawn)
    return inputs


@dataclass(frozen=True)
class _Draw:
    """How values of tensors are drawn."""

    generator: torch.Generator
    floats: torch.dtype
    blank: bool

    def tensor(self, spec: TensorSpec) -> Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype == torch.bool:
            return torch.ones(spec.shape, dtype=dtype)
        if spec.values is not None:
            low, high = spec.values
            drawn = torch.randint(low, high + 1, spec.shape, generator=self.generator)
            return drawn.to(dtype)
        if dtype.is_floating_point:
            dtype = self.floats
        if self.blank or not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(spec.shape, dtype=dtype)
        return torch.randn(spec.shape, generator=self.generator, dtype=dtype)


def as_inputs(model: nn.Module, inputs: Inputs | tuple[int, ...]) -> Inputs:
    """Return inputs unchanged; for a shape, return a standard normal input of the network's type.

    Args:
        model: Gives the type and device. Not modified.
        inputs: Inputs, or the shape of one with the batch in front.

    Raises:
        OptionError: If a shape has a size that is not positive.
    """
    if isinstance(inputs, (Tensor, Mapping)) or not all(isinstance(n, int) for n in inputs):
        return inputs
    return example_input(inputs, device=str(home_of(model)), dtype=floating_type(model))


@dataclass(frozen=True)
class Example:
    """What networks are called with: the values of an example, or random ones.

    Attributes:
        spec: The record of the inputs.
        given: The values; ``None`` for random ones.
    """

    spec: InputSpec
    given: Inputs | None = None

    def on(self, model: nn.Module, device: torch.device | str | None = None) -> Inputs:
        """Return inputs in the type of a network's weights.

        Args:
            model: Not modified.
            device: Where the inputs are; default: that of the network.

        Raises:
            OptionError: If there is no such device.
        """
        if self.given is None:
            return example_of(model, self.spec, device=device)
        place = home_of(model) if device is None else as_device(device)
        floats = floating_type(model)
        inputs: Inputs = map_tensors(
            lambda each: each.to(place, floats if each.is_floating_point() else each.dtype),
            self.given,
        )
        return inputs

    def first(self) -> Example:
        """Return its first example alone."""
        counted = any(tensor.batched for tensor in self.spec.tensors)
        spec = self.spec.with_batch(1) if counted else self.spec
        return Example(spec, None if self.given is None else first_examples(self.given, 1))


def given_example(
    model: nn.Module, *, input_shape: tuple[int, ...] | None = None, example: object = None
) -> Example:
    """Return the example that a caller gave, or random inputs of the shape that it gave.

    Args:
        model: Gives the names of arguments and the type of random inputs. Not modified.
        input_shape: Shape of the only tensor, with the batch in front.
        example: A tensor, a tuple of positional arguments, or a mapping of keyword arguments. Not
            modified.

    Raises:
        OptionError: If neither or both are given, or an example has another form.
        NetworkInputError: If the example has no tensor, or values that no record can hold.
    """
    if (input_shape is None) == (example is None):
        came = "neither" if example is None else "both"
        raise OptionError(f"Either `input_shape` or `example` must be given, got {came}.")
    if input_shape is not None:
        return Example(shaped(model, input_shape))
    if not isinstance(example, Tensor | tuple | Mapping):
        raise OptionError(
            "`example` must be a tensor, a tuple of positional arguments or a mapping of keyword "
            f"arguments, got a {type(example).__name__}. Put a list into a tuple: (list,)."
        )
    inputs: Any = example
    if isinstance(example, tuple) and len(example) == 1 and isinstance(example[0], Tensor):
        inputs = example[0]
    return Example(inputs_of(model, inputs), map_tensors(Tensor.detach, inputs))


def shaped(model: nn.Module, shape: tuple[int, ...]) -> InputSpec:
    """Return the record of a network's only input tensor.

    Args:
        model: Gives the type. Not modified.
        shape: With the batch in front.

    Raises:
        OptionError: If a size is not a positive int.
    """
    _check_sizes(shape)
    dtype: Any = str(floating_type(model)).removeprefix("torch.")
    return InputSpec.of_shape(tuple(shape), dtype=dtype)


def inputs_of(model: nn.Module, inputs: Inputs) -> InputSpec:
    """Return the record of a network's inputs, named as in its forward.

    Args:
        model: Not modified.
        inputs: What it is called with. Not modified.

    Raises:
        NetworkInputError: If there is no tensor, or a value that the record cannot hold.
    """
    return spec_of(inputs, names=_argument_names(model))


def _argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a forward's positional arguments, as far as it tells them."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()  # a builtin, such as a traced program's
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind in kinds)
