"""A plan for a runtime: layers' times add up to a guess, which the built network's time mends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from onebyone.core.errors import BudgetError, OneByOneError, OptionError
from onebyone.core.records import (
    Budget,
    Deployment,
    LeftAlone,
    Option,
    Plan,
    PlannedLatency,
    PlanPrecision,
    Quantity,
)
from onebyone.core.tensor_trees import (
    Inputs,
    to_device,
)
from onebyone.core.units import format_ms, format_percent
from onebyone.planning.joins import is_int8, is_own
from onebyone.planning.knapsack import least_cost
from onebyone.planning.latency.cache import Timings
from onebyone.planning.latency.correction import Worth
from onebyone.planning.latency.layer_timer import LayerTimer
from onebyone.planning.latency.mixing import Mixing
from onebyone.planning.latency.precision import AUTO, FLOAT32, INT8, preparing
from onebyone.planning.survey import Survey
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.quantizing.flow import Flow
from onebyone.rewrites import restructure
from onebyone.runtimes import Prepared, describe_machine, find_runtime

Progress = Callable[[int, int, str], None]
# Makes a plan from options and budgets, without measuring.
MakePlan = Callable[[Survey, Sequence[Budget]], Plan]

# Interleaved rounds in which a built network is compared with the original, and how often so many
# are added while the interval of the ratio is wider than this share of it.
ROUNDS = 15
MOST_TRIES = 4
WIDE = 0.03
# Of a series of rounds, at most.
SECONDS = 5.0
# The exporter that is quick for layers serves for networks of a front if the original takes the
# same time by it, within this share.
ALIKE = 0.03
# A prediction is good enough when the measurement is no farther from it than this share.
AGREEMENT = 0.03
# A budget is met if the measured time is above it by no more than this share: what is noise.
OVER = 0.01
# Networks that are built and measured, at most.
MOST_BUILDS = 8
# Where a latency seems out of reach, networks are measured that give up these shares of all that
# could be saved: what they come to corrects the times that say so.
AIMS = (0.5, 0.1, 0.0)
# A layer contradicts the whole network if it takes longer by more than this share.
LONGER = 0.1
# Plans that are made until all the times they rest on are their options' own, at most.
MOST_PLANS = 20


@dataclass(frozen=True)
class _Attempt:
    plan: Plan
    latency: PlannedLatency

    @property
    def agrees(self) -> bool:
        return self.latency.error <= AGREEMENT

    def meets(self, limit: float | None) -> bool:
        """Whether the time is within a limit; what was planned for is the original's own time."""
        before = self.plan.before.ms or 0.0
        return limit is None or before / self.latency.ratio.value <= limit * (1 + OVER)


@dataclass(frozen=True)
class _Builder:
    """A way to make networks ready to run, and the original made ready by it.

    Attributes:
        prepare: In the precision that networks are deployed in.
        original: The original in float32.
        alone: The original in that precision; ``None`` where that is float32.
    """

    prepare: Callable[[nn.Module, Any], Prepared]
    original: Prepared
    alone: Prepared | None = None

    @property
    def unchanged(self) -> Prepared:
        """The original as it is deployed."""
        return self.original if self.alone is None else self.alone


