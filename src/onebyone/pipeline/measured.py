"""Measurements of a run's networks."""

from __future__ import annotations

from torch import nn

from onebyone.core.records import Disagreement, OutputPictures
from onebyone.data import Data
from onebyone.evaluation.compare import TRAIN_EXAMPLES, measure, side_by_side
from onebyone.evaluation.disagreements import count_confusions, find_disagreements
from onebyone.evaluation.pictures.outputs import picture_outputs
from onebyone.evaluation.scores import evaluate, score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.pipeline.run import Run
from onebyone.runtimes.files import FileNetwork


def measure_one_shot(run: Run, original: nn.Module, small: nn.Module, data: Data) -> None:
    """Record the scores of the original and of the rewritten network before fine-tuning."""
    both = score([original, small], data.test, progress=run.tell, **run.scoring)
    run.keep(
        one_shot=measure(
            small,
            run.example,
            test=both.each[1].summary() if both.labelled else None,
            calibration_error=both.each[1].calibration_error(),
        ),
        one_shot_difference=paired_difference(*both.each) if both.labelled else None,
        one_shot_agreement=agreement(*both.each),
        one_shot_divergence=both.divergences[1],
    )


def compare_both(
    run: Run, original: nn.Module, small: nn.Module, data: Data, file: FileNetwork | None = None
) -> None:
    """Record the comparison of the original with the result, and where they differ.

    Args:
        run: Its record is added to.
        original: Not modified.
        small: The rewritten network. Not modified.
        data: What both are scored on.
        file: The file that is deployed in place of ``small``: the figures are its own.
    """
    deployed = small if file is None else file
    both = side_by_side(
        original,
        deployed,
        data=data,
        example=run.example,
        runtimes=run.settings.runtimes,
        num_threads=run.settings.num_threads,
        progress=run.tell,
        **run.scoring,
    )
    # Times of layers in float32 say nothing of a file in int8.
    after = run.profile(small, timed=file is None)
    if run.folder is not None:
        run.folder.save_network(small)
    differ: tuple[Disagreement, ...] = ()
    confusion = None
    pictures: OutputPictures | None = None
    if both.test is not None:
        confusion = count_confusions(data.test, both.test)
        differ = find_disagreements(original, deployed, data.test, both.test, device=run.device)
        pictures = picture_outputs(
            original, deployed, data.test, both.test, classes=data.classes, device=run.device
        )
    run.keep(
        before=both.record.before,
        after=both.record.after,
        comparison=both.record,
        profile_after=after,
        disagreements=differ,
        confusion=confusion,
        pictures=pictures,
    )


def measure_alone(run: Run, network: nn.Module, data: Data) -> None:
    """Record the measurements of a single network."""
    profiled = run.profile(network)
    together = score([network], data.test, progress=run.tell, **run.scoring)
    test, labelled = together.each[0], together.labelled
    sample = data.train.take(TRAIN_EXAMPLES, 0)
    measured = measure(
        network,
        run.example,
        timings=dict(profiled.latency),
        test=test.summary() if labelled else None,
        train=evaluate(network, sample, **run.scoring) if labelled else None,
        calibration_error=test.calibration_error(),
    )
    run.keep(profile_after=profiled, after=measured)
