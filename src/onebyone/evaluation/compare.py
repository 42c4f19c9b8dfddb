"""Comparison of networks: scores on the same examples, timings in interleaved rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.arguments import checked
from onebyone.core.compared import Compared, Contender, distinct
from onebyone.core.errors import OptionError
from onebyone.core.metrics import AnyMetric
from onebyone.core.records import (
    Comparison,
    InputSpec,
    Machine,
    Measured,
    Metric,
    ModelSource,
    Subnormals,
    TaskInfo,
    Timing,
)
from onebyone.core.rounds import limited
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.version import __version__
from onebyone.data import Data, Split, as_split
from onebyone.evaluation.scores import Together, copies_to_score, score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.networks.examples import Example, given_example
from onebyone.networks.surgery import as_device, as_network
from onebyone.networks.zoo import save_weights
from onebyone.profiling.activation_memory import peak_activation_bytes
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.subnormals import with_times, without_subnormals
from onebyone.profiling.trace import trace_layers
from onebyone.quantizing.saturation import eight_bit_instructions
from onebyone.runtimes import describe_machine, find_runtime
from onebyone.runtimes.file_readers import Costs
from onebyone.runtimes.files import FileNetwork

Progress = Callable[[int, int, str], None]

# The training metric only shows the generalization gap, so a sample is enough.
TRAIN_EXAMPLES = 10_000
TIMED_ROUNDS = 40


@dataclass(frozen=True)
class SideBySide:
    """A comparison of two networks, with the scores of each example.

    Attributes:
        test: The scores of both networks on the test data; ``None`` without data.
    """

    record: Comparison
    test: Together | None


@checked
@ordinary_torch()
def compare(
    *models: nn.Module,
    data: object = None,
    input_shape: tuple[int, ...] | None = None,
    example: object = None,
    runtimes: Sequence[str] = ("eager",),
    metric: str | AnyMetric | None = None,
    task: TaskLike | Meaning | None = None,
    ignore_index: int | None = None,
    names: Sequence[str] | None = None,
    sources: Sequence[ModelSource | None] | None = None,
    rounds: int = TIMED_ROUNDS,
    num_threads: int | None = None,
    device: str = "cpu",
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Compared:
    """Measure cost, latency and scores of networks, and compare each with the first.

    Args:
        models: Two or more. Not modified.
        data: An :class:`onebyone.data.Data`: its test part is scored, and its training part
            gives the generalization gap. Or test examples alone, or ``None`` to measure only cost
            and latency.
        input_shape: Shape of the timed input with the batch. The default is one example of the
            data.
        example: In place of ``input_shape``: a tensor, a tuple of positional arguments or a mapping
            of keyword arguments.
        runtimes: Runtimes in which all networks are timed, interleaved.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``. The default
            is the task's. Without labels the agreement with the first network is counted.
        task: What the outputs mean, as for :func:`onebyone.plan`.
        ignore_index: A label that is left out of every count.
        names: Names of the networks.
        sources: Where the networks came from, for the record.
        rounds: Interleaved rounds of timing, each with all networks.
        num_threads: Torch's threads while timing.
        device: Where to run.
        command: The command line, for the record.
        progress: Called with the number of examples done.

    Returns:
        A record that prints as tables; ``pair(1)`` is the comparison of the first two.

    Raises:
        OptionError: If there are fewer than two networks, not one name for each, or neither data
            nor an input shape or example.
        DataError: If the data is empty or of an unknown form.
        ModelError: If a network cannot be run on it.
    """
    if len(models) == 1 and isinstance(models[0], list | tuple):
        models = tuple(models[0])
    called = _names(len(models), names)
    timed = None
    if input_shape is not None or example is not None:
        timed = given_example(
            as_network(models[0], scripted=True), input_shape=input_shape, example=example
        )
    source = sources[0] if sources else None
    measured = _measure_all(
        models,
        data=data,
        example=timed,
        runtimes=runtimes,
        metric=metric,
        task=task,
        ignore_index=ignore_index,
        source=source,
        rounds=rounds,
        num_threads=num_threads,
        device=device,
        progress=progress,
    )
    origins = sources or [None] * len(models)
    contenders = tuple(
        replace(each, name=name, source=source)
        for each, name, source in zip(measured.contenders, called, origins, strict=True)
    )
    return Compared(
        contenders=contenders,
        inputs=measured.inputs,
        rounds=limited(rounds),
        machine=measured.machine,
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=data.info() if isinstance(data, Data) else None,
        command=tuple(command),
        task=measured.task,
    )


@ordinary_torch()
def side_by_side(
    before: nn.Module,
    after: nn.Module,
    *,
    data: object,
    example: Example | None,
    runtimes: Sequence[str],
    metric: str | AnyMetric | None,
    task: TaskLike | Meaning | None = None,
    ignore_index: int | None = None,
    source: ModelSource | None = None,
    names: tuple[str, str] = ("before", "after"),
    rounds: int = TIMED_ROUNDS,
    num_threads: int | None,
    device: str,
    progress: Progress | None,
) -> SideBySide:
    """Compare two networks like :func:`compare`, and keep the scores of each example."""
    both = _measure_all(
        (before, after),
        data=data,
        example=example,
        runtimes=runtimes,
        metric=metric,
        task=task,
        ignore_index=ignore_index,
        source=source,
        rounds=rounds,
        num_threads=num_threads,
        device=device,
        progress=progress,
    )
    first, second = both.contenders
    record = Comparison(
        before=first.measured,
        after=second.measured,
        inputs=both.inputs,
        latency_ratio=second.latency_ratio,
        difference=second.difference,
        agreement=second.agreement,
        divergence=second.divergence,
        machine=both.machine,
        names=names,
        task=both.task,
        subnormals=(first.subnormals, second.subnormals),
    )
    return SideBySide(record, both.test)


@dataclass(frozen=True)
class _All:
    """Measurements of all networks that are compared."""

    contenders: tuple[Contender, ...]
    inputs: InputSpec
    machine: Machine
    test: Together | None

    @property
    def task(self) -> TaskInfo | None:
        """The task of the outputs."""
        return None if self.test is None else self.test.meaning.info()


def _measure_all(
    models: Sequence[nn.Module],
    *,
    data: object,
    example: Example | None,
    runtimes: Sequence[str],
    metric: str | AnyMetric | None,
    task: TaskLike | Meaning | None,
    ignore_index: int | None,
    source: ModelSource | None,
    rounds: int,
    num_threads: int | None,
    device: str,
    progress: Progress | None,
) -> _All:
    test, train = _splits(data)
    if example is None:
        if test is None:
            raise OptionError("`input_shape` must be given where there is no data, got None.")
        example = Example(test.inputs)
    networks = [as_network(model, scripted=True) for model in models]
    scored = scored_train = None
    if test is not None:
        known = Known.of(source, asks_accuracy=metric == "accuracy")
        shown = data if isinstance(data, Data) else test
        meaning = meaning_of(
            networks[0], shown, task, known=known, ignore_index=ignore_index, device=device
        )
        how: Any = {"metric": metric, "task": meaning, "device": device, "progress": progress}
        how["copied"] = True
        copies = copies_to_score(networks, as_device(device))
        scored = score(copies, test, **how)
        if train is not None:
            scored_train = score(copies, train.take(TRAIN_EXAMPLES, 0), **how)
        del copies
    with threads(num_threads):
        # Subnormal weights slow a CPU down. All networks are timed without them, to be fair.
        bare = [_without_subnormals(network, example) for network in networks]
        times = {
            runtime: _time_all([each for each, _ in bare], example, runtime, rounds, device)
            for runtime in _announced(runtimes, progress)
        }
        found = [
            with_times(each, network, flushed, example.on(network, device), runtimes)
            for network, (flushed, each) in zip(networks, bare, strict=True)
        ]
        machine = describe_machine(device)
    contenders = []
    for place, model in enumerate(networks):
        tested = scored.each[place] if scored is not None and scored.labelled else None
        measured = measure(
            model,
            example,
            timings={
                runtime: samples.timing(str(place), runtime=runtime, batch=example.spec.batch)
                for runtime, samples in times.items()
            },
            test=None if tested is None else tested.summary(),
            train=(
                scored_train.each[place].summary()
                if scored_train is not None and scored_train.labelled
                else None
            ),
            calibration_error=None if tested is None else tested.calibration_error(),
        )
        contender = _against_first(place, measured, times, scored)
        elsewhere = _made_elsewhere(model)
        contenders.append(replace(contender, subnormals=found[place], made_elsewhere=elsewhere))
    return _All(tuple(contenders), example.spec, machine, scored)


def _made_elsewhere(model: nn.Module) -> str:
    """Return how an int8 file's processor differs from this one, in words; empty if it does not."""
    made_with = model.made_with if isinstance(model, FileNetwork) else None
    here = eight_bit_instructions()
    if made_with is None or made_with == here:
        return ""
    there, own = (", ".join(names) or "none" for names in (made_with, here))
    return (
        f"this int8 file was made on a processor with other instructions for 8-bit products "
        f"({there}) than this one's ({own}). Its outputs and times hold for this one."
    )


