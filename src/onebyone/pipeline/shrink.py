"""The whole pipeline as one function: profile, calibrate, plan, apply, distil, compare, record."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from onebyone.calibration.inputs import CalibrationData, drawn_for
from onebyone.calibration.meaning import check_same_task, planned_task
from onebyone.core.errors import OptionError, PlanError
from onebyone.core.processes import copy_from_main, on_main
from onebyone.core.records import ModelSource, Plan, Subnormals
from onebyone.core.settings.runs import ShrinkArguments, ShrinkSettings
from onebyone.core.settings.signature import takes
from onebyone.core.tensor_trees import Inputs, to_device
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data
from onebyone.evaluation.scores import check_scorable
from onebyone.networks.held import held
from onebyone.networks.surgery import (
    as_network,
    check_finite,
    evaluation_copy,
    home_of,
    in_type_of,
)
from onebyone.networks.zoo import load_weights
from onebyone.pipeline.deploy import (
    check_runtimes,
    deployed_in_int8,
    distilled_in_int8,
    quantized_in,
)
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.measured import compare_both, measure_one_shot
from onebyone.pipeline.planned import planned
from onebyone.pipeline.run import Run, Shrunk, meaning_of_run, read_data, started
from onebyone.pipeline.run_folder import ONE_SHOT
from onebyone.profiling.latency import threads
from onebyone.profiling.subnormals import subnormals_of, with_times, without_subnormals
from onebyone.rewrites import apply, restructure
from onebyone.training.distill import distill
from onebyone.training.reconstruct import inputs_for, reconstruct

# The number of training inputs for a check that outputs do not change without subnormal weights.
FLUSH_EXAMPLES = 32


@takes(ShrinkArguments)
@ordinary_torch()
def shrink(model: nn.Module | str | Path, data: object, settings: ShrinkArguments) -> Shrunk:
    """Make a network smaller within a budget, keep its accuracy, and measure the result.

    Args:
        model: A network, not modified; or what :func:`onebyone.load_model` takes.
        data: An :class:`onebyone.data.Data`, what :func:`onebyone.data.load_data` takes, or
            ``(train, test)`` or ``(train, validation, test)``. Labels are optional for classifiers:
            without them the record has the agreement with the original instead of the accuracy.
        settings: The fields of :class:`ShrinkArguments`, by keyword.

    Returns:
        The smaller network, and the record of the run.

    Raises:
        BudgetError: If the budget cannot be read or reached; says what can be reached.
        OutputError: If ``out`` cannot be used.
        UnknownNameError: If there is no such setting.
        OneByOneError: If a stage fails, for instance on bad data, weights or networks.

    Examples:
        >>> small, record = shrink(network, data, budget="macs=50%", out="runs/x")  # doctest: +SKIP
    """
    network, source = _network(model, settings)
    named = [model] if isinstance(model, str | Path) else []
    uses = (*settings.uses, *named, *([settings.weights] if settings.weights is not None else []))
    return shrink_loaded(network, source, data, replace(settings, uses=uses))


@ordinary_torch()
def shrink_loaded(
    network: nn.Module, source: ModelSource, data: object, settings: ShrinkSettings
) -> Shrunk:
    """Shrink a network whose source is known; see :func:`shrink`.

    Args:
        network: Not modified.
        source: Where it came from; the run's network is rebuilt from it.
        data: As for :func:`shrink`.
        settings: Settings of the run.
    """
    check_finite(network)
    precision = settings.precision if settings.plan is None else settings.plan.precision
    check_runtimes(precision, settings.runtimes)
    examples = read_data(data, settings)
    if precision != "float32":
        examples.inputs.single("Int8")
    if settings.plan is not None:
        _check_size(settings.plan, examples)
    original = evaluation_copy(network, device="cpu")
    with held(original, _shown(original, examples)):
        return _from_copy(original, source, examples, settings)


def _from_copy(
    original: nn.Module, source: ModelSource, examples: Data, settings: ShrinkSettings
) -> Shrunk:
    own = settings.task if settings.task is not None else examples.task
    meaning = meaning_of_run(original, source, examples, settings, own)
    if settings.plan is not None and not meaning.info().known:
        own = planned_task(settings.plan.task, own)
        meaning = meaning_of_run(original, source, examples, settings, own)
    if settings.plan is not None:
        check_same_task(settings.plan.task, meaning)
    check_scorable(original, examples.test, metric=settings.metric, task=meaning)
    with started(original, source, examples, settings, meaning) as run:
        return _shrunk(run, original, examples, settings)


def _check_size(plan: Plan, data: Data) -> None:
    if not plan.inputs.same_examples(data.inputs):
        planned, given = plan.inputs.example_text(), data.inputs.example_text()
        raise PlanError(
            f"A plan must be made for the size of the data's inputs, {given}, but this one is for "
            f"{planned}: its costs and harm hold for that size. Plan anew."
        )


def _shrunk(run: Run, original: nn.Module, examples: Data, settings: ShrinkSettings) -> Shrunk:
    distils = ["distil"] if settings.epochs else []
    run.stages = ("profile", "plan", "apply", "one-shot", *distils, "compare")
    if run.record.profile_before is None:
        with run.stage("profile"):
            original = _flushed(run, original, examples)
            run.keep(profile_before=run.profile(original))
    else:
        original = _without_subnormals(original, examples)
    with held(original, run.example.on(original)):
        return _from_profiled(run, original, examples, settings)


def _from_profiled(
    run: Run, original: nn.Module, examples: Data, settings: ShrinkSettings
) -> Shrunk:
    calibration = drawn_for(
        original,
        examples.train,
        examples=settings.calibration_examples,
        name=examples.name,
        seed=settings.seed,
        device=run.device,
    )
    with run.stage("plan"):
        chosen = planned(run, original, calibration, settings, examples)
        chosen = replace(chosen, subnormals=run.record.subnormals)
        run.keep(plan=chosen)
    if chosen.precision != "float32":
        in_int8 = ["distil int8"] if settings.int8_epochs else []
        run.stages = (*run.stages[:-1], "quantize", *in_int8, "export", "compare")
    with run.stage("apply"):
        small = _applied(run, original, chosen, calibration, settings=settings, data=examples)
    if run.record.one_shot is None:
        with run.stage("one-shot"), held(small, run.example.on(small)):
            run.on_main(lambda: measure_one_shot(run, original, small, examples))
    if settings.epochs:
        with run.stage("distil"):
            trained = distill(
                small,
                examples,
                teacher=original,
                epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                label_weight=settings.label_weight,
                mix=settings.mix,
                **run.training,
            )
            small = _without_subnormals(trained.model, examples)
            run.remark = trained.log.waiting or ""
            run.keep(training=trained.log)
    made = small
    if chosen.precision == "float32":
        run.on_main(lambda: _compared(run, original, small, examples))
    else:
        made = _in_int8(run, original, small, chosen, data=examples, settings=settings)
    run.finish()
    return Shrunk(evaluation_copy(made, device="cpu"), run.record)


def _compared(run: Run, original: nn.Module, small: nn.Module, data: Data) -> None:
    with run.stage("compare"), held(small, run.example.on(small)):
        compare_both(run, original, small, data)


def _in_int8(
    run: Run,
    original: nn.Module,
    small: nn.Module,
    chosen: Plan,
    *,
    data: Data,
    settings: ShrinkSettings,
) -> nn.Module:
    """Deploy a network in int8 and compare its file; return its simulation in PyTorch."""
    with run.stage("quantize"):
        if run.folder is not None:
            run.folder.save_network(small)
        quantized, distilled = quantized_in(run, small, chosen, data), None
    if settings.int8_epochs:
        teacher = small if settings.label_weight else original
        with run.stage("distil int8"):
            quantized, distilled = distilled_in_int8(run, quantized, teacher, data, settings)

    def compared() -> None:
        with ExitStack() as kept:
            with run.stage("export"):
                made = deployed_in_int8(run, quantized, chosen, data, distilled)
                file = kept.enter_context(made)
            with run.stage("compare"):
                compare_both(run, original, small, data, file)

    run.on_main(compared)
    return quantized.network


def _flushed(run: Run, original: nn.Module, data: Data) -> nn.Module:
    """Return the original without subnormal weights, and record the effect of that alone."""
    flushed, found = subnormals_of(original, _shown(original, data))
    example = run.example.on(original, run.device)

    def timed() -> Subnormals | None:
        with threads(run.settings.num_threads):
            return with_times(found, original, flushed, example, run.settings.runtimes)

    run.keep(subnormals=on_main(timed))
    return flushed


def _without_subnormals(network: nn.Module, data: Data) -> nn.Module:
    return without_subnormals(network, _shown(network, data))[0]


def _shown(network: nn.Module, data: Data) -> Inputs:
    inputs, _ = next(iter(data.train.take(FLUSH_EXAMPLES, 0).batches(FLUSH_EXAMPLES)))
    return in_type_of(network, to_device(inputs, home_of(network)))


def _network(
    model: nn.Module | str | Path, settings: ShrinkArguments
) -> tuple[nn.Module, ModelSource]:
    weights, original, options = settings.weights, settings.original, settings.model_options or {}
    if not isinstance(model, str | Path):
        network = as_network(model)
        if weights is not None or options or original is not None:
            raise OptionError(
                "`weights`, `model_options` and `original` must be left out where `model` is a "
                "module: load them into it first."
            )
        return network, ModelSource(name=type(network).__name__, spec=None)
    loaded = load_source(model, weights=weights, original=original, **options)
    return loaded.model, loaded.source


def _applied(
    run: Run,
    original: nn.Module,
    chosen: Plan,
    calibration: CalibrationData,
    *,
    settings: ShrinkSettings,
    data: Data,
) -> nn.Module:
    if on_main(lambda: _is_applied(run, original)):
        small = restructure(original, chosen)
        on_main(lambda: _load_applied(run, small))
        copy_from_main([*small.parameters(), *small.buffers()])
        return small.eval()
    small = apply(
        original,
        chosen,
        calibration,
        task=run.meaning,
        device=run.device,
        progress=run.tell,
    ).eval()
    steps = settings.reconstruct
    if steps and chosen.choices:
        made: list[nn.Module] = []
        run.on_main(lambda: made.append(_reconstruct(run, original, small, steps, data=data)))
        small = next(iter(made), small)
        copy_from_main([*small.parameters(), *small.buffers()])
    if run.folder is not None:
        # After the record of how they were made: the weights never exist without it.
        run.folder.save_network(small, ONE_SHOT)
    return small


def _is_applied(run: Run, original: nn.Module) -> bool:
    """Keep the original; return whether the resumed run has the network that a plan gave."""
    if run.folder is None:
        return False
    run.folder.keep_original(original)
    return run.folder.file(ONE_SHOT).exists()


def _load_applied(run: Run, small: nn.Module) -> None:
    assert run.folder is not None
    load_weights(small, run.folder.file(ONE_SHOT), network="the one-shot network")


def _reconstruct(
    run: Run, original: nn.Module, small: nn.Module, steps: int, *, data: Data
) -> nn.Module:
    nearer = reconstruct(
        small,
        teacher=original,
        calibration=inputs_for(data.train, steps, run.settings.seed),
        task=run.meaning,
        steps=steps,
        seed=run.settings.seed,
        device=run.device,
        progress=run.tell,
    )
    run.keep(reconstruction=nearer.log)
    return nearer.model.eval()