class Deployed:
    """Plans from one survey for one runtime.

    Args:
        model: The network. Not modified.
        found: What could be done to it.
        example: Inputs with the deployment's batch.
        deployment: Where it is to run.
        timings: What was timed earlier.
        flow: Between the network's layers, where precisions are mixed.
        progress: Told of the sites timed and networks built.

    Attributes:
        timed: All options that the runtime can run, with the times of the layers by themselves.
        options: Those of them that are faster.
        notes: What came out otherwise than the times of layers say.
        worth: What the milliseconds that they save come to in the whole network, as far as known.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Survey,
        example: Inputs,
        deployment: Deployment,
        timings: Timings,
        *,
        flow: Flow | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.found = found
        self.example = to_device(example, deployment.device)
        self.deployment = deployment
        self.progress = progress
        self._timings = timings
        self._mixing = None if flow is None else Mixing(found.network, flow, deployment)
        self._timer = self._timer_with(timings)
        with threads(deployment.threads):
            self._own = self._own_builder()
        self._time_originals()
        self._quick: _Builder | None = None
        self.notes: tuple[str, ...] = ()
        self._take(self._timer.survey(found.options, progress))
        self._check_against_whole()

    def _time_originals(self) -> None:
        """Time the original in float32, and as it is deployed: options save of that time."""
        contenders = {"before": self._own.original}
        if self._own.alone is not None:
            contenders["alone"] = self._own.alone
        with threads(self.deployment.threads):
            samples = interleave(
                contenders, rounds=ROUNDS, device=self.deployment.device, seconds=SECONDS
            )
        self._before_ms = float(np.median(samples.ms["before"]))
        unchanged = "alone" if self.deployment.precision == INT8 else "before"
        self._unchanged_ms = float(np.median(samples.ms[unchanged]))
        self.worth = Worth(self._unchanged_ms)

    def _check_against_whole(self) -> None:
        """Measure again where a layer seems to take longer than the whole network does."""
        if not self._longer_than_whole():
            return
        self._time_originals()
        sites = self._longer_than_whole()
        self._timer = self._fresh_timer()
        again = self._timer.survey([o for o in self.found.options if o.site in sites])
        timed = {_identity(option): option for option in again}
        self._take([timed.get(_identity(option), option) for option in self.timed])
        longer = self._longer_than_whole()
        for site, ms in longer.items():
            said = (
                f"The layer {site or '(root)'} takes {format_ms(ms)} between two neighbors, "
                f"measured twice, but the whole network takes {format_ms(self._unchanged_ms)}: "
                f"there it is computed otherwise. Its times count in proportion."
            )
            self.notes = (*self.notes, said)
            if len(longer) > 1:
                # No single layer's fault: the times stay comparable with each other, and what
                # they are worth in the whole network is learned from those that are built.
                continue
            share = self._unchanged_ms / ms
            self._take([_scaled(o, share) if o.site == site else o for o in self.timed])

    def _longer_than_whole(self) -> dict[str, float]:
        """Return the sites that take longer than the whole network, with their milliseconds."""
        first: dict[str, Option] = {}
        for option in self.timed:
            first.setdefault(option.site, option)
        most = self._unchanged_ms * (1 + LONGER)
        found = {}
        for site, option in first.items():
            ms = option.before.ms or 0.0
            if ms > most and (own := ms - self._timer.neighbours_ms(option)) > most:
                found[site] = own
        return found

    def _fresh_timer(self) -> LayerTimer:
        """Return a timer that knows no times, and replaces those that are kept on disk."""
        return self._timer_with(self._timings.forgotten())

    def _timer_with(self, timings: Timings) -> LayerTimer:
        found = self.found
        return LayerTimer(
            found.network,
            {layer.name: layer for layer in found.layers},
            self.deployment,
            timings,
            head=found.head,
            leaving_ms=None if self._mixing is None else self._mixing.leaving_ms,
            groups=found.groups,
        )

    def survey(self, budgets: Sequence[Budget] = ()) -> Survey:
        """Return the options that are faster, with times as they count in the whole network.

        Args:
            budgets: What is planned for: a millisecond is worth another share where more are saved.
        """
        found, share = self._with_originals_times(), self._share_for(budgets)
        options = [_shared(option, share) for option in self.options]
        exact = None if found.exact is None else _untimed(found.exact)
        kept = {option.site for option in options}
        runtime = self.deployment.runtime
        slower = {option.site for option in found.options} - kept
        why = [
            LeftAlone(
                site=site,
                reason=self._timer.failures.get(
                    site, f"no option is shown to be faster in {runtime}"
                ),
            )
            for site in dict.fromkeys(option.site for option in found.options)
            if site in slower
        ]
        return replace(
            found,
            options=tuple(options),
            left_alone=(*found.left_alone, *why),
            exact=exact,
        )

    def _with_originals_times(self) -> Survey:
        """Return what could be done, with the original's times in float32 and as it is deployed."""
        before, unchanged = replace(self.found.before, ms=self._before_ms), None
        if self.deployment.precision == INT8:
            unchanged = replace(self.found.base, ms=self._unchanged_ms)
        return replace(self.found, before=before, unchanged=unchanged)

    def predict(self, budgets: Sequence[Budget], make: MakePlan, *, timed: bool = True) -> Plan:
        """Plan by predicted times: chosen options are timed, but no network is built.

        Args:
            budgets: Upper bounds.
            make: Chooses among the options of a survey.
            timed: Whether it is; else options keep the times that others of their form foretell.

        Raises:
            BudgetError: If a budget cannot be reached; says what is reachable.
        """
        if not timed:
            return self.foreseen(make(self.survey(budgets), budgets))
        return self._with_own_times(lambda: budgets, make)

    def least(self, quantity: Quantity, make: MakePlan) -> Plan:
        """Plan for the least of a quantity that the options reach, as far as is known.

        Args:
            quantity: What there is to be least of; not memory, which does not add up.
            make: Chooses among the options of a survey.
        """
        return self._with_own_times(lambda: self._least_budget(quantity), make)

    def plan(self, budgets: Sequence[Budget], make: MakePlan, *, closest: bool = False) -> Plan:
        """Plan, build, measure, and plan again until the prediction holds and the budget is met.

        Where the times of layers say that a latency is out of reach, networks that are planned
        without them have the last word: one that is faster than what was planned by them shows
        that they are wrong, and they are measured again.

        Args:
            budgets: Upper bounds.
            make: Chooses among the options of a survey.
            closest: Return the plan of the fastest network that was measured where none meets the
                latency.

        Raises:
            BudgetError: If the latency cannot be reached; says what was measured.
        """
        limit = _limit_of(budgets)
        if limit is not None and limit >= self._before_ms:
            limit = None  # met as it is, whatever noise says
        attempts = self._attempts(budgets, make, limit)
        if limit is not None and not any(each.meets(limit) for each in attempts):
            attempts = self._contradicted(budgets, make, limit, attempts)
        good = [each for each in attempts if each.meets(limit)]
        if not good:
            if not closest or not attempts:
                raise self._unreachable(budgets, attempts, make)
            best = max(attempts, key=lambda each: each.latency.ratio.value)
        else:
            best = min(good, key=lambda each: (not each.agrees, each.plan.harm or 0.0))
        if not best.agrees:
            # Its prediction is from before what was learned since.
            made = self.foreseen(best.plan)
            again = _Attempt(made, self._built(made, len(attempts)))
            best = again if again.agrees and (again.meets(limit) or not good) else best
        notes = (*best.plan.notes, *self.notes)
        return replace(best.plan, budgets=tuple(budgets), latency=best.latency, notes=notes)

    def _attempts(
        self, budgets: Sequence[Budget], make: MakePlan, limit: float | None
    ) -> list[_Attempt]:
        """Build networks until one is as predicted and meets the limit, or all was tried."""
        attempts: list[_Attempt] = []
        aims = list(AIMS)
        for _ in range(MOST_BUILDS):
            try:
                made = self.predict(budgets, make)
            except BudgetError:
                if limit is None or not aims:
                    break
                # The times of layers alone say no: what do they come to in the whole network?
                easier = self._easier_plan(budgets, aims.pop(0), make)
                if easier is None:
                    break  # another budget is what cannot be met
                made = easier
            attempts.append(self._attempt(made, len(attempts)))
            if attempts[-1].agrees and attempts[-1].meets(limit):
                break
            if not made.choices:
                break
        return attempts

    def _attempt(self, made: Plan, corrections: int) -> _Attempt:
        """Build a plan's network, measure it and learn from it."""
        attempt = _Attempt(made, self._built(made, corrections))
        self._learn(made, attempt.latency)
        return attempt

    def _contradicted(
        self,
        budgets: Sequence[Budget],
        make: MakePlan,
        limit: float,
        attempts: Sequence[_Attempt],
    ) -> list[_Attempt]:
        """Return more attempts, where networks that no layer's time had a part in are faster."""
        others: list[_Attempt] = []
        for share in (min(limit / self._unchanged_ms, 1.0), 0.0):
            made = self._by_macs(budgets, share, make)
            if made is not None and made.choices:
                others.append(self._attempt(made, len(attempts) + len(others)))
        best = max((each.latency.ratio.high for each in attempts), default=1.0)
        fastest = max(others, key=lambda each: each.latency.ratio.low, default=None)
        if fastest is None or fastest.latency.ratio.low <= best:
            return [*attempts, *others]
        said = (
            f"A network planned for {format_percent(fastest.plan.after.macs / self._macs)} of the "
            f"MACs, without the layers' times, was measured to be {fastest.latency.ratio} than the "
            f"original, faster than those that were planned by these times. They were measured "
            f"again."
        )
        self.notes = (*self.notes, said)
        self._time_again()
        return [*attempts, *others, *self._attempts(budgets, make, limit)]

    @property
    def _macs(self) -> int:
        return max(self.found.before.macs, 1)

    def _by_macs(self, budgets: Sequence[Budget], share: float, make: MakePlan) -> Plan | None:
        """Return a plan for a share of the MACs, or for the least that can be reached of them."""
        found = replace(
            self._with_originals_times(),
            options=tuple(self.timed),
            exact=None if self.found.exact is None else _untimed(self.found.exact),
        )
        counted = [budget for budget in budgets if budget.quantity != "latency"]
        least = least_cost(found.options, "macs", found.start, forced=found.forced).macs
        macs = max(least, int(share * self._macs))
        bound = Budget(quantity="macs", limit=macs, asked=f"macs={macs}")
        given = [budget for budget in counted if budget.quantity == "macs"]
        rest = [budget for budget in counted if budget.quantity != "macs"]
        macs_bound = min([bound, *given], key=lambda budget: budget.limit)
        try:
            return self.foreseen(make(found, [macs_bound, *rest]))
        except BudgetError:
            return None  # another budget is what cannot be met

    def _time_again(self) -> None:
        """Time all layers afresh, and forget what was learned by their earlier times."""
        self._timer = self._fresh_timer()
        self._take(self._timer.survey(self.found.options, self.progress))
        self.worth = Worth(self._unchanged_ms)

    def _take(self, timed: Sequence[Option]) -> None:
        joins = () if self._mixing is None else self._mixing.joins
        self.timed = [*(option for option in timed if not is_own(option)), *joins]
        # An int8 layer may be slower between float32 neighbors, and faster between int8 ones.
        self.options = [o for o in self.timed if is_own(o) or is_int8(o) or _is_faster(o)]

    def _easier_plan(self, budgets: Sequence[Budget], aim: float, make: MakePlan) -> Plan | None:
        try:
            return self.predict(self._easier(budgets, aim), make)
        except BudgetError:
            return None

    def measured(self, made: Plan) -> Plan:
        """Return a plan with its network's time, from which later predictions learn.

        For many networks: they are exported as quickly as does not change the original's time.
        """
        latency = self._built(made, len(self.worth.measured), self._builder())
        self._learn(made, latency)
        return replace(made, latency=latency)

    def foreseen(self, made: Plan) -> Plan:
        """Return a plan with the times that are predicted for its network by what is known now."""
        alone = self._alone_ms(made)
        share = self.worth.share(alone)
        whole = {_identity(option): _shared(option, share) for option in self._chosen(made)}
        return replace(
            made,
            choices=tuple(whole.get(_identity(option), option) for option in made.choices),
            after=replace(made.after, ms=self._unchanged_ms - self.worth.saved(alone)),
        )

    def measure(self, made: Plan) -> Plan:
        """Return a plan with the time of its network, built and measured."""
        return replace(made, latency=self._built(made, 0))

    def retimed(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, timed once more: what no choice was made by."""
        timer = self._timer_with(Timings(self.deployment, None))
        chosen = [option for option in self._chosen(made) if not is_own(option)]
        return timer.exactly([replace(option, gain=None) for option in chosen])

    def _with_own_times(self, budgets: Callable[[], Sequence[Budget]], make: MakePlan) -> Plan:
        """Plan until all that is chosen was timed itself and is faster."""
        for _ in range(MOST_PLANS):
            bounds = budgets()
            made = make(self.survey(bounds), bounds)
            chosen = self._chosen(made)
            guessed = [o for o in chosen if o.gain is None and not is_own(o)]
            if not guessed:
                break
            exact = {_identity(option): option for option in self._timer.exactly(guessed)}
            self._take([exact.get(_identity(option), option) for option in self.timed])
        return self.foreseen(made)

    def _chosen(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, with the times of the layers by themselves."""
        chosen = {_identity(option) for option in made.choices}
        return [option for option in self.timed if _identity(option) in chosen]

    def _alone_ms(self, made: Plan) -> float:
        return sum(_saved_ms(option) for option in self._chosen(made))

    def _share_for(self, budgets: Sequence[Budget]) -> float:
        """Return the share by which exactly the saving that a latency asks for is enough."""
        limit = _limit_of(budgets)
        if limit is None or limit >= self._unchanged_ms:
            return self.worth.share(0.0)
        return self.worth.share(self.worth.alone(self._unchanged_ms - limit))

    def _least_budget(self, quantity: Quantity) -> tuple[Budget, ...]:
        found = self.survey()
        if quantity != "latency":
            least = least_cost(found.options, quantity, found.start, forced=found.forced)
            limit = least.amount(quantity)
        else:
            # Of milliseconds the sum may differ in its last digit.
            limit = self._unchanged_ms - self.worth.saved((1 - 1e-9) * self._most_saved())
        return (Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}"),)

    def _most_saved(self) -> float:
        """Return the milliseconds that options save together by themselves, at most."""
        found = self.survey()
        left = least_cost(self.options, "latency", found.start, forced=found.forced)
        return self._unchanged_ms - left.amount("latency")

    def _builder(self) -> _Builder:
        """Return the quickest way to build networks by which the original takes its own time."""
        if self._quick is None:
            self._quick = self._found_builder()
        return self._quick

    def _found_builder(self) -> _Builder:
        ways, own = preparing(self.deployment), self._own
        if not ways.is_quick or not isinstance(self.example, Tensor):
            return own
        with threads(self.deployment.threads):
            try:
                quick = ways.layers(self.model, self.example)
            except OneByOneError:
                return own
            samples = self._interleaved({"before": own.unchanged, "after": quick})
        if abs(samples.ratio("before", "after").value - 1) > ALIKE:
            return own
        if own.alone is None:
            return _Builder(ways.layers, quick)
        return _Builder(ways.layers, own.original, quick)

    def _own_builder(self) -> _Builder:
        """Return the runtime's own way, as the network is deployed."""
        runtime, whole = find_runtime(self.deployment.runtime), preparing(self.deployment).whole
        original = runtime.on(self.model, self.example)
        if self.deployment.precision == FLOAT32:
            return _Builder(whole, original)
        return _Builder(whole, original, whole(self.model, self.example))

    def _built(
        self, made: Plan, corrections: int, builder: _Builder | None = None
    ) -> PlannedLatency:
        """Build a plan's network and measure it in turns with the original."""
        if self.progress is not None:
            self.progress(
                min(corrections, MOST_BUILDS),
                MOST_BUILDS,
                f"{self.deployment.runtime}: whole network",
            )
        builder = builder or self._own
        contenders = {"before": builder.original}
        if builder.alone is not None:
            contenders["alone"] = builder.alone
        with threads(self.deployment.threads):
            if self._mixing is None:
                after = builder.prepare(restructure(self.model, made), self.example)
            else:
                after = self._mixing.prepare(self.translated(made), self.model, self.example)
            samples = self._interleaved({**contenders, "after": after})
            return self._latency(samples, made, corrections)

    def translated(self, made: Plan) -> Plan:
        """Return a plan whose choices are rewrites alone; precisions are apart."""
        if self._mixing is None or made.precision != AUTO:
            return made
        return self._mixing.translated(made)

    def _interleaved(self, contenders: Mapping[str, Prepared]) -> Samples:
        """Time networks in turns until the ratio of the first to the last is known well enough."""

        def series() -> Samples:
            return interleave(
                contenders,
                rounds=ROUNDS,
                device=self.deployment.device,
                seconds=SECONDS,
            )

        samples = series()
        for _ in range(MOST_TRIES - 1):
            ratio = samples.ratio("before", "after")
            if ratio.high - ratio.low <= WIDE * ratio.value:
                break
            samples = samples.followed_by(series())
        return samples

    def _latency(self, samples: Samples, made: Plan, corrections: int) -> PlannedLatency:
        runtime, batch = self.deployment.runtime, self.deployment.batch
        before = samples.timing("before", runtime=runtime, batch=batch)
        after = samples.timing("after", runtime=runtime, batch=batch)
        ratio = samples.ratio("before", "after", looks=MOST_TRIES)
        # The original took another time in these rounds than in those that the plan rests on.
        assert made.after.ms is not None
        predicted = made.after.ms * before.median_ms / self._before_ms
        alone = alone_ratio = None
        if "alone" in samples.ms:
            alone = samples.timing("alone", runtime=runtime, batch=batch)
            alone_ratio = samples.ratio("alone", "after", looks=MOST_TRIES)
            if self.deployment.precision == INT8:
                predicted = made.after.ms * alone.median_ms / self._unchanged_ms
        return PlannedLatency(
            deployment=self.deployment,
            machine=describe_machine(self.deployment.device),
            before=before,
            after=after,
            ratio=ratio,
            predicted_ms=predicted,
            corrections=corrections,
            share=self.worth.share(self._alone_ms(made)),
            alone=alone,
            alone_ratio=alone_ratio,
        )

    def _learn(self, made: Plan, latency: PlannedLatency) -> None:
        """Take over what the milliseconds saved in layers came to in the whole network."""
        in_int8 = self.deployment.precision == INT8 and latency.alone_ratio is not None
        ratio = latency.alone_ratio if in_int8 and latency.alone_ratio else latency.ratio
        self.worth = self.worth.learned(self._alone_ms(made), ratio)

    def _easier(self, budgets: Sequence[Budget], aim: float) -> tuple[Budget, ...]:
        """Return the budgets with a latency a share above the least that the options reach."""
        aimed = self._unchanged_ms - self.worth.saved((1 - aim) * self._most_saved())
        return tuple(
            replace(budget, limit=aimed) if budget.quantity == "latency" else budget
            for budget in budgets
        )

    def _unreachable(
        self, budgets: Sequence[Budget], attempts: Sequence[_Attempt], make: MakePlan
    ) -> BudgetError:
        if not attempts:
            try:
                make(self.survey(budgets), budgets)
            except BudgetError as error:
                return error
        asked = ", ".join(budget.asked for budget in budgets)
        if not self.options:
            alone = ""
            if self._own.alone is not None:
                left = format_percent(self._unchanged_ms / self._before_ms)
                alone = f"int8 alone takes {left} of float32's time, and "
            return BudgetError(
                f"The budget {asked} cannot be met in {self.deployment}: {alone}no rewrite of any "
                f"layer is shown to be faster there. Choose another runtime (`onebyone bench` "
                f"compares them), or bound `macs` or `params` with no runtime."
            )
        best = max(attempts, key=lambda each: each.latency.ratio.value).latency
        share = 1 / best.ratio.value
        percent = min(math.ceil(100 * share) + 1, 100)
        reachable = [
            replace(budget, limit=percent / 100 * self._before_ms)
            if budget.quantity == "latency"
            else budget
            for budget in budgets
        ]
        return BudgetError(
            f"The budget {asked} cannot be met in {self.deployment}: of {len(attempts)} networks "
            f"that were built and measured, the fastest takes {format_ms(best.after.median_ms)} "
            f"({format_percent(share)} of {format_ms(best.before.median_ms)}). Raise it to "
            f"`latency={percent}%` or more, take the nearest with `--closest` (`closest=True`), or "
            f"choose another runtime: `onebyone bench` compares them."
            f"{''.join(f' {note}' for note in self.notes)}",
            nearest=reachable,
        )


def is_shown_faster(plan: Plan) -> bool:
    """Whether a plan's network was measured and shown to be faster than the original."""
    return plan.latency is not None and plan.latency.ratio.verdict == "faster"


def deployment_of(
    runtime: str,
    *,
    device: str,
    batch: int,
    num_threads: int | None,
    precision: PlanPrecision = "float32",
) -> Deployment:
    """Return where a plan's network is to run: on the CPU if the runtime knows no other device.

    Raises:
        UnknownNameError: If there is no such runtime.
        MissingExtraError: If it is not installed.
        OptionError: If the batch is not positive, or the runtime does not run on the device.
    """
    found = find_runtime(runtime)
    device = found.device_for(device)
    if batch < 1:
        raise OptionError(f"`batch` must be 1 or more, got {batch}.")
    if device.partition(":")[0] not in found.devices:
        raise OptionError(
            f"The runtime {runtime!r} runs on {' and '.join(found.devices)}, got device {device!r}."
        )
    with threads(num_threads) as count:
        return Deployment(
            runtime=runtime,
            device=device,
            batch=batch,
            threads=count,
            version=found.version,
            precision=precision,
        )


def _limit_of(budgets: Sequence[Budget]) -> float | None:
    return next((budget.limit for budget in budgets if budget.quantity == "latency"), None)


def _is_faster(option: Option) -> bool:
    """Whether an option is shown to be faster, or predicted to be where it was not timed yet."""
    return _saved_ms(option) > 0 if option.gain is None else option.gain.verdict == "faster"


def _saved_ms(option: Option) -> float:
    return option.saved.ms or 0.0


def _shared(option: Option, share: float) -> Option:
    """Return an option whose saving is that of the whole network."""
    before = option.before.ms or 0.0
    return replace(option, after=replace(option.after, ms=before - share * _saved_ms(option)))


def _scaled(option: Option, share: float) -> Option:
    """Return an option whose site takes that share of its time, as it is and rewritten."""
    before, after = option.before, option.after
    return replace(
        option,
        before=replace(before, ms=share * (before.ms or 0.0)),
        after=replace(after, ms=share * (after.ms or 0.0)),
    )


def _untimed(option: Option) -> Option:
    """Return an option that is taken to save no time; the whole network's time includes it."""
    return replace(
        option, before=replace(option.before, ms=0.0), after=replace(option.after, ms=0.0)
    )


def _identity(option: Option) -> tuple[str, ...]:
    steps = ((step.rewrite, str(sorted(step.settings.items()))) for step in option.steps)
    return option.site, *(text for step in steps for text in step)
