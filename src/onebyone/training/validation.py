"""The score of a network after each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.core.metrics import AnyMetric, find_metric
from onebyone.core.set_metrics import SetMetric
from onebyone.data import Split
from onebyone.evaluation.batch_scores import check_labels, default_metric, is_unlabelled
from onebyone.evaluation.scores import evaluate
from onebyone.evaluation.statistics import AGREEMENT
from onebyone.networks.outputs import the_one
from onebyone.networks.surgery import in_type_of, run
from onebyone.training.job import Job, forward


@dataclass(frozen=True)
class Score:
    """A metric and the data that it is computed on."""

    name: str
    split: Split
    metric: str | AnyMetric | None  # None: agreement with the teacher

    def measure(self, job: Job) -> float:
        """Return the score of the student."""
        job.student.eval()
        if self.metric is None:
            return _agreement(job, self.split)
        batch = max(250, job.options.batch_size)
        result = evaluate(
            job.student,
            self.split,
            metric=self.metric,
            task=job.meaning,
            batch_size=batch,
            device=str(job.device),
        )
        return result.value


def validation(job: Job) -> Score | None:
    """Return the score to compute after each epoch; ``None`` without data or a metric for it."""
    split, metric = job.examples.validation, job.options.metric
    if split is None:
        return None
    inputs, targets = next(iter(split.batches(min(2, len(split)), device=job.device)))
    imitates = job.teacher is not None and is_unlabelled(targets)
    if callable(metric) or (metric is not None and not imitates):
        return Score(find_metric(metric)[0], split, metric)
    chosen = default_metric(job.meaning, targets)
    if chosen is None:
        return Score(AGREEMENT, split, None) if imitates and job.meaning.decides else None
    if isinstance(chosen, SetMetric):
        return Score(chosen.name, split, chosen)
    job.student.eval()
    with torch.no_grad():
        outputs = forward(job, inputs)
    if job.meaning.decides and isinstance(outputs, Tensor):
        known = targets if split.targets is None else split.targets
        check_labels(job.meaning, (outputs,), known)
    elif not isinstance(outputs, Tensor) or targets.shape != outputs.shape:
        return None
    return Score(find_metric(chosen)[0], split, chosen)


def _agreement(job: Job, split: Split) -> float:
    """Return the share of decisions that equal the teacher's."""
    assert job.teacher is not None
    same, of = 0, 0
    decisions = job.meaning.task.measure.decisions
    with torch.no_grad():
        for inputs, _ in split.batches(250, device=job.device, channels_last=True):
            ours = the_one(run(job.student, inputs))
            theirs = the_one(run(job.teacher, in_type_of(job.teacher, inputs)))
            mine, guides = job.meaning.parts[0], (job.guides or job.meaning).parts[0]
            equal = decisions(mine.scores(ours)) == decisions(guides.scores(theirs))
            same, of = same + int(equal.sum()), of + equal.numel()
    return same / of
