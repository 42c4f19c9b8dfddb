"""Trains the article's networks in the same way from several seeds, and counts and times them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from onebyone.article.record import Duel, NetworkRuns, SeedRun
from onebyone.article.shelf import Settings, Shelf
from onebyone.core import randomness
from onebyone.core.errors import ModelError
from onebyone.core.records import Cost, Ratio, Timing
from onebyone.data import Data
from onebyone.evaluation.scores import evaluate
from onebyone.networks.examples import example_input
from onebyone.networks.hashing import hash_network
from onebyone.networks.zoo import classic, convolution_only, extra_nonlinearity
from onebyone.profiling.latency import interleave, threads
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes import find_runtime
from onebyone.training.train import train

MAKERS: Mapping[str, Callable[[], nn.Module]] = {
    "classic": classic,
    "convolution-only": convolution_only,
    "plain": partial(extra_nonlinearity, pointwise=False, classifier=True),
    "extra-nonlinearity": partial(extra_nonlinearity, classifier=True),
}

# The learning rates tried, for a batch of 128; scaled with the square root of other batches. Higher
# rates can end the learning of the network of convolutions alone, whose first layer has three maps.
RATES = (0.004, 0.0125, 0.04)
TRIAL_SEED = 1_000_003  # differs from the seeds that are reported
TRAIN_EXAMPLES = 10_000  # the most examples for the training accuracy
BATCHES = (1, 32)
SMALL_DATA = 4_096  # training pictures

# Called with the share of a part that is done, from 0 to 1, and a message.
Report = Callable[[float, str], None]


class Trainer:
    """Trains the article's networks on one data set, all in the same way.

    Pictures are not augmented, since over-fitting is measured.

    Args:
        data: Training pictures, validation pictures to choose learning rates, and test pictures
            for the results.
        epochs: Passes over the training data.
        shelf: The store of finished trainings.
    """

    def __init__(self, data: Data, *, epochs: int, shelf: Shelf) -> None:
        self._data, self._epochs, self._shelf = data, epochs, shelf
        small = len(data.train) < SMALL_DATA
        self._batch_size = 32 if small else 128
        # With batches this small, a second thread makes training slower.
        self._threads = 1 if small else None
        self._models: dict[str, nn.Module] = {}

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried, for this batch size."""
        return tuple(rate * math.sqrt(self._batch_size / 128) for rate in RATES)

    def trial(self, network: str, rate: float, report: Report) -> SeedRun | None:
        """Train from the trial's seed and score on validation data; ``None`` if it diverges."""
        try:
            return self._train(network, TRIAL_SEED, rate, report, scored=False)
        except ModelError:
            return None

    def run(self, network: str, seed: int, rate: float, report: Report) -> SeedRun:
        """Train from a seed, and score on training and on test data.

        Raises:
            ModelError: If the loss does not stay finite.
        """
        return self._train(network, seed, rate, report, scored=True)

    def model(self, network: str) -> nn.Module:
        """Return the network trained from seed 0, in evaluation mode."""
        return self._models[network]

    def _train(
        self, network: str, seed: int, rate: float, report: Report, *, scored: bool
    ) -> SeedRun:
        name = f"{network}-seed{seed}" if scored else f"{network}-rate{rate:.2g}"
        words = f"{network}, " + (f"seed {seed}" if scored else f"trying the rate {rate:.2g}")
        settings: Settings = {
            "network": network,
            "seed": seed,
            "learning rate": float(f"{rate:.6g}"),
            "epochs": self._epochs,
            "batch size": self._batch_size,
        }
        model = seeded(MAKERS[network], seed)
        # The page's pictures need the weights of seed 0.
        pictured = scored and seed == 0
        start = hash_network(model)
        kept = self._shelf.find(name, settings, network=start)
        if kept is not None and (not pictured or self._shelf.load(name, model)):
            self._models[network] = model.eval() if pictured else self._models.get(network, model)
            report(1.0, f"{words}: kept from before")
            return kept
        with threads(self._threads):
            trained = train(
                model,
                self._data,
                epochs=self._epochs,
                batch_size=self._batch_size,
                learning_rate=rate,
                augment=False,
                seed=seed,
                checkpoint=self._shelf.checkpoint(name),
                progress=lambda done, total, text: report(0.95 * done / total, f"{words}: {text}"),
            )
        sample = self._data.train.take(TRAIN_EXAMPLES)
        run = SeedRun(
            network=network,
            seed=seed,
            log=trained.log,
            train=evaluate(trained.model, sample) if scored else None,
            test=evaluate(trained.model, self._data.test) if scored else None,
        )
        self._shelf.keep(
            name, settings, run, network=start, model=trained.model if pictured else None
        )
        if pictured:
            self._models[network] = trained.model
        report(1.0, f"{words}: done")
        return run


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network initialized from a seed; the global random state is not changed."""
    with randomness.seeded(seed):
        return make()


def compare_networks(
    trainer: Trainer,
    before: str,
    after: str,
    *,
    seeds: int,
    rounds: int,
    part: Callable[[str], Report],
) -> Duel:
    """Choose each network's learning rate, train both from each seed, count and time them.

    Args:
        trainer: The trainer of both networks.
        before: Name in :data:`MAKERS` of the network that the article starts from.
        after: Name of the network that the article proposes.
        seeds: Number of seeds, from 0.
        rounds: Samples of each network's latency, interleaved.
        part: Begins a training of a network, and returns the function that reports its progress.

    Raises:
        ModelError: If a network diverges at every rate, or from a seed.
    """
    # One thread: these networks are too small for several.
    with threads(1):
        latency, ratios = _latency(before, after, rounds=rounds)
    runs = []
    for name in (before, after):
        found = [trainer.trial(name, rate, part(name)) for rate in trainer.rates]
        trials = tuple(trial for trial in found if trial is not None)
        if not trials:
            raise ModelError(
                f"{name} must learn at a rate of {', '.join(f'{r:.2g}' for r in trainer.rates)}, "
                f"but its loss became infinite at each. Check the data's values."
            )
        rate = best_trial(trials).log.learning_rate
        runs.append(
            NetworkRuns(
                name=name,
                cost=network_cost(name),
                latency=latency[name],
                trials=trials,
                runs=tuple(trainer.run(name, seed, rate, part(name)) for seed in range(seeds)),
            )
        )
    return Duel(before=runs[0], after=runs[1], latency_ratio=ratios)


def best_trial(trials: tuple[SeedRun, ...]) -> SeedRun:
    """Return the best trial on validation data; among equal ones that with the least loss."""
    return max(trials, key=lambda trial: (trial.validation, -trial.log.epochs[-1].loss))


def network_cost(name: str) -> Cost:
    """Return the parameters and MACs of one of the article's networks, for one picture."""
    return trace_layers(MAKERS[name](), example_input((1, 1, 28, 28))).cost


def _latency(
    before: str, after: str, *, rounds: int
) -> tuple[Mapping[str, Mapping[int, Timing]], Mapping[int, Ratio]]:
    latency: dict[str, dict[int, Timing]] = {before: {}, after: {}}
    ratios: dict[int, Ratio] = {}
    eager = find_runtime("eager")
    for batch in BATCHES:
        pictures = example_input((batch, 1, 28, 28))
        samples = interleave(
            {name: eager.prepare(MAKERS[name](), pictures) for name in (before, after)},
            rounds=rounds,
        )
        for name in (before, after):
            latency[name][batch] = samples.timing(name, runtime="eager", batch=batch)
        ratios[batch] = samples.ratio(before, after)
    return latency, ratios
