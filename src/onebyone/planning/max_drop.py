"""The fastest network within a tolerated loss of the metric, chosen on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.errors import BudgetError, OptionError
from onebyone.core.metrics import AnyMetric
from onebyone.core.records import SHARES, Budget, Difference, FrontPoint, LeftAlone, Plan, Trial
from onebyone.evaluation.scores import Examples, counted_metric, score
from onebyone.evaluation.statistics import paired_difference
from onebyone.planning import Planner
from onebyone.planning.joins import is_own
from onebyone.rewrites import apply

Progress = Callable[[int, int, str], None]

# Bisection steps after the points of the front: between the last network within the tolerated loss
# and the first one beyond it.
HALVINGS = 2
# Larger networks that are tried if the chosen one, measured again, loses more than was tolerated.
MOST_STEPS_BACK = 3


@dataclass(frozen=True)
class _Search:
    """What every network on the way is made and scored with."""

    model: nn.Module
    planner: Planner
    calibration: CalibrationData
    validation: Examples
    metric: str | AnyMetric | None
    meaning: Meaning
    device: str
    progress: Progress | None

    def score(self, made: Plan) -> Difference:
        """Return what a plan's network loses on the validation data, before any fine-tuning."""
        small = apply(
            self.model,
            made,
            self.calibration,
            task=self.meaning,
            device=self.device,
            progress=self.progress,
        )
        both = score(
            [self.model, small],
            self.validation,
            metric=self.metric,
            task=self.meaning,
            device=self.device,
            progress=self.progress,
        )
        return paired_difference(*both.each)


def plan_within(
    model: nn.Module,
    planner: Planner,
    calibration: CalibrationData,
    validation: Examples,
    *,
    max_drop: float,
    metric: str | AnyMetric | None = None,
    task: TaskLike | Meaning | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Plan, tuple[Trial, ...]]:
    """Return the plan of the fastest network whose metric drops by no more than a tolerance.

    Networks along the planner's front of latency are made from the calibration data and scored
    on the validation data, by bisection: the loss is taken to grow as time falls. The loss is
    that before fine-tuning, on the validation data alone; what is reported on test data is seen
    once, afterwards, and may differ by chance.

    Args:
        model: Not modified.
        planner: Of that network, for a runtime.
        calibration: Unlabelled inputs that weights are fitted to.
        validation: Labelled examples.
        max_drop: In points for accuracy and other shares, in the metric's own unit else.
        metric: As for :func:`onebyone.evaluate`.
        task: As for :func:`onebyone.evaluate`.
        device: Where networks are fitted and scored.
        progress: Told of the steps done.

    Returns:
        The plan, without choices where no network is within the tolerance, and every trial.

    Raises:
        OptionError: If the tolerance is no number of 0 or more.
    """
    check_tolerance(max_drop)
    meaning = meaning_of(model, validation, task, device=device)
    search = _Search(model, planner, calibration, validation, metric, meaning, device, progress)
    share = counted_metric(meaning, validation, metric) in SHARES
    most = max_drop / 100 if share else max_drop
    trials: list[Trial] = []

    def is_within(budget: Budget) -> bool:
        try:
            made = planner.predict([budget])
        except BudgetError:
            return False  # what was measured since puts this time out of reach
        loss = search.score(made)
        trials.append(Trial(budget=budget, after=made.after, difference=loss, plan_harm=made.harm))
        return loss.value >= -most

    front = [point for point in planner.front("latency") if point.rewritten]
    first = _first_within(front, is_within)
    limits = _halved(front, first, is_within)
    for limit in limits[: MOST_STEPS_BACK + 1]:
        try:
            made = planner.plan([f"latency={limit.limit:.9f}ms"])
        except BudgetError:
            continue
        loss = search.score(made)
        trials.append(
            Trial(budget=limit, after=made.after, difference=loss, plan_harm=made.harm, built=True)
        )
        if (
            loss.value >= -most
            and made.latency is not None
            and made.latency.ratio.verdict == "faster"
        ):
            return made, tuple(trials)
    return _nothing(planner, most, trials), tuple(trials)


def check_tolerance(max_drop: object) -> None:
    """Check that a tolerated loss is a number of 0 or more.

    Raises:
        OptionError: If it is not.
    """
    number = isinstance(max_drop, int | float) and not isinstance(max_drop, bool)
    if not number or not 0 <= max_drop < math.inf:  # type: ignore[operator]
        raise OptionError(f"`max_drop` must be a number of 0 or more, got {max_drop!r}.")


def _first_within(front: Sequence[FrontPoint], is_within: Callable[[Budget], bool]) -> int:
    """Return the place of the fastest point within the tolerance, or the length if none is."""
    low, high = 0, len(front)
    while low < high:
        middle = (low + high) // 2
        if is_within(front[middle].budget):
            high = middle
        else:
            low = middle + 1
    return low


def _halved(
    front: Sequence[FrontPoint], first: int, is_within: Callable[[Budget], bool]
) -> list[Budget]:
    """Return budgets to take, the fastest first, refined beyond the front's own points."""
    found = [point.budget for point in front[first:]]
    if 0 < first < len(front):
        low, high = front[first - 1].budget.limit, front[first].budget.limit
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            budget = Budget(quantity="latency", limit=middle, asked=f"latency={middle:.4g}ms")
            if is_within(budget):
                high = middle
                found.insert(0, budget)
            else:
                low = middle
    return found


def _nothing(planner: Planner, most: float, trials: Sequence[Trial]) -> Plan:
    """Return a plan that leaves everything alone, and says why."""
    before = planner.survey().before
    whole = Budget(quantity="latency", limit=before.ms or 0.0, asked="latency=100%")
    try:
        made = planner.predict([whole])
    except BudgetError as error:
        raise BudgetError(
            f"No network within the tolerance can be planned, not even one as slow as the "
            f"original: {error}"
        ) from error
    least = min((-trial.difference.value for trial in trials), default=None)
    why = "no option is shown to be faster"
    if least is not None:
        why = f"the least loss of {len(trials)} networks tried was {least:.4g}, above {most:.4g}"
    sites = dict.fromkeys(option.site for option in planner.survey().options if not is_own(option))
    return replace(
        made,
        choices=(),
        after=before,
        harm=0.0,
        left_alone=(*made.left_alone, *(LeftAlone(site=site, reason=why) for site in sites)),
    )
