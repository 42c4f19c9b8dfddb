"""Exported files as networks to score and compare; each runs in its own runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from onebyone.core.errors import MissingExtraError, ModelError, RecordError
from onebyone.core.records import InputSpec, TensorSpec
from onebyone.core.tensor_trees import batch_size, has_batch
from onebyone.runtimes.file_readers import READERS, Costs, OnnxReader, Port
from onebyone.runtimes.named_inputs import named_tensors, names_in

SUFFIXES = {suffix: reader.runtime for suffix, reader in READERS.items()}


def is_network_file(spec: str | Path) -> bool:
    """Whether a name is that of a file for one of the runtimes."""
    return Path(spec).suffix in SUFFIXES


def is_onnx_file(spec: str | Path) -> bool:
    """Whether a name is that of an ONNX file."""
    return Path(spec).suffix == ".onnx"


class FileNetwork(nn.Module):
    """A network in a file that runs in its runtime: ONNX Runtime, OpenVINO or ExecuTorch.

    It can be called, scored and timed, but has no weights to read or change.

    Args:
        path: An ``.onnx``, ``.xml`` or ``.pte`` file.

    Raises:
        ModelError: If the file is missing, or its runtime cannot read it.
        MissingExtraError: If its runtime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._reader = READERS[self.path.suffix](self.path)
        self.runtime = self._reader.runtime
        if not self.path.is_file():
            raise ModelError(f"The network's file {self.path} must exist, but it does not.")
        self.eval()
        self._ports = self._read_ports()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Open the file again, because sessions of runtimes cannot be copied."""
        del memo
        return type(self)(self.path)

    @property
    def file_bytes(self) -> int:
        """The size of the file, with the weights beside it."""
        return self._reader.file_bytes

    @property
    def content(self) -> bytes:
        """The content of an ONNX file, with that of its files of weights.

        Raises:
            ModelError: If it is a file of another kind, which only its own runtime runs; or if its
                files of weights cannot be read, or are too large for one content.
        """
        if not isinstance(self._reader, OnnxReader):
            raise ModelError(
                f"The file {self.path} only runs in {self.runtime}. Choose the runtime "
                f"{self.runtime!r}."
            )
        return self._reader.content

    @property
    def inputs(self) -> InputSpec | None:
        """What one example is, from the file or ``preprocessing.json`` beside it, if known."""
        if self.call is not None:
            return self.call
        known = [port for port in self._ports if port.sizes and None not in port.sizes[1:]]
        if len(known) < len(self._ports):
            return None
        shapes = [(1, *(size or 1 for size in port.sizes[1:])) for port in known]
        if len(known) == 1:
            return InputSpec.of_shape(shapes[0])
        return _call_by_name(known, shapes)

    @cached_property
    def call(self) -> InputSpec | None:
        """The call that the file was written for, from ``preprocessing.json`` beside it, if known.

        A file of one tensor with fixed sizes tells by itself.
        """
        sizes = self._ports[0].sizes[1:]
        if len(self._ports) == 1 and sizes and None not in sizes:
            return None
        try:
            text = (self.path.parent / "preprocessing.json").read_text(encoding="utf-8")
            spec = InputSpec.from_json(json.dumps(json.loads(text)["inputs"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if spec.is_single:
            return spec if len(self._ports) == 1 else None
        named = {tensor.name for tensor in spec.tensors}
        return spec if all(port.name in named for port in self._ports) else None

    @property
    def made_with(self) -> tuple[str, ...] | None:
        """The processor's instructions for 8-bit products where an int8 file was made, if known.

        They are read from ``int8.json`` beside it.
        """
        try:
            text = (self.path.parent / "int8.json").read_text(encoding="utf-8")
            return tuple(str(name) for name in json.loads(text)["instructions"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forward(self, *inputs: Any, **named: Any) -> Tensor | list[Tensor]:
        """Return the file's outputs, a list if there are several.

        Args:
            inputs: What the network takes: one tensor, or its positional arguments.
            named: Its keyword arguments.
        """
        given: Any = named or (inputs[0] if len(inputs) == 1 else inputs)
        whole = named_tensors(given, [port.name for port in self._ports], self.call)
        count = batch_size(given)
        # With a batch that is fixed in the file, it runs several times.
        fixed = [
            port.sizes[0]
            for port in self._ports
            if port.sizes and port.sizes[0] is not None and has_batch(whole[port.name], count)
        ]
        step = fixed[0] if fixed and fixed[0] else max(count, 1)
        parts = []
        for start in range(0, max(count, 1), step):
            part = {
                name: tensor[start : start + step] if has_batch(tensor, count) else tensor
                for name, tensor in whole.items()
            }
            parts.append(self._run(part))
        outputs = [torch.cat(each) for each in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else outputs

    def costs(self, inputs: InputSpec | tuple[int, ...]) -> Costs:
        """Return the parameters and MACs of the file's layers for one example.

        Args:
            inputs: What the network takes; of one tensor its shape ``(1, …)`` is enough.
        """
        spec = inputs if isinstance(inputs, InputSpec) else InputSpec.of_shape(inputs)
        if any(tensor.batched for tensor in spec.tensors):
            spec = spec.with_batch(1)
        sizes = [tensor.shape for tensor in spec.tensors]
        names = [port.name for port in self._ports]
        own = names[:1] if spec.is_single else names_in(spec, self.call, names)
        shapes = {name: size for name, size in zip(own, sizes, strict=True) if name in names}
        return self._reader.costs(shapes)

    def _run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        types = {port.name: port.dtype for port in self._ports}
        arrays = {
            name: tensor.detach().cpu().to(types[name]).contiguous().numpy()
            for name, tensor in inputs.items()
        }
        try:
            found = self._reader.run(arrays)
        except RuntimeError as error:
            shapes = ", ".join(str(array.shape) for array in arrays.values())
            raise ModelError(
                f"The file {self.path} could not be run on an input of shape {shapes}: {error}"
            ) from error
        return [torch.from_numpy(each.copy()) for each in found]

    def _read_ports(self) -> tuple[Port, ...]:
        try:
            return self._reader.ports()
        except ImportError as error:
            raise MissingExtraError(
                self.runtime, self._reader.extra, f"The file {self.path}"
            ) from error
        except Exception as error:
            raise ModelError(f"{self.runtime} cannot read the file {self.path}: {error}") from error


def _call_by_name(ports: Sequence[Port], shapes: Sequence[tuple[int, ...]]) -> InputSpec | None:
    """Return a call with a file's inputs as keywords; ``None`` if their names are not Python's."""
    try:
        return InputSpec(
            tensors=tuple(
                TensorSpec(
                    name=port.name,
                    shape=shape,
                    dtype=cast("Any", str(port.dtype).removeprefix("torch.")),
                )
                for port, shape in zip(ports, shapes, strict=True)
            ),
            call=f"({', '.join(f'{port.name}={port.name}' for port in ports)})",
        )
    except RecordError:
        return None
