"""A plan for a runtime: layers' times add up to a guess, which the built network's time mends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from onebyone.errors import BudgetError, OneByOneError, OptionError
from onebyone.planning.options import Survey
from onebyone.planning.solve import least_cost
from onebyone.planning.timing import LayerTimer
from onebyone.planning.timings import Timings
from onebyone.planning.worth import Worth
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.records import (
    Budget,
    Deployment,
    LeftAlone,
    Option,
    Plan,
    PlannedLatency,
    Quantity,
)
from onebyone.rewrites import restructure
from onebyone.runtimes import Prepared, describe_machine, find_runtime
from onebyone.units import format_ms, format_percent

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
AIMS = (0.5, 0.1)
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
    """A way to make networks ready to run, and the original made ready by it."""

    prepare: Callable[[nn.Module, Tensor], Prepared]
    original: Prepared


class Deployed:
    """Plans from one survey for one runtime.

    Args:
        model: The network. Not modified.
        found: What could be done to it.
        example: An input with the deployment's batch.
        deployment: Where it is to run.
        timings: What was timed earlier.
        progress: Told of the sites timed and networks built.

    Attributes:
        options: Those that are faster, with the times of the layers by themselves.
        worth: What the milliseconds that they save come to in the whole network, as far as known.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Survey,
        example: Tensor,
        deployment: Deployment,
        timings: Timings,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.found = found
        self.example = example.to(deployment.device)
        self.deployment = deployment
        self.progress = progress
        layers = {layer.name: layer for layer in found.layers}
        self._timer = LayerTimer(found.network, layers, deployment, timings, head=found.head)
        with threads(deployment.threads):
            self._original = self._prepared(model)
            alone = interleave(
                {"before": self._original},
                rounds=ROUNDS,
                device=deployment.device,
                seconds=SECONDS,
            )
        self._before_ms = float(np.median(alone.ms["before"]))
        self.worth = Worth(self._before_ms)
        self._quick: _Builder | None = None
        timed = self._timer.survey(found.options, progress)
        self.options = [option for option in timed if _is_faster(option)]

    def survey(self, budgets: Sequence[Budget] = ()) -> Survey:
        """Return the options that are faster, with times as they count in the whole network.

        Args:
            budgets: What is planned for: a millisecond is worth another share where more are saved.
        """
        found, share = self.found, self._share_for(budgets)
        options = [_shared(option, share) for option in self.options]
        exact = None if found.exact is None else _untimed(found.exact)
        before = replace(found.before, ms=self._before_ms)
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
            before=before,
            exact=exact,
        )

    def predict(self, budgets: Sequence[Budget], make: MakePlan, *, timed: bool = True) -> Plan:
        """Plan by the times that are known; nothing is built, but what is chosen is timed.

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

    def plan(self, budgets: Sequence[Budget], make: MakePlan) -> Plan:
        """Plan, build, measure, and plan again until the prediction holds and the budget is met.

        Args:
            budgets: Upper bounds.
            make: Chooses among the options of a survey.

        Raises:
            BudgetError: If the latency cannot be reached; says what was measured.
        """
        limit = _limit_of(budgets)
        if limit is not None and limit >= self._before_ms:
            limit = None  # met as it is, whatever noise says
        attempts: list[_Attempt] = []
        aims = list(AIMS)
        for _ in range(MOST_BUILDS):
            try:
                made = self.predict(budgets, make)
            except BudgetError:
                if limit is None or not aims:
                    break
                # The times of layers alone say no: what do they come to in the whole network?
                easier = self._easier(budgets, aims.pop(0))
                try:
                    made = self.predict(easier, make)
                except BudgetError:
                    break  # another budget is what cannot be met
            attempt = _Attempt(made, self._built(made, len(attempts)))
            attempts.append(attempt)
            self._learn(made, attempt.latency)
            if attempt.agrees and attempt.meets(limit):
                break
            if not made.choices:
                break
        good = [each for each in attempts if each.meets(limit)]
        if not good:
            raise self._unreachable(budgets, attempts, make)
        best = min(good, key=lambda each: (not each.agrees, each.plan.harm or 0.0))
        if not best.agrees:
            # Its prediction is from before what was learned since.
            made = self.foreseen(best.plan)
            again = _Attempt(made, self._built(made, len(attempts)))
            best = again if again.agrees and again.meets(limit) else best
        return replace(best.plan, budgets=tuple(budgets), latency=best.latency)

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
            after=replace(made.after, ms=self._before_ms - self.worth.saved(alone)),
        )

    def measure(self, made: Plan) -> Plan:
        """Return a plan with the time of its network, built and measured."""
        return replace(made, latency=self._built(made, 0))

    def retimed(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, timed once more: what no choice was made by."""
        fresh = Timings(self.deployment, None)
        layers = {layer.name: layer for layer in self.found.layers}
        timer = LayerTimer(self.found.network, layers, self.deployment, fresh, head=self.found.head)
        return timer.exactly([replace(option, gain=None) for option in self._chosen(made)])

    def _with_own_times(self, budgets: Callable[[], Sequence[Budget]], make: MakePlan) -> Plan:
        """Plan until all that is chosen was timed itself and is faster."""
        for _ in range(MOST_PLANS):
            bounds = budgets()
            made = make(self.survey(bounds), bounds)
            guessed = [option for option in self._chosen(made) if option.gain is None]
            if not guessed:
                break
            exact = {_identity(option): option for option in self._timer.exactly(guessed)}
            known = [exact.get(_identity(option), option) for option in self.options]
            self.options = [option for option in known if _is_faster(option)]
        return self.foreseen(made)

    def _chosen(self, made: Plan) -> list[Option]:
        """Return the options that a plan chose, with the times of the layers by themselves."""
        chosen = {_identity(option) for option in made.choices}
        return [option for option in self.options if _identity(option) in chosen]

    def _alone_ms(self, made: Plan) -> float:
        return sum(_saved_ms(option) for option in self._chosen(made))

    def _share_for(self, budgets: Sequence[Budget]) -> float:
        """Return the share by which exactly the saving that a latency asks for is enough."""
        limit = _limit_of(budgets)
        if limit is None or limit >= self._before_ms:
            return self.worth.share(0.0)
        return self.worth.share(self.worth.alone(self._before_ms - limit))

    def _least_budget(self, quantity: Quantity) -> tuple[Budget, ...]:
        found = self.survey()
        if quantity != "latency":
            least = least_cost(found.options, quantity, found.start, forced=found.forced)
            limit = least.amount(quantity)
        else:
            alone = least_cost(self.options, quantity, found.start, forced=found.forced)
            left = alone.amount(quantity)
            # Of milliseconds the sum may differ in its last digit.
            limit = self._before_ms - self.worth.saved((1 - 1e-9) * (self._before_ms - left))
        return (Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}"),)

    def _builder(self) -> _Builder:
        """Return the quickest way to build networks by which the original takes its own time."""
        if self._quick is None:
            self._quick = self._found_builder()
        return self._quick

    def _found_builder(self) -> _Builder:
        runtime, own = find_runtime(self.deployment.runtime), self._own_builder()
        if runtime.prepare_layers is None:
            return own
        with threads(self.deployment.threads):
            try:
                quick = runtime.prepare_layers(self.model, self.example)
            except OneByOneError:
                return own
            samples = self._interleaved(self._original, quick)
        alike = abs(samples.ratio("before", "after").value - 1) <= ALIKE
        return _Builder(runtime.prepare_layers, quick) if alike else own

    def _own_builder(self) -> _Builder:
        """Return the runtime's own way, as the network is deployed."""
        return _Builder(find_runtime(self.deployment.runtime).prepare, self._original)

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
        builder = builder or self._own_builder()
        with threads(self.deployment.threads):
            after = builder.prepare(restructure(self.model, made), self.example)
            samples = self._interleaved(builder.original, after)
            return self._latency(samples, made, corrections)

    def _interleaved(self, before: Prepared, after: Prepared) -> Samples:
        """Time two networks in turns until their ratio is known well enough."""

        def series() -> Samples:
            return interleave(
                {"before": before, "after": after},
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
        ratio = samples.ratio("before", "after")
        # The original took another time in these rounds than in those that the plan rests on.
        predicted = made.after.ms
        assert predicted is not None
        return PlannedLatency(
            deployment=self.deployment,
            machine=describe_machine(self.deployment.device),
            before=before,
            after=after,
            ratio=ratio,
            predicted_ms=predicted * before.median_ms / self._before_ms,
            corrections=corrections,
            share=self.worth.share(self._alone_ms(made)),
        )

    def _learn(self, made: Plan, latency: PlannedLatency) -> None:
        """Take over what the milliseconds saved in layers came to in the whole network."""
        self.worth = self.worth.learned(self._alone_ms(made), latency.ratio)

    def _easier(self, budgets: Sequence[Budget], aim: float) -> tuple[Budget, ...]:
        """Return the budgets with a latency a share above the least that the options reach."""
        best: dict[str, float] = {}
        for option in self.options:
            best[option.site] = max(best.get(option.site, 0.0), _saved_ms(option))
        aimed = self._before_ms - self.worth.saved((1 - aim) * sum(best.values()))
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
            return BudgetError(
                f"The budget {asked} cannot be met in {self.deployment}: no rewrite of any layer "
                f"is shown to be faster there. Choose another runtime (`onebyone bench` compares "
                f"them), or bound `macs` or `params` with no runtime."
            )
        best = min(attempts, key=lambda each: each.latency.after.median_ms).latency
        share = best.after.median_ms / best.before.median_ms
        return BudgetError(
            f"The budget {asked} cannot be met in {self.deployment}: of {len(attempts)} networks "
            f"that were built and measured, the fastest takes {format_ms(best.after.median_ms)} "
            f"({format_percent(share)} of {format_ms(best.before.median_ms)}). Raise it to "
            f"`latency={min(100 * share + 1, 100):.0f}%` or more, or choose another runtime: "
            f"`onebyone bench` compares them."
        )

    def _prepared(self, network: nn.Module) -> Prepared:
        return find_runtime(self.deployment.runtime).prepare(network, self.example)


def is_shown_faster(plan: Plan) -> bool:
    """Whether a plan's network was measured and shown to be faster than the original."""
    return plan.latency is not None and plan.latency.ratio.verdict == "faster"


def deployment_of(runtime: str, *, device: str, batch: int, num_threads: int | None) -> Deployment:
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
            runtime=runtime, device=device, batch=batch, threads=count, version=found.version
        )


def _limit_of(budgets: Sequence[Budget]) -> float | None:
    return next((budget.limit for budget in budgets if budget.quantity == "latency"), None)


def _is_faster(option: Option) -> bool:
    """Whether an option is shown to be faster, or predicted to be where it was not timed yet."""
    return _saved_ms(option) > 0 if option.gain is None else option.gain.low > 1


def _saved_ms(option: Option) -> float:
    return option.saved.ms or 0.0


def _shared(option: Option, share: float) -> Option:
    """Return an option whose saving is that of the whole network."""
    before = option.before.ms or 0.0
    return replace(option, after=replace(option.after, ms=before - share * _saved_ms(option)))


def _untimed(option: Option) -> Option:
    """Return an option that is taken to save no time; the whole network's time includes it."""
    return replace(
        option, before=replace(option.before, ms=0.0), after=replace(option.after, ms=0.0)
    )


def _identity(option: Option) -> tuple[str, str, str]:
    return option.site, option.rewrite, str(sorted(option.settings.items()))
