"""Learning-rate search: short trials choose the learning rate of a distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import ModelError
from onebyone.data import Split
from onebyone.networks.held import any_to_run, to_run
from onebyone.networks.outputs import comparable
from onebyone.networks.surgery import home_of, in_type_of, run
from onebyone.training.job import Trained

DISTILL_RATE = 1e-3
# Rates that a distillation tries, as multiples of `DISTILL_RATE`. The best rate cannot be computed
# beforehand: it is low for a network close to its teacher, high for one with a new head.
TRIED = (1, 4, 16)
# If every rate increases the divergence of a near network, the noise of batch statistics outweighs
# what there is to learn: these rates are tried with frozen batch-norm statistics.
TRIED_NEAR = (1 / 4, 1)
# The mean divergence below which a network counts as near its teacher. Short trials favor low
# rates, so a far network gets longer ones. Repeated trials differ by a few percent, so the lowest
# rate within a factor `ALIKE` of the best is used.
NEAR, ALIKE = 0.05, 1.04
# In a training on labels alone, high rates are worse in a short trial but better at the end. The
# same holds for a far network that every trial leads farther away, such as an averaging head. Both
# use the highest rate whose divergence is at most this many times the least.
BEHIND = 1.5
TRIAL_STEPS, TRIAL_STEPS_FAR = 100, 300
TRIAL_SHARE = 0.07  # of the examples of the whole training, for each rate
TRIAL_EXAMPLES = 1000  # on which rates are judged
FEWEST_TRIAL_STEPS = 15


def further_ways(
    *, keep_statistics: bool | None, label_weight: float, has_statistics: bool
) -> list[tuple[float, bool]]:
    """Return what to try if every other rate leads away from a near teacher."""
    if keep_statistics is not None or label_weight:  # labels may justify a larger divergence
        return []
    # Without batch norms there is nothing to freeze: skip rates that were tried already.
    rates = [rate for rate in TRIED_NEAR if has_statistics or rate not in TRIED]
    return [(rate, has_statistics) for rate in rates]


def tried_rate(
    again: Callable[..., Trained],
    train: Split,
    measured: Callable[[Sequence[nn.Module]], list[float]],
    *,
    at_start: float,
    epochs: int,
    batch: int,
    seed: int,
    ways: Sequence[tuple[float, bool]],
    further: Sequence[tuple[float, bool]],
    guided: bool,
) -> tuple[float | None, bool, str]:
    """Return the settings that come nearest to the teacher in short trials.

    Args:
        again: Distils a fresh copy of the student.
        train: The training data.
        measured: Returns each network's divergence from the teacher.
        at_start: The student's divergence before the distillation.
        epochs: Epochs of the training that follows.
        batch: Batch size.
        seed: Random seed.
        ways: What to try, in the order of rising rates: a multiple of ``DISTILL_RATE``, and whether
            batch norms keep their statistics.
        further: What to try as well if all of these lead away from a near teacher.
        guided: Whether the teacher has a share of the loss.

    Returns:
        The rate, whether batch norms keep their statistics, and a description for the log.
    """
    total = len(train)
    affordable = TRIAL_SHARE * epochs * total
    if affordable < FEWEST_TRIAL_STEPS * batch:
        return None, ways[0][1], ""
    steps = TRIAL_STEPS_FAR if at_start > NEAR else TRIAL_STEPS
    seen = int(min(steps * batch, affordable))
    passes = max(1, round(seen / total))
    part = train.take(min(seen, total), seed)
    base = DISTILL_RATE * math.sqrt(batch / 128)

    def tried(ways: Sequence[tuple[float, bool]]) -> dict[tuple[float, bool], nn.Module]:
        students = {}
        for multiple, keep in ways:
            rate = base * multiple
            try:
                made = again(part, epochs=passes, learning_rate=rate, keep_statistics=keep)
            except ModelError:  # it diverged; so would higher rates
                break
            students[rate, keep] = made.model
        return students

    students = tried(ways)
    apart = measured([*students.values()])
    if further and at_start <= NEAR and min(apart, default=math.inf) > at_start:
        others = tried(further)
        students |= others
        apart += measured([*others.values()])
    if not students:
        return None, ways[0][1], ""
    (rate, keep), which = _chosen(
        dict(zip(students, apart, strict=True)), at_start=at_start, guided=guided
    )
    return rate, keep, f"; rate the {which} of {len(students)} tried"


def _chosen(
    apart: Mapping[tuple[float, bool], float], *, at_start: float, guided: bool
) -> tuple[tuple[float, bool], str]:
    """Return the way to train by, from each way's divergence after its trial, and the reason."""
    least = min(apart.values())
    if not guided or (at_start > NEAR and least > at_start):
        stable = [way for way in apart if apart[way] <= BEHIND * least]
        return stable[-1], "highest stable one"
    enough = least * (ALIKE if at_start > NEAR else 1.0)
    return next(way for way in apart if apart[way] <= enough), "best"


def distances(
    teacher: nn.Module,
    students: Sequence[nn.Module],
    split: Split,
    *,
    meaning: Meaning,
    mine: Meaning,
    device: torch.device | str | None,
) -> list[float]:
    """Return the mean divergence of each student's outputs from their teacher's.

    Args:
        teacher: Not modified; nor are the students.
        meaning: What the teacher's outputs mean.
        mine: What the students' outputs mean.
        students: Networks to run on the same batches.
        split: The data; its labels are not used.
        device: Where to run. The default is the teacher's device.
    """
    guide = to_run(teacher, device=device)
    place = device or home_of(guide)
    each = [any_to_run(student, device=place) for student in students]
    totals = [0.0] * len(each)
    with torch.no_grad():
        for inputs, targets in split.batches(250, device=place):
            examples = len(targets)
            wanted = comparable(run(guide, in_type_of(guide, inputs)), guide, examples)
            for position, student in enumerate(each):
                given = run(student, in_type_of(student, inputs))
                outputs = comparable(given, student, examples)
                totals[position] += float(meaning.divergence(wanted, outputs, mine).sum())
    return [total / len(split) if math.isfinite(total) else math.inf for total in totals]
