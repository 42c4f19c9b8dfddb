"""Latency planning: predicts from layer times, builds, measures, and learns from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from onebyone.core.errors import BudgetError
from onebyone.core.records import (
    Budget,
    Deployment,
    LeftAlone,
    Option,
    Plan,
    PlannedLatency,
    Quantity,
)
from onebyone.core.tensor_trees import Inputs, to_device
from onebyone.core.units import format_ms, format_percent
from onebyone.planning.joins import is_int8, is_own
from onebyone.planning.knapsack import least_cost
from onebyone.planning.latency.attempt import Attempt
from onebyone.planning.latency.builds import Builder, Builds
from onebyone.planning.latency.cache import Timings
from onebyone.planning.latency.correction import Worth
from onebyone.planning.latency.layer_timer import LayerTimer
from onebyone.planning.latency.mixing import Mixing
from onebyone.planning.latency.option_times import (
    identity,
    is_faster,
    latency_limit,
    saved_ms,
    scaled,
    shared,
    untimed,
)
from onebyone.planning.latency.precision import AUTO, INT8
from onebyone.planning.latency.refusals import nothing_is_faster, too_slow
from onebyone.planning.links import among, is_link
from onebyone.planning.survey import Survey
from onebyone.profiling.latency import threads
from onebyone.quantizing.flow import Flow
from onebyone.rewrites import restructure

Progress = Callable[[int, int, str], None]
# Makes a plan from options and budgets, without measuring.
MakePlan = Callable[[Survey, Sequence[Budget]], Plan]
# Networks that are built and measured, at most.
MOST_BUILDS = 8
# Where a latency seems out of reach, networks are measured that give up these shares of all that
# could be saved: what they come to corrects the times that say so.
AIMS = (0.5, 0.1, 0.0)
# A layer contradicts the whole network if it takes longer by more than this share.
LONGER = 0.1
# Plans that are made until all the times they rest on are their options' own, at most.
MOST_PLANS = 20


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
        # Links have no time of their own: they are made anew from those of the options.
        self.found = replace(found, options=tuple(o for o in found.options if not is_link(o)))
        self.example = to_device(example, deployment.device)
        self.deployment = deployment
        self.progress = progress
        self._timings = timings
        self._mixing = None if flow is None else Mixing(flow, deployment)
        self._timer = self._timer_with(timings)
        self._builds = Builds(model, self.example, deployment)
        self.worth = Worth(self._builds.unchanged_ms)
        self.notes: tuple[str, ...] = ()
        self._take(self._timer.survey(self.found.options, progress))
        self._check_against_whole()

    def _check_against_whole(self) -> None:
        """Measure again where a layer seems to take longer than the whole network does."""
        if not self._longer_than_whole():
            return
        self._builds.time_originals()
        self.worth = Worth(self._builds.unchanged_ms)
        sites = self._longer_than_whole()
        self._timer = self._fresh_timer()
        again = self._timer.survey([o for o in self.found.options if o.site in sites])
        timed = {identity(option): option for option in again}
        self._take([timed.get(identity(option), option) for option in self.timed])
        longer, whole_ms = self._longer_than_whole(), self._builds.unchanged_ms
        for site, ms in longer.items():
            said = (
                f"The layer {site or '(root)'} takes {format_ms(ms)} between two neighbors, "
                f"measured twice, but the whole network takes {format_ms(whole_ms)}: "
                f"there it is computed otherwise. Its times count in proportion."
            )
            self.notes = (*self.notes, said)
            if len(longer) > 1:
                # No single layer's fault: the times stay comparable with each other, and what
                # they are worth in the whole network is learned from those that are built.
                continue
            share = whole_ms / ms
            self._take([scaled(o, share) if o.site == site else o for o in self.timed])

    def _longer_than_whole(self) -> dict[str, float]:
        """Return the sites that take longer than the whole network, with their milliseconds."""
        first: dict[str, Option] = {}
        for option in self.timed:
            first.setdefault(option.site, option)
        most = self._builds.unchanged_ms * (1 + LONGER)
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
        options = [shared(option, share) for option in self.options]
        exact = None if found.exact is None else untimed(found.exact)
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
        before, unchanged = replace(self.found.before, ms=self._builds.before_ms), None
        if self.deployment.precision == INT8:
            unchanged = replace(self.found.base, ms=self._builds.unchanged_ms)
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
        limit = latency_limit(budgets)
        if limit is not None and limit >= self._builds.before_ms:
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
            again = Attempt(made, self._built(made, len(attempts)))
            best = again if again.agrees and (again.meets(limit) or not good) else best
        notes = (*best.plan.notes, *self.notes)
        return replace(best.plan, budgets=tuple(budgets), latency=best.latency, notes=notes)

    def _attempts(
        self, budgets: Sequence[Budget], make: MakePlan, limit: float | None
    ) -> list[Attempt]:
        """Build networks until one is as predicted and meets the limit, or all was tried."""
        attempts: list[Attempt] = []
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

    def _attempt(self, made: Plan, corrections: int) -> Attempt:
        """Build a plan's network, measure it and learn from it."""
        attempt = Attempt(made, self._built(made, corrections))
        self._learn(made, attempt.latency)
        return attempt

    def _contradicted(
        self,
        budgets: Sequence[Budget],
        make: MakePlan,
        limit: float,
        attempts: Sequence[Attempt],
    ) -> list[Attempt]:
        """Return more attempts, where networks that no layer's time had a part in are faster."""
        others: list[Attempt] = []
        for share in (min(limit / self._builds.unchanged_ms, 1.0), 0.0):
            made = self._by_macs(budgets, share, make)
            if made is not None and made.choices:
                others.append(self._attempt(made, len(attempts) + len(others)))
        best = max((each.latency.ratio.high for each in attempts), default=1.0)
        fastest = max(others, key=lambda each: each.latency.ratio.low, default=None)
        if fastest is None or fastest.latency.ratio.low <= best:
            return [*attempts, *others]
        said = (
            f"A network planned for {format_percent(fastest.plan.after.macs / self._macs)} of the "
            f"MACs, without the layers' times, was measured to be {fastest.latency.ratio} as fast "
            f"as the original, faster than those that were planned by these times. They were "
            f"measured again."
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
            exact=None if self.found.exact is None else untimed(self.found.exact),
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
        self.worth = Worth(self._builds.unchanged_ms)

    def _take(self, timed: Sequence[Option]) -> None:
        joins = () if self._mixing is None else self._mixing.joins
        timed = [option for option in timed if not is_own(option)]
        links = self.found.links.between(timed) if self.found.links else ()
        self.timed = [*timed, *links, *joins]
        # An int8 layer may be slower between float32 neighbors, and faster between int8 ones.
        self.options = [o for o in self.timed if is_own(o) or is_int8(o) or is_faster(o)]

    def _easier_plan(self, budgets: Sequence[Budget], aim: float, make: MakePlan) -> Plan | None:
        try:
            return self.predict(self._easier(budgets, aim), make)
        except BudgetError:
            return None

    def measured(self, made: Plan) -> Plan:
        """Return a plan with its network's time, from which later predictions learn.

        For many networks: they are exported as quickly as does not change the original's time.
        """
        latency = self._built(made, len(self.worth.measured), self._builds.quickest())
        self._learn(made, latency)
        return replace(made, latency=latency)

    def foreseen(self, made: Plan) -> Plan:
        """Return a plan with the times that are predicted for its network by what is known now."""
        alone = self._alone_ms(made)
        share = self.worth.share(alone)
        chosen = [shared(option, share) for option in self._chosen(made)]
        if self.found.links:
            chosen = list(self.found.links.settled(chosen))
        whole = {identity(option): option for option in chosen}
        return replace(
            made,
            choices=tuple(whole.get(identity(option), option) for option in made.choices),
            after=replace(made.after, ms=self._builds.unchanged_ms - self.worth.saved(alone)),
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
            exact = {identity(option): option for option in self._timer.exactly(guessed)}
            self._take([exact.get(identity(option), option) for option in self.timed])
        return self.foreseen(made)

    def _chosen(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, with the times of the layers by themselves."""
        chosen = {identity(option) for option in made.choices}
        found = [option for option in self.timed if identity(option) in chosen]
        return [*found, *among(self.timed, found)]

    def _alone_ms(self, made: Plan) -> float:
        return sum(saved_ms(option) for option in self._chosen(made))

    def _share_for(self, budgets: Sequence[Budget]) -> float:
        """Return the share by which exactly the saving that a latency asks for is enough."""
        limit = latency_limit(budgets)
        if limit is None or limit >= self._builds.unchanged_ms:
            return self.worth.share(0.0)
        return self.worth.share(self.worth.alone(self._builds.unchanged_ms - limit))

    def _least_budget(self, quantity: Quantity) -> tuple[Budget, ...]:
        found = self.survey()
        if quantity != "latency":
            least = least_cost(found.options, quantity, found.start, forced=found.forced)
            limit = least.amount(quantity)
        else:
            # Of milliseconds the sum may differ in its last digit.
            limit = self._builds.unchanged_ms - self.worth.saved((1 - 1e-9) * self._most_saved())
        return (Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}"),)

    def _most_saved(self) -> float:
        """Return the milliseconds that options save together by themselves, at most."""
        found = self.survey()
        left = least_cost(self.options, "latency", found.start, forced=found.forced)
        return self._builds.unchanged_ms - left.amount("latency")

    def _built(
        self, made: Plan, corrections: int, builder: Builder | None = None
    ) -> PlannedLatency:
        """Build a plan's network and measure it in turns with the original."""
        if self.progress is not None:
            self.progress(
                min(corrections, MOST_BUILDS),
                MOST_BUILDS,
                f"{self.deployment.runtime}: whole network",
            )
        builder = builder or self._builds.own
        assert made.after.ms is not None
        with threads(self.deployment.threads):
            if self._mixing is None:
                after = builder.prepare(restructure(self.model, made), self.example)
            else:
                after = self._mixing.prepare(self.translated(made), self.model, self.example)
            return self._builds.latency(
                self._builds.timed(after, builder),
                made.after.ms,
                corrections=corrections,
                share=self.worth.share(self._alone_ms(made)),
            )

    def translated(self, made: Plan) -> Plan:
        """Return a plan whose choices are rewrites alone; precisions are apart."""
        if self._mixing is None or made.precision != AUTO:
            return made
        return self._mixing.translated(made, self.model)

    def _learn(self, made: Plan, latency: PlannedLatency) -> None:
        """Take over what the milliseconds saved in layers came to in the whole network."""
        in_int8 = self.deployment.precision == INT8 and latency.alone_ratio is not None
        ratio = latency.alone_ratio if in_int8 and latency.alone_ratio else latency.ratio
        self.worth = self.worth.learned(self._alone_ms(made), ratio)

    def _easier(self, budgets: Sequence[Budget], aim: float) -> tuple[Budget, ...]:
        """Return the budgets with a latency a share above the least that the options reach."""
        aimed = self._builds.unchanged_ms - self.worth.saved((1 - aim) * self._most_saved())
        return tuple(
            replace(budget, limit=aimed) if budget.quantity == "latency" else budget
            for budget in budgets
        )

    def _unreachable(
        self, budgets: Sequence[Budget], attempts: Sequence[Attempt], make: MakePlan
    ) -> BudgetError:
        if not attempts:
            try:
                make(self.survey(budgets), budgets)
            except BudgetError as error:
                return error
        if not self.options:
            return nothing_is_faster(budgets, self._builds)
        measured = [each.latency for each in attempts]
        return too_slow(budgets, self._builds, measured, self.notes)
