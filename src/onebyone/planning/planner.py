"""Plans of one network for any number of budgets, counted or measured, from one survey."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from onebyone.calibration import CalibrationData, as_calibration
from onebyone.errors import BudgetError, OptionError
from onebyone.planning.applies import left_alone
from onebyone.planning.budget import budget_texts, check_budgets, counted_budgets, parse_budgets
from onebyone.planning.deployed import Deployed, deployment_of, is_shown_faster
from onebyone.planning.front import front_of
from onebyone.planning.memory import memory_bytes, within_memory
from onebyone.planning.options import HeadChoice, Survey, survey
from onebyone.planning.solve import choose
from onebyone.planning.timed_front import FRONT_SECONDS, timed_front
from onebyone.planning.timings import Timings, cache_folder
from onebyone.planning.worth import Worth
from onebyone.profiling import example_input
from onebyone.randomness import seeded
from onebyone.records import (
    Budget,
    CalibrationInfo,
    Deployment,
    FrontPoint,
    LeftAlone,
    Option,
    Plan,
    Quantity,
)
from onebyone.rewrites.layerwise import LAYER_REWRITES
from onebyone.sites import as_network, check_finite, floating_type
from onebyone.units import format_percent

Progress = Callable[[int, int, str], None]

HEAD_CHOICES = ("auto", "keep", "exact", "gap")
# How much more harm than the least a fastest network may do.
FASTEST = 1.1


def plan(
    model: nn.Module,
    calibration: object,
    *,
    budget: str | Iterable[str],
    head: HeadChoice = "auto",
    leave: Sequence[str] = (),
    runtime: str | None = None,
    batch: int = 1,
    num_threads: int | None = None,
    fastest: bool = False,
    measure_front: bool = False,
    input_shape: tuple[int, ...] | None = None,
    cache: str | Path | Literal[False] | None = None,
    name: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Plan:
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
        budget: Such as ``"latency=50%"`` or ``["macs=50%", "params=2M", "memory=8MB"]``. Latency
            is of a call in the runtime; memory is that of the weights and of the activations that
            are alive at once; both for ``batch`` inputs.
        head: ``auto``: a GAP head is one option among others; ``keep``: the head stays; ``exact``:
            it becomes convolutions of the same function; ``gap``: 1×1 convolutions and a global
            average.
        leave: Names of modules to leave alone, with all inside them.
        runtime: What the network is to run in, one of :data:`onebyone.runtimes.RUNTIMES`. With a
            budget for latency ``eager`` by default; else, by default, nothing is timed.
        batch: Inputs of a call.
        num_threads: Torch's and the runtime's; what torch is set to, by default.
        fastest: Return the fastest network whose harm is at most a tenth above the least that
            meets the budgets.
        measure_front: For a runtime, build and measure the networks of the front as well, as many
            as a minute allows; each says how its time was obtained.
        input_shape: Without calibration data, the shape of an input with the batch in front.
        cache: Folder where times are kept for the next plan; ``False`` keeps none; by default
            ``ONEBYONE_CACHE`` or a folder in the user's cache.
        name: What to call the network; its class by default.
        device: Where to run it.
        progress: Told of the steps done.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
        ModelError: If the network has nothing to rewrite, or cannot be run on the data.
        WeightsError: If a weight is not finite.
        UnknownNameError: If there is no such runtime.
        MissingExtraError: If the runtime is not installed.
        OptionError: If another option cannot be obeyed.
    """
    texts = budget_texts(budget)
    bounded = check_budgets(texts)  # a typing error should not wait for a survey
    if runtime is None and (fastest or "latency" in bounded):
        runtime = "eager"
    planner = Planner(
        model,
        calibration,
        asked=texts,
        head=head,
        leave=leave,
        runtime=runtime,
        batch=batch,
        num_threads=num_threads,
        input_shape=input_shape,
        cache=cache,
        name=name,
        device=device,
        progress=progress,
    )
    made = planner.plan(texts, fastest=fastest)
    front = planner.front(made.budgets[0].quantity, measured=measure_front)
    return replace(made, front=front)


