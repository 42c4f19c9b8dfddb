"""Two networks side by side: on the same examples, and in interleaved rounds on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from onebyone.data import Data, Split, as_split
from onebyone.errors import OptionError
from onebyone.evaluation import MetricFunction, Together, agreement, paired_difference, score
from onebyone.models import save_weights
from onebyone.profiling import example_input
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.memory import peak_activation_bytes
from onebyone.profiling.trace import trace_layers
from onebyone.records import Comparison, Measured, Metric, Ratio, Timing
from onebyone.runtimes import describe_machine, find_runtime

Progress = Callable[[int, int, str], None]

# The training metric is a sample's: it only serves to show the generalization gap.
TRAIN_EXAMPLES = 10_000
TIMED_ROUNDS = 40


@dataclass(frozen=True)
class SideBySide:
    """A comparison, and what pictures are made from.

    Attributes:
        test: The scores of both networks on the test data; ``None`` without data.
    """

    record: Comparison
    test: Together | None


def compare(
    before: nn.Module,
    after: nn.Module,
    *,
    data: object = None,
    input_shape: tuple[int, ...] | None = None,
    runtimes: Sequence[str] = ("eager",),
    metric: str | MetricFunction = "accuracy",
    names: tuple[str, str] = ("before", "after"),
    rounds: int = TIMED_ROUNDS,
    num_threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Measure two networks: cost, latency, and scores on the same examples.

    Args:
        before: Not modified.
        after: Not modified.
        data: An :class:`onebyone.data.Data`, whose test part is scored and whose training part
            gives the generalization gap; or test examples alone; ``None`` for cost and latency.
        input_shape: Shape of the timed input with the batch; one example of the data by default.
        runtimes: In which both are timed, interleaved.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``.
        names: What to call them.
        rounds: Interleaved rounds of timing.
        num_threads: Torch's threads while timing.
        device: Where to run.
        progress: Told of the examples done.

    Raises:
        OptionError: If there is neither data nor an input shape.
        DataError: If the data is empty or of an unknown form.
        ModelError: If a network cannot be run on it.
    """
    return side_by_side(
        before,
        after,
        data=data,
        input_shape=input_shape,
        runtimes=runtimes,
        metric=metric,
        names=names,
        rounds=rounds,
        num_threads=num_threads,
        device=device,
        progress=progress,
    ).record


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
    """Do what :func:`compare` does, and keep the scores of each example."""
    test, train = _splits(data)
    if input_shape is None:
        if test is None:
            raise OptionError("`input_shape` must be given where there is no data, got None.")
        input_shape = (1, *test.input_shape)
    models = [before, after]
    scored = scored_train = None
    if test is not None:
        scored = score(models, test, metric=metric, device=device, progress=progress)
    if train is not None:
        sample = train.take(TRAIN_EXAMPLES, 0)
        scored_train = score(models, sample, metric=metric, device=device, progress=progress)
    with threads(num_threads):
        latency = _time_both(models, input_shape, runtimes, rounds, device)
        machine = describe_machine(device)
    measured = [
        measure(
            model,
            input_shape,
            timings={name: timing[index] for name, (timing, _) in latency.items()},
            test=None if scored is None else scored.each[index].summary(),
            train=None if scored_train is None else scored_train.each[index].summary(),
            calibration_error=None if scored is None else scored.each[index].calibration_error(),
        )
        for index, model in enumerate(models)
    ]
    record = Comparison(
        before=measured[0],
        after=measured[1],
        input_shape=input_shape,
        latency_ratio={name: ratio for name, (_, ratio) in latency.items()},
        difference=None if scored is None else paired_difference(*scored.each),
        agreement=None if scored is None else agreement(*scored.each),
        divergence=None if scored is None else scored.divergences[1],
        machine=machine,
        names=names,
    )
    return SideBySide(record, scored)


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


def _time_both(
    models: Sequence[nn.Module],
    input_shape: tuple[int, ...],
    runtimes: Sequence[str],
    rounds: int,
    device: str,
) -> dict[str, tuple[tuple[Timing, Timing], Ratio]]:
    dtype = next((p.dtype for p in models[0].parameters()), None)
    example = example_input(input_shape, device=device, dtype=dtype)
    result = {}
    for name in runtimes:
        runtime = find_runtime(name)
        callables = {
            side: runtime.prepare(model, example)
            for side, model in zip(("before", "after"), models, strict=True)
        }
        samples: Samples = interleave(callables, rounds=rounds, device=device)
        batch = input_shape[0]
        timings = (
            samples.timing("before", runtime=name, batch=batch),
            samples.timing("after", runtime=name, batch=batch),
        )
        result[name] = (timings, samples.ratio("before", "after"))
    return result
