"""Loads what arguments name: networks, data, metrics, tasks, devices and runtimes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from onebyone.cli.options import given
from onebyone.cli.values import model_options
from onebyone.core.errors import OptionError, WeightsError

if TYPE_CHECKING:
    from onebyone.core.records import Plan
    from onebyone.core.settings.runs import RunSettings
    from onebyone.data import Data
    from onebyone.networks.zoo import Loaded

# Libraries whose networks have random weights unless weights are given.
ZOOS = ("onebyone:", "torchvision:", "timm:")


def load(
    spec: str,
    weights: str | None,
    options: list[str],
    *,
    needs_weights: bool,
    original: str | None = None,
    as_file: bool = False,
    seed: int = 0,
) -> Loaded:
    """Load a network; the same command always gives the same one, also with random weights.

    Args:
        spec: What the command was given.
        weights: As the command was given them.
        options: Of the factory, each ``KEY=VALUE``.
        needs_weights: Whether random weights are of no use.
        original: Of a run.
        as_file: Whether an ONNX file runs in its runtime; else its layers are read.
        seed: Of random weights.

    Raises:
        WeightsError: If it would have random weights although ``needs_weights`` is set.
    """
    from onebyone.core.randomness import seeded
    from onebyone.pipeline.loading import load_deployable, load_source
    from onebyone.pipeline.run_folder import is_run
    from onebyone.runtimes.files import is_network_file

    if is_run(spec):
        if weights == "random":
            raise OptionError("--weights random does not go with a run, which has its weights.")
        return load_source(spec, weights=weights, original=original, **model_options(options))
    if original is not None:
        raise OptionError(f"--original goes with the folder of a run, which {spec} is not.")
    if needs_weights and weights is None and not is_network_file(spec):
        _check_has_weights(spec, model_options(options))
    loading = load_deployable if as_file else load_source
    with seeded(seed):
        return loading(spec, weights=weights, **model_options(options))


def load_asked(args: argparse.Namespace, *, needs_weights: bool, as_file: bool = False) -> Loaded:
    """Load the one network of a command by its arguments, as :func:`load` does."""
    return load(
        args.model,
        args.weights,
        args.model_option,
        needs_weights=needs_weights,
        original=args.original,
        as_file=as_file,
        seed=getattr(args, "seed", 0),
    )


def _check_has_weights(spec: str, options: dict[str, Any]) -> None:
    """Check that a network has weights if none are given.

    Raises:
        UnknownNameError: If its library has none of its name.
        WeightsError: If it comes from a library, or from a factory that draws new weights at each
            call.
    """
    advice = "give --weights FILE, {}or, for timings alone, --weights random."
    if spec.startswith(ZOOS):
        from onebyone.networks.zoo.load import check_known

        check_known(spec)
        download = "" if spec.startswith("onebyone:") else "--weights pretrained, "
        raise WeightsError(f"{spec} needs trained weights: {advice.format(download)}")
    path, _, _ = spec.rpartition(":")
    if not path.endswith(".py"):
        return  # not a network: loading it raises the error
    from onebyone.core.randomness import seeded
    from onebyone.networks.hashing import hash_weights
    from onebyone.networks.zoo import build

    hashes = set()
    for seed in (0, 1):
        with seeded(seed):
            hashes.add(hash_weights(build(spec, **options)))
    if len(hashes) > 1:
        raise WeightsError(
            f"{spec} gives a network with new random weights at each call: {advice.format('')}"
        )


def load_metric(text: str | None) -> Any:
    """Return a built-in metric's name, or the function from a file.

    Raises:
        UnknownNameError: If there is no such file or function.
        OptionError: If the file fails.
    """
    return None if text is None else _named(text, "metric")


def load_task(text: str | None) -> Any:
    """Return a built-in task's name, or the task or function from a file.

    Raises:
        OptionError: If the file or the name in it is missing, or the file fails.
        UnknownNameError: If there is no task of that name.
    """
    if text is None:
        return None
    from onebyone.core.task import find_task

    return find_task(_named(text, "task"))


def _named(text: str, kind: str) -> Any:
    path, colon, function = text.rpartition(":")
    if not colon:
        return text
    from onebyone.core.user_files import user_function, user_value

    find = user_value if kind == "task" else user_function
    return find(Path(path).expanduser(), function, raises=OptionError)


def device_of(text: str | None) -> str:
    """Return the device to use; by default CUDA if there is a GPU.

    Raises:
        OptionError: If there is no such device.
    """
    import torch

    from onebyone.networks.surgery import as_device

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(as_device(text))


def data_of(args: argparse.Namespace) -> Data:
    """Load the data named by ``--data``."""
    from onebyone.data import load_data
    from onebyone.report.console import lines_shown

    with lines_shown():
        return load_data(
            args.data,
            seed=args.seed,
            limit=args.limit,
            image_size=args.image_size,
            ignore_index=args.ignore_index,
            workers=args.workers,
        )


def runtimes_of(names: list[str] | None) -> tuple[str, ...]:
    """Return the requested runtimes without duplicates, after checking that each is available."""
    from onebyone.runtimes import find_runtime

    wanted = tuple(dict.fromkeys(names or ["eager"]))
    for name in wanted:
        find_runtime(name)
    return wanted


def input_of(args: argparse.Namespace, loaded: Loaded, *, batch: int = 1) -> dict[str, Any]:
    """Return what a network is called with, as the argument ``input_shape`` or ``example``.

    That is the given example or shape, else what is known of the network.

    Raises:
        OptionError: If it is not known, or both are given.
    """
    if args.example is not None:
        if args.input_shape is not None:
            raise OptionError("Give either --input-shape or --example, got both.")
        return {"example": load_example(args.example, batch)}
    known = loaded.inputs
    if known is None or known.is_single:
        return {"input_shape": input_size(args, loaded, batch=batch)}
    if args.input_shape is not None:
        raise OptionError(
            f"--input-shape is the shape of one tensor, but {args.model} is called with "
            f"({known.example_text()}). Give --example FILE.PY:FUNCTION, or neither for random "
            "values."
        )
    from onebyone.networks.examples import example_of

    return {"example": example_of(loaded.model, known.with_batch(batch), device="cpu")}


def load_example(text: str, batch: int = 1) -> Any:
    """Return the inputs that a function of a file returns.

    Args:
        text: ``path/file.py:function``.
        batch: If above 1, an example of one is repeated to this batch.

    Raises:
        OptionError: If the file fails, or its example has another batch.
        UnknownNameError: If there is no such file or function.
    """
    from torch import Tensor

    from onebyone.core.tensor_trees import batch_size, repeated
    from onebyone.core.user_files import call_user_function, user_function

    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name:
        raise OptionError(
            f"--example must be a function of a Python file, such as net.py:make_example, got "
            f"{text!r}."
        )
    file = Path(path).expanduser()
    found = call_user_function(
        user_function(file, name, raises=OptionError), file, raises=OptionError
    )
    if batch == 1 or not isinstance(found, Mapping | tuple | Tensor):
        return found  # what is not an example is refused by name where it is used
    own = batch_size(found)
    if own not in (1, batch):
        raise OptionError(
            f"--batch must be that of the example, {own}, or be left out, got {batch}. An example "
            "of one is repeated to any batch."
        )
    return found if own == batch else repeated(found, batch)


def input_size(args: argparse.Namespace, loaded: Loaded, *, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of an input: the given one, else the known shape of the network's input.

    If only height and width are given, or a picture without the batch, the rest is filled in.

    Raises:
        OptionError: If the shape is not known or ambiguous.
    """
    known = None if loaded.inputs is None else loaded.inputs.single("--input-shape").sample
    if args.input_shape is None:
        if known is None:
            raise OptionError(
                f"The input shape of {args.model} is not known. Give --input-shape "
                "BATCH,CHANNELS,HEIGHT,WIDTH, such as 1,3,224,224; for several inputs --example "
                "FILE.PY:FUNCTION."
            )
        return (batch, *known)
    given: tuple[int, ...] = args.input_shape.sizes
    if len(given) == 3 and known is not None and len(known) == 3:
        return (batch, *given)
    if len(given) > 2 or not args.input_shape.by_x:
        return given
    channels = _channels(loaded)
    if channels is None:
        raise OptionError(
            f"--input-shape must be batch, channels, height and width, but {given[0]}x{given[-1]} "
            f"is a height and a width, and how many channels {args.model} takes is not known. "
            f"Write 1,CHANNELS,{given[0]},{given[-1]}."
        )
    return (batch, channels, given[0], given[-1])