class Planner:
    """Plans of one network for any number of budgets, from one survey of its options.

    Args:
        model: Not modified.
        calibration: As for :func:`plan`, as is all that follows.
        asked: Budgets that will be asked for: what no choice can reach of them is refused before
            anything is measured.
        head: What becomes of the head.
        leave: Modules to leave alone.
        runtime: What the network is to run in; nothing is timed where it is ``None``.
        batch: Inputs of a call.
        num_threads: Torch's and the runtime's.
        input_shape: Without calibration data, of an input.
        cache: Where times are kept.
        name: Of the network.
        device: Where to run it.
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
        head: HeadChoice = "auto",
        leave: Sequence[str] = (),
        runtime: str | None = None,
        batch: int = 1,
        num_threads: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        cache: str | Path | Literal[False] | None = None,
        name: str | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        if head not in HEAD_CHOICES:
            raise OptionError(f"`head` must be one of {', '.join(HEAD_CHOICES)}, got {head!r}.")
        model = as_network(model)
        check_finite(model)
        leave = left_alone(model, leave)
        deployment = None
        if runtime is not None:
            deployment = deployment_of(runtime, device=device, batch=batch, num_threads=num_threads)
        data = None
        if calibration is not None:
            data = as_calibration(calibration, device=device, dtype=floating_type(model))
        example = _example(model, data, input_shape, device)
        with seeded(0, example.device):  # fresh weights of the heads that are tried
            self._found = survey(
                model,
                example if data is None else data,
                head_choice=head,
                leave=leave,
                every_form=deployment is not None,
                check=partial(_check_reachable, asked) if asked else None,
                progress=progress,
            )
        self._model, self._example, self._device = model, example, device
        self._progress = progress
        self._name = name or type(model).__name__
        self._data = None if data is None else data.info()
        self._deploy(deployment, batch, cache)

    def _deploy(
        self, deployment: Deployment | None, batch: int, cache: str | Path | Literal[False] | None
    ) -> None:
        # Beside the network: what is built of it is counted on this.
        home = next(self._model.parameters(), self._example).device
        whole = self._example.expand(batch, *self._example.shape[1:])
        self._batched = whole.contiguous().to(home)
        self._made = partial(
            _plan_within,
            network=self._name,
            input_shape=tuple(self._batched.shape),
            calibration=self._data,
        )
        self._deployed = None
        if deployment is not None:
            timings = Timings(deployment, _folder(cache))
            self._deployed = Deployed(
                self._model,
                self._found,
                self._batched,
                deployment,
                timings,
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
            runtime, device=self._device, batch=batch, num_threads=num_threads
        )
        other = copy(self)
        other._deploy(deployment, batch, cache)  # noqa: SLF001
        return other

    @property
    def model(self) -> nn.Module:
        """The network that plans are for."""
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

    def plan(self, texts: Sequence[str], *, fastest: bool = False) -> Plan:
        """Choose among the options; for a runtime, build the network and measure it.

        Raises:
            BudgetError: If a budget cannot be read or reached; says what is reachable.
        """
        budgets = self.budgets(texts)
        if self._deployed is None:
            return self.predict(budgets)
        made = self._deployed.plan(budgets, partial(self._choose, fastest=fastest))
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
        if self._deployed is None or quantity == "memory":
            return front_of(self._found, quantity, self._choose)
        seconds = FRONT_SECONDS if measured else 0.0
        return timed_front(self._deployed, quantity, self._choose, seconds=seconds)

    def _choose(self, found: Survey, budgets: Sequence[Budget], *, fastest: bool = False) -> Plan:
        within = partial(self._made, found, fastest=FASTEST if fastest else None)
        memory = [budget for budget in budgets if budget.quantity == "memory"]
        if not memory:
            return within(budgets)
        return within_memory(self._model, self._batched, memory[0], budgets, within)


def _check_reachable(texts: Sequence[str], found: Survey) -> None:
    """Refuse budgets of what is counted that no choice of the options meets."""
    budgets = counted_budgets(texts, found.before)
    choose(found.options, budgets, found.start, forced=found.forced, obstacles=_obstacles(found))


def _folder(cache: str | Path | Literal[False] | None) -> Path | None:
    if cache is False:
        return None
    return cache_folder() if cache is None else Path(cache)


def plan_from(
    found: Survey,
    budget: str | Iterable[str],
    *,
    network: str,
    input_shape: tuple[int, ...],
    calibration: CalibrationInfo | None,
) -> Plan:
    """Choose among options already surveyed: a moment's work, for any number of budgets.

    Args:
        found: The options.
        budget: As for :func:`plan`, of what is counted: ``macs`` and ``params``.
        network: What to call the network.
        input_shape: With the batch in front.
        calibration: What harm was measured on.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
    """
    budgets = parse_budgets(budget, found.before)
    return _plan_within(
        found, budgets, network=network, input_shape=input_shape, calibration=calibration
    )


def _example(
    model: nn.Module,
    data: CalibrationData | None,
    shape: tuple[int, ...] | None,
    device: str,
) -> Tensor:
    """Return one input."""
    if data is not None:
        return data.example()
    if shape is None:
        raise OptionError("Without calibration data, `input_shape` must be given.")
    return example_input((1, *shape[1:]), device=device, dtype=floating_type(model))


def _plan_within(
    found: Survey,
    budgets: Sequence[Budget],
    *,
    network: str,
    input_shape: tuple[int, ...],
    calibration: CalibrationInfo | None,
    fastest: float | None = None,
) -> Plan:
    exact = found.exact if found.exact_asked else None
    chosen = choose(
        found.options,
        budgets,
        found.start,
        forced=found.forced,
        obstacles=_obstacles(found),
        fastest=fastest,
    )
    if found.exact is not None and any(_is_inside(option, found.exact) for option in chosen):
        exact = found.exact
    after = found.before
    choices = chosen if exact is None else (exact, *chosen)
    for option in choices:
        after = after - option.saved
    return Plan(
        network=network,
        input_shape=input_shape,
        budgets=tuple(budgets),
        before=found.before,
        after=after,
        choices=choices,
        left_alone=_left_alone(found, choices, exact),
        calibration=calibration,
        harm=sum(option.harm or 0.0 for option in chosen),
    )


def _never_slower(made: Plan, found: Survey, *, fastest: bool) -> Plan:
    """Return a plan, or one that changes nothing where it is only for speed and shows no gain."""
    if is_shown_faster(made) or not made.choices or not fastest:
        return made
    if any(budget.quantity != "latency" for budget in made.budgets):
        return made  # asked for smaller, too: that it is
    assert made.latency is not None
    reason = f"the rewritten network is not shown to be faster: {made.latency.ratio}"
    left = [LeftAlone(site=option.site, reason=reason) for option in made.choices]
    return replace(
        made, choices=(), left_alone=(*left, *made.left_alone), after=found.before, harm=0.0
    )


def _is_inside(option: Option, head: Option) -> bool:
    """Whether an option's site is a layer that only the exact head has."""
    return option.rewrite in LAYER_REWRITES and option.site.startswith(f"{head.site}.")


