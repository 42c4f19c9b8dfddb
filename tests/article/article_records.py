"""Records of made-up measurements, whose every figure the test that asks for them decides."""

from __future__ import annotations

import numpy as np

from onebyone.article.record import (
    ActivationMap,
    ArticleRecord,
    ColdCalls,
    Duel,
    LayerComparison,
    LayerTimes,
    NetworkRuns,
    Reduction,
    SeedRun,
    Weighting,
)
from onebyone.core.records import (
    Cost,
    DataInfo,
    Epoch,
    InputSpec,
    Machine,
    Metric,
    Ratio,
    Timing,
    TrainLog,
)
from onebyone.report.pictures import data_uri

IMAGE = data_uri(np.zeros((4, 4)))


def timing(ms, *, batch=1, threads=1, disturbed=False):
    return Timing(
        runtime="eager",
        device="cpu",
        threads=threads,
        batch=batch,
        repeats=30,
        median_ms=ms,
        q1_ms=0.9 * ms,
        q3_ms=1.1 * ms,
        disturbed=disturbed,
    )


def ratio(value, width=0.1):
    return Ratio(value=value, low=value - width, high=value + width, rounds=30)


def layer_times(pointwise=0.1, spatial=0.5, floor=0.02, *, batch=1, threads=1, disturbed=False):
    return LayerTimes(
        batch=batch,
        pointwise=timing(pointwise, batch=batch, threads=threads, disturbed=disturbed),
        spatial=timing(spatial, batch=batch, threads=threads),
        floor=timing(floor),
        ratio=ratio(spatial / pointwise),
    )


def layer(*, times=None, cold=((2.0, 10.0), (4.0, 8.0))):
    (one, three), (late_one, early_three) = cold
    return LayerComparison(
        input_shape=(512, 12, 12),
        output_shape=(32, 12, 12),
        pointwise=Cost(params=16_416, macs=2_359_296, bytes=4 * 16_416),
        spatial=Cost(params=147_488, macs=21_233_664, bytes=4 * 147_488),
        times=times or (layer_times(), layer_times(2.0, 8.0, batch=32)),
        cold=(
            ColdCalls(first="pointwise", pointwise_ms=one, spatial_ms=three),
            ColdCalls(first="spatial", pointwise_ms=late_one, spatial_ms=early_three),
        ),
    )


def accuracy(value, n=1000):
    return Metric(name="accuracy", value=value, n=n, low=value - 0.01, high=value + 0.01)


def log(rate=0.01, *, seed=0, losses=(1.0, 0.5), validation=0.9):
    return TrainLog(
        objective="labels",
        metric="accuracy",
        epochs=tuple(
            Epoch(epoch=i, loss=loss, validation=validation, learning_rate=rate, seconds=1.0)
            for i, loss in enumerate(losses, start=1)
        ),
        examples=1200,
        batch_size=32,
        learning_rate=rate,
        weight_decay=0.02,
        optimizer="AdamW",
        schedule="cosine",
        precision="float32",
        augmentation="none",
        seed=seed,
        seconds=2.0,
        chosen_epoch=2,
        device="cpu",
        threads=1,
    )


def network(name, cost, train, test, *, n=1000, losses=(1.0, 0.5), latency=0.2):
    return NetworkRuns(
        name=name,
        cost=cost,
        latency={1: timing(latency), 32: timing(10 * latency, batch=32)},
        trials=tuple(
            SeedRun(network=name, seed=99, log=log(rate, validation=0.9 - rate))
            for rate in (0.01, 0.02)
        ),
        runs=tuple(
            SeedRun(
                network=name,
                seed=seed,
                log=log(seed=seed, losses=losses),
                train=accuracy(one, n),
                test=accuracy(other, n),
            )
            for seed, (one, other) in enumerate(zip(train, test, strict=True))
        ),
    )


def duel(before, after, *, names=("classic", "convolution-only"), costs=None, ratios=(0.8, 0.9)):
    """Make two networks from pairs (training accuracies, test accuracies)."""
    costs = costs or (
        Cost(params=316_532, macs=674_456, bytes=4 * 316_532),
        Cost(params=4_232, macs=475_888, bytes=4 * 4_232),
    )
    return Duel(
        before=network(names[0], costs[0], *before),
        after=network(names[1], costs[1], *after, latency=0.25),
        latency_ratio={1: ratio(ratios[0], 0.05), 32: ratio(ratios[1], 0.05)},
    )


# Accuracies of five seeds: training, test.
FITTED = ((1.0, 1.0, 1.0, 1.0, 1.0), (0.95, 0.951, 0.949, 0.95, 0.95))
LESS_FITTED = ((0.90, 0.91, 0.90, 0.90, 0.89), (0.89, 0.90, 0.89, 0.889, 0.88))
CURED = ((0.99, 0.991, 0.99, 0.99, 0.99), (0.975, 0.976, 0.975, 0.974, 0.975))
WORSE = ((1.0, 1.0, 1.0, 1.0, 1.0), (0.90, 0.901, 0.902, 0.90, 0.90))
SCATTERED = ((1.0, 1.0, 1.0, 1.0, 1.0), (0.90, 0.99, 0.93, 0.97, 0.95))

EXTRA_COSTS = (
    Cost(params=8_164, macs=71_344, bytes=4 * 8_164),
    Cost(params=8_236, macs=74_480, bytes=4 * 8_236),
)


def record(*, heads=None, nonlinearity=None, layers=None, classes=None):
    classes = classes or tuple("0123456789")
    return ArticleRecord(
        onebyone="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        data=DataInfo(
            name="digits",
            train=1200,
            validation=200,
            test=397,
            classes=classes,
            inputs=InputSpec.of_shape((1, 1, 28, 28)),
            seed=0,
        ),
        machine=Machine(
            processor="A processor",
            cores=2,
            threads=1,
            device="cpu",
            system="Linux",
            versions={"torch": "2.9"},
        ),
        layer=layers or layer(),
        heads=heads or duel(FITTED, LESS_FITTED),
        nonlinearity=nonlinearity
        or duel(FITTED, SCATTERED, names=("plain", "extra-nonlinearity"), costs=EXTRA_COSTS),
        weighting=Weighting(
            weight=4.0,
            network="map 1",
            image=IMAGE,
            before=IMAGE,
            after=IMAGE,
            before_range=(-1.0, 2.0),
            after_range=(-4.0, 8.0),
        ),
        reduction=Reduction(
            network="conv",
            test=accuracy(0.98),
            image=IMAGE,
            before=IMAGE,
            after=IMAGE,
            maps=(512, 32),
            kept=0.95,
            best=0.97,
            examples=200,
        ),
        activations=(
            ActivationMap(
                index=3, label=classes[0], predicted=classes[0], image=IMAGE, predicted_map=IMAGE
            ),
            ActivationMap(
                index=7,
                label=classes[1],
                predicted=classes[2],
                image=IMAGE,
                predicted_map=IMAGE,
                label_map=IMAGE,
            ),
        ),
        seconds={"layers": 3.0, "heads": 75.0},
    )