def _channels(loaded: Loaded) -> int | None:
    """Return the number of channels of a network's input, or ``None`` if not known."""
    if loaded.inputs is not None and loaded.inputs.is_image:
        return loaded.inputs.tensors[0].sample[0]
    from torch import nn

    layers = (m for m in loaded.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    first = next(layers, None)
    return first.in_channels if isinstance(first, nn.Conv2d) else None


def load_plan(path: str) -> Plan:
    """Read a plan.

    Raises:
        PlanError: If it cannot be read.
    """
    from onebyone.core.records import Plan

    return Plan.load(path)


# Converters of settings that are not text, from the text of the command line.
_READ: dict[str, Callable[[Any], Any]] = {
    "device": device_of,
    "metric": load_metric,
    "plan": load_plan,
    "runtimes": runtimes_of,
    "task": load_task,
}


def settings_of(args: argparse.Namespace, record: Any) -> dict[str, Any]:
    """Return the given settings of a record, converted from text."""
    return {
        name: _READ[name](value) if name in _READ else value
        for name, value in given(args, record).items()
    }


_Settings = TypeVar("_Settings", bound="RunSettings")


def run_settings(args: argparse.Namespace, record: type[_Settings]) -> _Settings:
    """Return the settings of a run without its folder, whose name depends on the network."""
    asked = settings_of(args, record)
    return record(out=args.out, command=args.command_line, uses=_uses(args), **asked)


def _uses(args: argparse.Namespace) -> list[str]:
    """Return the files and folders that the arguments name as inputs of a run."""
    given = [args.model, args.weights, args.data, getattr(args, "plan", None)]
    specs = [text for text in given if text is not None]
    parts = [text.rpartition(":")[0] for text in specs if ".py:" in text]
    parts += [text.partition(":")[2] for text in specs if text.startswith("imagefolder:")]
    return [*specs, *filter(None, parts)]