def _left_alone(
    found: Survey, choices: Sequence[Option], exact: Option | None
) -> tuple[LeftAlone, ...]:
    touched = {name for option in choices for name in (*option.occupies, option.site)}
    reasons = {item.site: item.reason for item in found.left_alone if item.site not in touched}
    for option in found.options:
        if option.site not in touched:
            reasons[option.site] = "the budget is met with less harm elsewhere"
    if found.exact is not None and exact is None:
        # The layers of the exact head are not in the network that the plan is for.
        inside = f"{found.exact.site}."
        gone = [site for site in reasons if site.startswith(inside)]
        for site in gone:
            reason = reasons.pop(site)
            if found.exact.site not in touched:
                reasons[found.exact.site] = reason
    order = {layer.name: place for place, layer in enumerate(found.layers)}
    return tuple(
        LeftAlone(site=site, reason=reason)
        for site, reason in sorted(reasons.items(), key=lambda x: order.get(x[0], len(order)))
    )


def _obstacles(found: Survey) -> str:
    """Say what share of the MACs the sites hold that cannot be rewritten."""
    fixed = {item.site for item in found.left_alone}
    held = sum(layer.macs for layer in found.layers if layer.name in fixed)
    if not held:
        return ""
    worst = max((layer for layer in found.layers if layer.name in fixed), key=lambda x: x.macs)
    reason = next(item.reason for item in found.left_alone if item.site == worst.name)
    share = format_percent(held / max(found.before.macs, 1))
    return (
        f"Layers that cannot be rewritten hold {share} of the MACs, the largest "
        f"{worst.name!r} ({reason}). "
    )
