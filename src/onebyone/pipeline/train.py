"""Training as a run: its folder keeps the weights, the record and the report."""

from __future__ import annotations

from torch import nn

from onebyone.core.records import ModelSource
from onebyone.core.settings.runs import TrainRunSettings
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data
from onebyone.evaluation.scores import check_scorable
from onebyone.networks.surgery import check_finite, evaluation_copy
from onebyone.pipeline.measured import measure_alone
from onebyone.pipeline.run import Run, Shrunk, meaning_of_run, read_data, started
from onebyone.training.train import train


@ordinary_torch()
def train_loaded(
    network: nn.Module, source: ModelSource, data: object, settings: TrainRunSettings
) -> Shrunk:
    """Train a network as a run, whose folder keeps the weights, the record and the report.

    Args:
        network: Not modified.
        source: Where it came from; the run's network is rebuilt from it.
        data: As for :func:`shrink`.
        settings: Settings of the run.

    Returns:
        The trained network, and the record of the run.
    """
    check_finite(network)
    examples = read_data(data, settings)
    meaning = meaning_of_run(network, source, examples, settings, settings.task, learns=True)
    asked = evaluation_copy(network, device="cpu")
    check_scorable(asked, examples.test, metric=settings.metric, task=meaning)
    with started(network, source, examples, settings, meaning) as run:
        return _trained(run, network, examples, settings)


def _trained(run: Run, network: nn.Module, examples: Data, settings: TrainRunSettings) -> Shrunk:
    run.stages = ("train", "measure")
    with run.stage("train"):
        trained = train(
            network,
            examples,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            **run.training,
        )
        run.remark = trained.log.waiting or ""
        run.keep(training=trained.log)
        if run.folder is not None:
            run.folder.save_network(trained.model)
    with run.stage("measure"):
        run.on_main(lambda: measure_alone(run, trained.model, examples))
    run.finish()
    return Shrunk(evaluation_copy(trained.model, device="cpu"), run.record)
