"""Plans of one network for any number of budgets, counted or measured, from one survey."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import CalibrationData, as_calibration
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.budget import check_budgets, parse_budgets
from onebyone.core.errors import BudgetError, OptionError
from onebyone.core.processes import on_main
from onebyone.core.randomness import seeded
from onebyone.core.records import (
    Budget,
    Deployment,
    FrontPoint,
    LeftAlone,
    Option,
    Plan,
    PlanPrecision,
    Quantity,
)
from onebyone.core.settings.common import Progress
from onebyone.core.settings.planning import Effort, PlanSettings
from onebyone.core.settings.signature import takes_calibration
from onebyone.core.tensor_trees import Inputs, device_of, first_examples, repeated, to_device
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import given_example, inputs_of
from onebyone.networks.surgery import as_network, check_finite, floating_type, home_of
from onebyone.planning.applicability import left_alone
from onebyone.planning.choosing import check_reachable, nearest_counted, plan_within
from onebyone.planning.fallback import never_slower_in_int8
from onebyone.planning.front import front_of
from onebyone.planning.head_options import HeadChoice
from onebyone.planning.int8_harm import int8_harms
from onebyone.planning.latency.cache import Timings, cache_folder
from onebyone.planning.latency.correction import Worth
from onebyone.planning.latency.deployment import deployment_of
from onebyone.planning.latency.front import FRONT_SECONDS, timed_front
from onebyone.planning.latency.planner import Deployed
from onebyone.planning.latency.precision import AUTO, FLOAT32, in_precision, runtime_for
from onebyone.planning.memory_budget import memory_bytes, within_memory
from onebyone.planning.mixed import with_int8
from onebyone.planning.survey import Survey, survey
from onebyone.profiling.latency import threads
from onebyone.profiling.subnormals import subnormals_of, with_times
from onebyone.quantizing.flow import Flow, flow_of
from onebyone.runtimes.onnx import to_onnx

HEAD_CHOICES = ("auto", "keep", "exact", "gap")
# How much more harm than the least a fastest network may do.
FASTEST = 1.1
# Calibration examples on which outputs without subnormal weights are compared with the original's.
FLUSH_EXAMPLES = 32


@takes_calibration(PlanSettings)
@ordinary_torch()
def plan(model: nn.Module, calibration: object, settings: PlanSettings) -> Plan:
    """Choose a rewrite for each site so that the budgets are met with the least harm.

    For a runtime, each option is timed in it, on this machine, between two neighbors and in turns
    with the layer that it replaces; one that is not shown to be faster is not taken. The planned
    network is then built and measured whole, in turns with the original, and planned again until
    prediction and measurement agree.

    Args:
        model: Not modified.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split, a torch data set or loader.
            A few hundred to a few thousand. ``None``: harm is then the relative error of the
            layers' kernels, which tells far less.
        settings: The fields of :class:`PlanSettings`, by keyword.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable. Its ``planner``
            keeps all that was measured, for another try.
        ModelError: If the network has nothing to rewrite, or cannot be run on the data.
        WeightsError: If a weight is not finite.
        UnknownNameError: If there is no such runtime.
        MissingExtraError: If the runtime is not installed.
        OptionError: If another option cannot be obeyed.
    """
    texts = settings.budgets
    runtime = runtime_for(settings.precision, settings.runtime)
    if runtime is None and (settings.fastest or "latency" in check_budgets(texts)):
        runtime = "eager"
    planner = Planner(
        model,
        calibration,
        asked=() if settings.closest else texts,
        task=settings.task,
        head=settings.head,
        leave=settings.leave,
        runtime=runtime,
        batch=settings.batch,
        num_threads=settings.num_threads,
        input_shape=settings.input_shape,
        example=settings.example,
        cache=settings.cache,
        name=settings.name,
        device=settings.device,
        precision=settings.precision,
        effort=settings.effort,
        progress=settings.progress,
    )
    return on_main(
        lambda: planner.plan_with_front(
            texts,
            fastest=settings.fastest,
            closest=settings.closest,
            measured=settings.measure_front,
        )
    )


class Planner:
    """Plans of one network for any number of budgets, from one survey of its options.

    Several processes survey it together. Only the main process can then plan and measure.

    Args:
        model: Not modified.
        calibration: As for :func:`plan`, as is all that follows.
        asked: Budgets that will be asked for. One that no choice can reach is refused before
            anything is measured.
        task: What the outputs mean.
        head: What becomes of the head.
        leave: Modules to leave alone.
        runtime: What the network is to run in; nothing is timed where it is ``None``.
        batch: Inputs of a call.
        num_threads: Torch's and the runtime's.
        input_shape: Without calibration data, of the input.
        example: In place of ``input_shape``, what the network is called with.
        cache: Where times and surveys are kept.
        name: Of the network.
        device: Where to run it.
        precision: What it is deployed in; int8 needs a runtime.
        effort: On how many examples and options harm is measured.
        progress: Told of the steps done.

    Raises:
        OneByOneError: As :func:`plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: object,
        *,
        asked: Sequence[str] = (),
        task: TaskLike | Meaning | None = None,
        head: HeadChoice = "auto",
        leave: Sequence[str] = (),
        runtime: str | None = None,
        batch: int = 1,
        num_threads: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        example: object = None,
        cache: str | Path | Literal[False] | None = None,
        name: str | None = None,
        device: str = "cpu",
        precision: PlanPrecision = "float32",
        effort: Effort = "normal",
        progress: Progress | None = None,
    ) -> None:
        if head not in HEAD_CHOICES:
            raise OptionError(f"`head` must be one of {', '.join(HEAD_CHOICES)}, got {head!r}.")
        model = as_network(model)
        check_finite(model)
        leave = left_alone(model, leave)
        deployment = None
        runtime = runtime_for(precision, runtime)
        if runtime is not None:
            deployment = deployment_of(
                runtime, device=device, batch=batch, num_threads=num_threads, precision=precision
            )
        data = None
        if calibration is not None:
            data = as_calibration(calibration, device=device, dtype=floating_type(model))
            task = meaning_of(model, data, task, device=device)
        first = _example(model, data, input_shape, example, device)
        if precision != FLOAT32:
            inputs_of(model, first).single("Int8")
        shown = first
        if data is not None:
            shown = first_examples(next(iter(data.batches())), FLUSH_EXAMPLES)
        came, (model, self._subnormals) = model, subnormals_of(model, shown)
        self._came = came
        with seeded(0, device_of(first)):  # fresh weights of the heads that are tried
            self._surveyed = survey(
                model,
                first if data is None else data,
                head_choice=head,
                leave=leave,
                every_form=deployment is not None,
                with_groups=precision == FLOAT32,
                meaning=task if isinstance(task, Meaning) else None,
                check=partial(check_reachable, asked, deployment) if asked else None,
                effort=effort,
                folder=_folder(cache),
                progress=progress,
            )
        self._flow: Flow | None = None
        self._alone_harm = 0.0
        if precision == AUTO:
            on_main(lambda: self._add_int8(first, data))
        self._model, self._example, self._device = model, first, device
        self._progress, self._precision = progress, precision
        self._name = name or type(model).__name__
        self._data = None if data is None else data.info()
        on_main(lambda: self._deploy(deployment, batch, cache))

    def _add_int8(self, first: Inputs, data: CalibrationData | None) -> None:
        self._flow = flow_of(to_onnx(self._surveyed.network, first))
        harms = int8_harms(self._surveyed, tuple(self._flow.gives), data)
        self._surveyed = with_int8(self._surveyed, tuple(self._flow.gives), harms)
        self._alone_harm = sum(harms.values())

    def _deploy(
        self, deployment: Deployment | None, batch: int, cache: str | Path | Literal[False] | None
    ) -> None:
        # Beside the network: what is built of it is counted on this.
        whole = repeated(self._example, batch)
        self._batched: Inputs = to_device(whole, home_of(self._model))
        self._made = partial(
            plan_within,
            network=self._name,
            inputs=inputs_of(self._model, self._batched),
            calibration=self._data,
        )
        self._found = in_precision(self._surveyed, deployment)
        self._deployed = None
        self._timed_subnormals = self._subnormals
        if deployment is not None:
            with threads(deployment.threads):
                self._timed_subnormals = with_times(
                    self._subnormals, self._came, self._model, self._batched, [deployment.runtime]
                )
            timings = Timings(deployment, _folder(cache))
            self._deployed = Deployed(
                self._model,
                self._found,
                self._batched,
                deployment,
                timings,
                flow=self._flow,
                progress=self._progress,
            )

    def for_runtime(
        self,
        runtime: str,
        *,
        batch: int = 1,
        num_threads: int | None = None,
        cache: str | Path | Literal[False] | None = None,
    ) -> Planner:
        """Return a planner of the same options for another runtime, batch or number of threads.

        Harm is not measured again, which for many networks takes longer than timing the options.

        Args:
            runtime: As for the planner itself, as is all that follows.
            batch: Inputs of a call.
            num_threads: Torch's and the runtime's.
            cache: Where times are kept.

        Raises:
            OptionError: If this planner is for no runtime: options that cost more than others by
                what is counted, and may be the faster ones, are then not among its own.
            OneByOneError: As the planner itself.
        """
        if self._deployed is None:
            raise OptionError(
                "The options must be those of a planner for a runtime, and this one is for none. "
                "Give it a `runtime` from the start."
            )
        deployment = deployment_of(
            runtime_for(self._precision, runtime) or runtime,
            device=self._device,
            batch=batch,
            num_threads=num_threads,
            precision=self._precision,
        )
        other = copy(self)
        other._deploy(deployment, batch, cache)  # noqa: SLF001
        return other

    @property
    def model(self) -> nn.Module:
        """The network that plans are for, without subnormal weights."""
        return self._model

    @property
    def worth(self) -> Worth:
        """What milliseconds that layers save come to in the network, as far as was measured.

        Raises:
            BudgetError: If nothing was timed.
        """
        if self._deployed is None:
            raise BudgetError("A latency needs a runtime that it is measured in.")
        return self._deployed.worth

    def survey(self) -> Survey:
        """Return the options; for a runtime those that are faster, with their times."""
        return self._found if self._deployed is None else self._deployed.survey()

    def budgets(self, texts: Sequence[str]) -> tuple[Budget, ...]:
        """Read budgets, of which percentages are of the network as it is.

        Raises:
            BudgetError: If one cannot be read, or bounds latency where nothing was timed.
        """
        bounded = check_budgets(texts)
        if "latency" in bounded and self._deployed is None:
            raise BudgetError("A budget for latency needs a runtime that it is measured in.")
        needed = None
        if "memory" in bounded:
            needed = memory_bytes(self._model, self._batched)
        return parse_budgets(texts, self.survey().before, memory_bytes=needed)

    def predict(self, budgets: Sequence[Budget], *, fastest: bool = False) -> Plan:
        """Choose among the options, by the times that are known; nothing is built.

        Raises:
            BudgetError: If a budget cannot be reached; says what is reachable.
        """
        make = partial(self._choose, fastest=fastest)
        if self._deployed is None:
            return make(self._found, budgets)
        return self._deployed.predict(budgets, make)

    def plan(self, texts: Sequence[str], *, fastest: bool = False, closest: bool = False) -> Plan:
        """Choose among the options; for a runtime, build the network and measure it.

        Args:
            texts: The budgets.
            fastest: As for :func:`plan`, as is ``closest``.
            closest: What to do where the budgets cannot be met.

        Raises:
            BudgetError: If a budget cannot be read or reached; says what is reachable, and has
                this planner for another try.
        """
        budgets = self.budgets(texts)
        try:
            return self._planned(budgets, fastest=fastest, closest=closest)
        except BudgetError as error:
            error.planner = self
            raise

    def plan_with_front(
        self, texts: Sequence[str], *, fastest: bool, closest: bool, measured: bool
    ) -> Plan:
        """Return a plan with the front of what it bounds first.

        Args:
            texts: As for :meth:`plan`, as are ``fastest`` and ``closest``.
            fastest: Whether the network is to be the fastest.
            closest: What to do where the budgets cannot be met.
            measured: As for :meth:`front`.

        Raises:
            BudgetError: As :meth:`plan`.
        """
        made = self.plan(texts, fastest=fastest, closest=closest)
        return replace(made, front=self.front(made.budgets[0].quantity, measured=measured))

    def _planned(self, budgets: Sequence[Budget], *, fastest: bool, closest: bool) -> Plan:
        make = partial(self._choose, fastest=fastest, closest=closest)
        if self._deployed is None:
            return make(self._found, budgets)
        made = self._deployed.plan(budgets, make, closest=closest)
        if self._precision != FLOAT32:
            made = self._deployed.translated(made)
            return never_slower_in_int8(
                made, self._deployed, fastest=fastest, alone_harm=self._alone_harm
            )
        return _never_slower(made, self._deployed.survey(), fastest=fastest)

    def measure(self, made: Plan) -> Plan:
        """Return a plan with its network built and measured in the runtime, as it is.

        Raises:
            BudgetError: If nothing was timed.
        """
        if self._deployed is None:
            raise BudgetError("A latency needs a runtime that it is measured in.")
        return self._deployed.measure(made)

    def retime(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, timed once more: what no choice was made by.

        Raises:
            BudgetError: If nothing was timed.
        """
        if self._deployed is None:
            raise BudgetError("A latency needs a runtime that it is measured in.")
        return self._deployed.retimed(made)

    def front(self, quantity: Quantity, *, measured: bool = False) -> tuple[FrontPoint, ...]:
        """Return what other budgets of a quantity would come to.

        Args:
            quantity: What is budgeted; of memory there is no front.
            measured: For a runtime, build and measure the networks, as many as a minute allows.
                Otherwise the smallest alone is; the times of the others are predicted, corrected
                by that one and by the networks that were built for plans before.
        """
        if self._precision == AUTO:
            return ()  # the least that joins allow is not a sum of sites' least
        if self._deployed is None or quantity == "memory":
            return front_of(self._found, quantity, self._choose)
        seconds = FRONT_SECONDS if measured else 0.0
        return timed_front(self._deployed, quantity, self._choose, seconds=seconds)

    def _choose(
        self,
        found: Survey,
        budgets: Sequence[Budget],
        *,
        fastest: bool = False,
        closest: bool = False,
    ) -> Plan:
        """Choose among options by what is known of them.

        With ``closest`` only what is counted gives way; of times the network's own decides.
        """

        def within(bounds: Sequence[Budget]) -> Plan:
            reached = nearest_counted(found, bounds) if closest else bounds
            return self._made(found, reached, fastest=FASTEST if fastest else None)

        memory = [budget for budget in budgets if budget.quantity == "memory"]
        if memory:
            made = within_memory(
                self._model, self._batched, memory[0], budgets, within, closest=closest
            )
        else:
            made = within(budgets)
        return replace(
            made,
            budgets=tuple(budgets),
            subnormals=self._timed_subnormals,
            precision=self._precision,
        )


def _folder(cache: str | Path | Literal[False] | None) -> Path | None:
    if cache is False:
        return None
    return cache_folder() if cache is None else Path(cache)


def _example(
    model: nn.Module,
    data: CalibrationData | None,
    shape: tuple[int, ...] | None,
    example: object,
    device: str,
) -> Inputs:
    """Return one example."""
    if data is not None:
        return data.example()
    if shape is None and example is None:
        raise OptionError("Without calibration data, `input_shape` must be given.")
    given = given_example(model, input_shape=shape, example=example)
    return given.first().on(model, device)


def _never_slower(made: Plan, found: Survey, *, fastest: bool) -> Plan:
    """Return a plan, or one that changes nothing where it is only for speed and shows no gain."""
    if _is_shown_faster(made) or not made.choices or not fastest:
        return made
    if any(budget.quantity != "latency" for budget in made.budgets):
        return made  # asked for smaller, too: that it is
    assert made.latency is not None
    reason = f"the rewritten network is not shown to be faster: {made.latency.ratio}"
    left = [LeftAlone(site=option.site, reason=reason) for option in made.choices]
    return replace(
        made, choices=(), left_alone=(*left, *made.left_alone), after=found.before, harm=0.0
    )


def _is_shown_faster(plan: Plan) -> bool:
    """Whether a plan's network was measured and shown to be faster than the original."""
    return plan.latency is not None and plan.latency.ratio.verdict == "faster"