def _announced(runtimes: Sequence[str], progress: Progress | None) -> Iterator[str]:
    """Yield the runtimes; report progress before each is timed, never while the clock runs."""
    for done, runtime in enumerate(runtimes):
        if progress is not None:
            progress(done, len(runtimes), f"timing in {runtime}")
        yield runtime


def _against_first(
    place: int, measured: Measured, times: Mapping[str, Samples], scored: Together | None
) -> Contender:
    """Return a network's measurements and its comparison with the first."""
    name, first = str(place), "0"
    contender = Contender(name=name, measured=measured)
    if place == 0:
        return contender
    ratios = {
        runtime: samples.ratio(first, name, together=len(samples.ms) - 1)
        for runtime, samples in times.items()
    }
    if scored is None:
        return replace(contender, latency_ratio=ratios)
    both = scored.each[0], scored.each[place]
    return replace(
        contender,
        latency_ratio=ratios,
        difference=paired_difference(*both) if scored.labelled else None,
        agreement=agreement(*both),
        divergence=scored.divergences[place],
    )


def _names(count: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the networks.

    Raises:
        OptionError: If there are fewer than two networks, or not one name for each.
    """
    if count < 2:
        raise OptionError(f"There must be at least 2 networks to compare, got {count}.")
    if names is None:
        return (
            ("before", "after") if count == 2 else tuple(f"network {i + 1}" for i in range(count))
        )
    if len(names) != count:
        raise OptionError(f"`names` must have {count} names, one a network, got {len(names)}.")
    return distinct(names)


def measure(
    model: nn.Module,
    example: Example,
    *,
    timings: dict[str, Timing] | None = None,
    test: Metric | None = None,
    train: Metric | None = None,
    calibration_error: float | None = None,
) -> Measured:
    """Count a network's costs and return its record."""
    if isinstance(model, FileNetwork):
        costs, file_bytes, peak = model.costs(example.spec), model.file_bytes, None
    else:
        one = example.first().on(model, "cpu")
        traced = trace_layers(model, one)
        costs, file_bytes = Costs(traced.params, traced.macs), _file_bytes(model)
        peak = peak_activation_bytes(model, one)
    return Measured(
        params=costs.params,
        macs=costs.macs,
        file_bytes=file_bytes,
        latency=timings or {},
        metric=test,
        train_metric=train,
        calibration_error=calibration_error,
        peak_activation_bytes=peak,
    )


def _splits(data: object) -> tuple[Split | None, Split | None]:
    if data is None:
        return None, None
    if isinstance(data, Data):
        return data.test, data.train
    return as_split(data), None


def _file_bytes(model: nn.Module) -> int:
    """Return the size of the weights' file, by writing one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(model, path)
        return path.stat().st_size


def _without_subnormals(
    network: nn.Module, example: Example
) -> tuple[nn.Module, Subnormals | None]:
    return without_subnormals(network, example.on(network))


def _time_all(
    models: Sequence[nn.Module],
    example: Example,
    runtime: str,
    rounds: int,
    device: str,
) -> Samples:
    """Time all networks in each round in one runtime; each is named by its position."""
    found = find_runtime(runtime)
    device = found.device_for(device)
    inputs = example.on(models[0], device)
    callables = {str(place): found.on(model, inputs) for place, model in enumerate(models)}
    return interleave(callables, rounds=rounds, device=device)
