"""Networks side by side: on the same examples, and in interleaved rounds on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from onebyone import __version__
from onebyone.compared import Compared, Contender, distinct
from onebyone.data import Data, Split, as_split
from onebyone.errors import OptionError
from onebyone.evaluation import MetricFunction, Together, agreement, paired_difference, score
from onebyone.models import save_weights
from onebyone.profiling import example_input
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.memory import peak_activation_bytes
from onebyone.profiling.trace import trace_layers
from onebyone.records import Comparison, Machine, Measured, Metric, ModelSource, Timing
from onebyone.runtimes import describe_machine, find_runtime
from onebyone.sites import as_network

Progress = Callable[[int, int, str], None]

# The training metric is a sample's: it only serves to show the generalization gap.
TRAIN_EXAMPLES = 10_000
TIMED_ROUNDS = 40


@dataclass(frozen=True)
class SideBySide:
    """A comparison of two networks, and what pictures are made from.

    Attributes:
        test: The scores of both networks on the test data; ``None`` without data.
    """

    record: Comparison
    test: Together | None


def compare(
    *models: nn.Module,
    data: object = None,
    input_shape: tuple[int, ...] | None = None,
    runtimes: Sequence[str] = ("eager",),
    metric: str | MetricFunction = "accuracy",
    names: Sequence[str] | None = None,
    sources: Sequence[ModelSource | None] | None = None,
    rounds: int = TIMED_ROUNDS,
    num_threads: int | None = None,
    device: str = "cpu",
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Compared:
    """Measure networks: cost, latency, and scores on the same examples, each against the first.

    Args:
        models: Two or more. Not modified.
        data: An :class:`onebyone.data.Data`, whose test part is scored and whose training part
            gives the generalization gap; or test examples alone; ``None`` for cost and latency.
        input_shape: Shape of the timed input with the batch; one example of the data by default.
        runtimes: In which all are timed, interleaved.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``. Without
            labels there is no accuracy: classifiers are compared by where they agree.
        names: What to call them.
        sources: Where they came from, for the record.
        rounds: Interleaved rounds of timing, each with all networks.
        num_threads: Torch's threads while timing.
        device: Where to run.
        command: The command line, for the record.
        progress: Told of the examples done.

    Returns:
        A record that prints as tables; ``pair(1)`` is the comparison of the first two.

    Raises:
        OptionError: If there are fewer than two networks, names of another number, or neither
            data nor an input shape.
        DataError: If the data is empty or of an unknown form.
        ModelError: If a network cannot be run on it.
    """
    if len(models) == 1 and isinstance(models[0], list | tuple):
        models = tuple(models[0])
    called = _names(len(models), names)
    measured = _measure_all(
        models,
        data=data,
        input_shape=input_shape,
        runtimes=runtimes,
        metric=metric,
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
        input_shape=measured.input_shape,
        rounds=rounds,
        machine=measured.machine,
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=data.info() if isinstance(data, Data) else None,
        command=tuple(command),
    )


def side_by_side(
    before: nn.Module,
    after: nn.Module,
    *,
    data: object,
    input_shape: tuple[int, ...] | None,
    runtimes: Sequence[str],
    metric: str | MetricFunction,
    names: tuple[str, str] = ("before", "after"),
    rounds: int = TIMED_ROUNDS,
    num_threads: int | None,
    device: str,
    progress: Progress | None,
) -> SideBySide:
    """Compare two networks as :func:`compare` does, and keep the scores of each example."""
    both = _measure_all(
        (before, after),
        data=data,
        input_shape=input_shape,
        runtimes=runtimes,
        metric=metric,
        rounds=rounds,
        num_threads=num_threads,
        device=device,
        progress=progress,
    )
    first, second = both.contenders
    record = Comparison(
        before=first.measured,
        after=second.measured,
        input_shape=both.input_shape,
        latency_ratio=second.latency_ratio,
        difference=second.difference,
        agreement=second.agreement,
        divergence=second.divergence,
        machine=both.machine,
        names=names,
    )
    return SideBySide(record, both.test)


@dataclass(frozen=True)
class _All:
    """What was measured of networks side by side."""

    contenders: tuple[Contender, ...]
    input_shape: tuple[int, ...]
    machine: Machine
    test: Together | None


def _measure_all(
    models: Sequence[nn.Module],
    *,
    data: object,
    input_shape: tuple[int, ...] | None,
    runtimes: Sequence[str],
    metric: str | MetricFunction,
    rounds: int,
    num_threads: int | None,
    device: str,
    progress: Progress | None,
) -> _All:
    test, train = _splits(data)
    if input_shape is None:
        if test is None:
            raise OptionError("`input_shape` must be given where there is no data, got None.")
        input_shape = (1, *test.input_shape)
    networks = [as_network(model, scripted=True) for model in models]
    scored = scored_train = None
    if test is not None:
        scored = score(networks, test, metric=metric, device=device, progress=progress)
    if train is not None:
        sample = train.take(TRAIN_EXAMPLES, 0)
        scored_train = score(networks, sample, metric=metric, device=device, progress=progress)
    with threads(num_threads):
        times = {
            runtime: _time_all(networks, input_shape, runtime, rounds, device)
            for runtime in _announced(runtimes, progress)
        }
        machine = describe_machine(device)
    contenders = []
    for place, model in enumerate(networks):
        tested = scored.each[place] if scored is not None and scored.labelled else None
        measured = measure(
            model,
            input_shape,
            timings={
                runtime: samples.timing(str(place), runtime=runtime, batch=input_shape[0])
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
        contenders.append(_against_first(place, measured, times, scored))
    return _All(tuple(contenders), input_shape, machine, scored)


def _announced(runtimes: Sequence[str], progress: Progress | None) -> Iterator[str]:
    """Yield the runtimes, and tell of each before it is timed: never while the clock runs."""
    for done, runtime in enumerate(runtimes):
        if progress is not None:
            progress(done, len(runtimes), f"timing in {runtime}")
        yield runtime


def _against_first(
    place: int, measured: Measured, times: Mapping[str, Samples], scored: Together | None
) -> Contender:
    """Return what was measured of a network, and how it compares with the first."""
    name, first = str(place), "0"
    contender = Contender(name=name, measured=measured)
    if place == 0:
        return contender
    ratios = {runtime: samples.ratio(first, name) for runtime, samples in times.items()}
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
    """Return what to call the networks.

    Raises:
        OptionError: If there are fewer than two, or names of another number.
    """
    if count < 2:
        raise OptionError(f"Two networks or more can be compared, got {count}.")
    if names is None:
        return (
            ("before", "after") if count == 2 else tuple(f"network {i + 1}" for i in range(count))
        )
    if len(names) != count:
        raise OptionError(f"`names` must be {count}, one for each network, got {len(names)}.")
    return distinct(names)


def measure(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    timings: dict[str, Timing] | None = None,
    test: Metric | None = None,
    train: Metric | None = None,
    calibration_error: float | None = None,
) -> Measured:
    """Return a network's record, its costs counted here."""
    dtype = next((p.dtype for p in model.parameters()), None)
    example = example_input((1, *input_shape[1:]), dtype=dtype)
    costs = trace_layers(model, example)
    return Measured(
        params=costs.params,
        macs=costs.macs,
        file_bytes=_file_bytes(model),
        latency=timings or {},
        metric=test,
        train_metric=train,
        calibration_error=calibration_error,
        peak_activation_bytes=peak_activation_bytes(model, example),
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


def _time_all(
    models: Sequence[nn.Module],
    input_shape: tuple[int, ...],
    runtime: str,
    rounds: int,
    device: str,
) -> Samples:
    """Time networks in one runtime, all of them in each round; their names are their places."""
    dtype = next((p.dtype for p in models[0].parameters()), None)
    found = find_runtime(runtime)
    device = found.device_for(device)
    example = example_input(input_shape, device=device, dtype=dtype)
    callables = {str(place): found.prepare(model, example) for place, model in enumerate(models)}
    return interleave(callables, rounds=rounds, device=device)
