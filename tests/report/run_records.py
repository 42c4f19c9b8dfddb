"""Whole run records made up for the tests: figures that belong together, of any number of layers."""

from __future__ import annotations

import numpy as np

from onebyone.core.records import (
    Budget,
    CalibrationInfo,
    ClassCount,
    Comparison,
    ConfusedPair,
    Confusion,
    Cost,
    DataInfo,
    Difference,
    Disagreement,
    Epoch,
    FrontPoint,
    InputSpec,
    LayerCost,
    LeftAlone,
    LegendEntry,
    Machine,
    Measured,
    Metric,
    ModelSource,
    Option,
    OutputPictures,
    PicturedBox,
    PicturedExample,
    PicturedOutput,
    Plan,
    Profile,
    Ratio,
    RunRecord,
    Status,
    Timing,
    TrainLog,
)
from onebyone.report.masks import CLEAR, draw_mask, draw_sample
from onebyone.report.pictures import data_uri, image_pixels, overlay

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MACHINE = Machine(
    processor="AMD EPYC 7B13",
    cores=2,
    threads=2,
    device="cpu",
    system="Linux 6.1 x86_64",
    versions={"torch": "2.9.1", "torchvision": "0.24.1", "python": "3.11.7"},
)


def timing(ms: float, *, runtime: str = "eager", disturbed: bool = False) -> Timing:
    return Timing(
        runtime=runtime,
        device="cpu",
        threads=2,
        batch=1,
        repeats=50,
        median_ms=ms,
        q1_ms=0.97 * ms,
        q3_ms=1.04 * ms,
        disturbed=disturbed,
    )


def conv(name: str, channels: tuple[int, int], size: int, *, kernel: int = 3, timed: bool = True):
    """Return a convolution whose time goes with its multiplications and a fixed start."""
    inputs, outputs = channels
    params = inputs * outputs * kernel**2
    macs = params * size * size
    return LayerCost(
        name=name,
        kind=f"Conv2d {kernel}×{kernel}",
        input_shape=(inputs, size, size),
        output_shape=(outputs, size, size),
        params=params,
        macs=macs,
        timing=timing(0.012 + macs * 3.1e-8) if timed else None,
    )


def factorized(site: LayerCost, ranks: tuple[int, int], *, timed: bool = True) -> list[LayerCost]:
    inputs, size, outputs = site.input_shape[0], site.input_shape[1], site.output_shape[0]
    return [
        conv(f"{site.name}.reduce", (inputs, ranks[0]), size, kernel=1, timed=timed),
        conv(f"{site.name}.spatial", ranks, size, timed=timed),
        conv(f"{site.name}.expand", (ranks[1], outputs), size, kernel=1, timed=timed),
    ]


def layers(count: int, *, timed: bool = True) -> list[LayerCost]:
    """Return a network of three stages, as ResNets for small images have."""
    made = [conv("conv1", (3, 16), 32, timed=timed)]
    for index in range(count - 2):
        stage = 3 * index // (count - 2)
        width = 16 << stage
        inputs = width if index % 2 else max(width // 2, 16)
        name = f"layer{stage + 1}.{index // 2}.conv{index % 2 + 1}"
        made.append(conv(name, (inputs, width), 32 >> stage, timed=timed))
    head = LayerCost(
        name="fc",
        kind="Linear",
        input_shape=(64,),
        output_shape=(10,),
        params=650,
        macs=640,
        timing=timing(0.014) if timed else None,
    )
    return [*made, head]


def cost(parts: list[LayerCost]) -> Cost:
    return Cost(
        params=sum(p.params for p in parts),
        macs=sum(p.macs for p in parts),
        bytes=4 * sum(p.params for p in parts),
    )


def rewritten(before: list[LayerCost], *, timed: bool = True):
    """Return the layers after, the choices, and what was left alone."""
    after, choices, alone = [], [], []
    for index, layer in enumerate(before):
        if layer.kind == "Linear":
            pieces = [conv("fc.score", (64, 10), 8, kernel=1, timed=timed)]
            settings = {"form": "gap"}
            rewrite, occupies = "head", ("avgpool", "flatten", "fc")
        elif index == 0 or index % 4 == 3:
            after.append(layer)
            reason = "the first layer: 3 input channels" if index == 0 else "no rank pays here"
            alone.append(LeftAlone(site=layer.name, reason=reason))
            continue
        else:
            width = layer.output_shape[0]
            ranks = (max(4, layer.input_shape[0] // 2), max(4, 3 * width // 8))
            pieces = factorized(layer, ranks, timed=timed)
            settings = {"form": "tucker2", "ranks": list(ranks)}
            rewrite, occupies = "factorize", (layer.name,)
        after += pieces
        choices.append(
            Option.of(
                rewrite,
                settings,
                site=layer.name,
                before=cost([layer]),
                after=cost(pieces),
                occupies=occupies,
                error=0.031 + 0.001 * index,
                harm=0.0042 / (index + 1),
                measured=index % 3 == 0,
            )
        )
    return after, tuple(choices), tuple(alone)


def profile(parts: list[LayerCost], ms: float) -> Profile:
    whole = cost(parts)
    return Profile(
        network="resnet20-cifar10",
        inputs=InputSpec.of_shape((1, 3, 32, 32)),
        params=whole.params,
        macs=whole.macs,
        layers=tuple(parts),
        latency={"eager": timing(ms)},
        uncounted={},
        machine=MACHINE,
    )


def front(whole: Cost, count: int = 10) -> tuple[FrontPoint, ...]:
    """Return what budgets from a twelfth to the whole would come to."""
    shares = np.geomspace(1 / 12, 1, count)
    return tuple(
        FrontPoint(
            budget=Budget(quantity="macs", limit=round(share * whole.macs), asked=f"macs={share}"),
            after=Cost(
                params=round(share * whole.params),
                macs=round(share * whole.macs),
                bytes=4 * round(share * whole.params),
            ),
            harm=0.0 if share == 1 else 0.02 * float(share) ** -2.5 * (1 - float(share)) ** 2,
            rewritten=round(18 * (1 - share)),
        )
        for share in shares
    )


def confusion(classes: int = 10, n: int = 1000) -> Confusion:
    """Return counts in which every class loses some to the next two."""
    random = np.random.default_rng(5)
    pairs = tuple(
        ConfusedPair(
            label=label,
            predicted=(label + step) % classes,
            before=int(random.integers(0, n // 20)),
            after=int(random.integers(0, n // 15)),
        )
        for label in range(classes)
        for step in (1, 2)
    )
    lost = [
        [sum(getattr(p, side) for p in pairs if p.label == c) for c in range(classes)]
        for side in ("before", "after")
    ]
    counts = tuple(
        ClassCount(label=c, n=n, before=n - lost[0][c], after=n - lost[1][c])
        for c in range(classes)
    )
    ordered = tuple(sorted(pairs, key=lambda p: -max(p.before, p.after)))
    return Confusion(
        classes=classes,
        counts=counts[:100],
        pairs=ordered[:150],
        pairs_left_out=max(0, len(ordered) - 150),
    )


def metric(value: float, n: int = 10_000, *, name: str = "accuracy", half: float = 0.0075):
    return Metric(name=name, value=value, n=n, low=value - half, high=value + half)


def measured(whole: Cost, ms: float, test: float, train: float, error: float) -> Measured:
    return Measured(
        params=whole.params,
        macs=whole.macs,
        file_bytes=4 * whole.params + 9_000,
        latency={
            "eager": timing(ms),
            "onnxruntime": timing(0.6 * ms, runtime="onnxruntime"),
        },
        metric=metric(test),
        train_metric=metric(train, 5_000, half=0.004),
        calibration_error=error,
        peak_activation_bytes=2 * 4 * 16 * 32 * 32,
    )


def disagreements(count: int, *, maps: bool = True) -> tuple[Disagreement, ...]:
    random = np.random.default_rng(3)
    made = []
    for index in range(count):
        image = np.cumsum(np.cumsum(random.normal(size=(3, 32, 32)), axis=1), axis=2)
        faces = [data_uri(overlay(image, random.random((4, 4)))) for _ in range(2 * maps)]
        label, other = (int(value) for value in random.integers(0, 10, 2))
        before, after = (label, (label + 1 + other) % 10) if index % 3 else (other, label)
        made.append(
            Disagreement(
                index=37 * index + 5,
                label=label,
                before=before,
                after=after,
                image=data_uri(image_pixels(image)),
                maps=tuple(faces),
            )
        )
    return tuple(made)


def output_pictures(kind: str, count: int = 6) -> OutputPictures:
    """Return examples as a run keeps them of a segmenter, a detector or a denoiser."""
    random = np.random.default_rng(5)
    ground = np.cumsum(np.cumsum(random.normal(size=(3, 40, 60)), axis=1), axis=2)
    image = data_uri(image_pixels(ground))

    def output(shift: int, *, sure: bool = True) -> PicturedOutput:
        score = 0.5 + shift / 10 if sure else None
        if kind == "patches":
            return PicturedOutput(picture=data_uri(image_pixels(ground + shift)), score=score)
        if kind == "masks":
            styles = np.full((40, 60), CLEAR)
            styles[5 + shift : 25, 10:40], styles[20:35, 30 + shift : 55] = 0, 1
            return PicturedOutput(picture=draw_mask(styles), score=score)
        rows = ((0.1, 0.2, 0.4, 0.6, 0), (0.5 + shift / 50, 0.3, 0.9, 0.95, 7))
        boxes = [
            PicturedBox(
                left=left, top=top, right=right, bottom=bottom, label=label,
                confidence=0.75 if sure else None,
            )
            for left, top, right, bottom, label in rows
        ]  # fmt: skip
        return PicturedOutput(boxes=tuple(boxes), score=score)

    legend = ("background", "road", "car") if kind == "masks" else ()
    return OutputPictures(
        kind=kind,
        examples=tuple(
            PicturedExample(
                index=11 * place + 3,
                chosen="most" if place < count / 2 else "random",
                divergence=0.3 / (1 + place),
                before=output(1),
                after=output(2),
                truth=output(0, sure=False),
                image=image,
                difference=data_uri(image_pixels(ground[::-1])) if kind == "patches" else "",
                amplified=16,
                changed=0.07 if kind == "masks" else None,
            )
            for place in range(count)
        ),
        scored=400,
        seed=0,
        metric={"masks": "mIoU", "boxes": "mAP", "patches": "PSNR"}[kind],
        legend=tuple(
            LegendEntry(name=name, sample=draw_sample(style) if style >= 0 else "")
            for style, name in enumerate(legend, start=-1)
        ),
        least_confidence=0.5 if kind == "boxes" else None,
        hidden=3 if kind == "boxes" else 0,
    )


def dense_record(kind: str) -> RunRecord:
    """Return the record of a run whose network gives masks, boxes or images."""
    found = output_pictures(kind)
    return run_record().with_(disagreements=(), confusion=None, pictures=found)


def train_log(epochs: int = 8) -> TrainLog:
    return TrainLog(
        objective="KL divergence from the original's class probabilities, temperature 4",
        metric="accuracy",
        epochs=tuple(
            Epoch(
                epoch=index + 1,
                loss=0.05 + 0.6 * 0.6**index,
                validation=0.905 - 0.06 * 0.55**index,
                learning_rate=0.02 * (1 - index / epochs),
                seconds=14.2,
            )
            for index in range(epochs)
        ),
        examples=45_000,
        batch_size=128,
        learning_rate=0.02,
        weight_decay=5e-4,
        optimizer="SGD, Nesterov momentum 0.9",
        schedule="one cycle",
        precision="float32",
        augmentation="crop, flip",
        seed=0,
        seconds=14.2 * epochs,
        chosen_epoch=max(epochs - 1, 1),
        device="cpu",
        threads=2,
    )


def run_record(count: int = 20, *, timed: bool = True) -> RunRecord:
    """Return a finished run with every field filled."""
    first = layers(count, timed=timed)
    second, choices, alone = rewritten(first, timed=timed)
    slow = sum(0.012 + 3.1e-8 * part.macs for part in first)
    before = measured(cost(first), slow, 0.9127, 0.9871, 0.0312)
    after = measured(cost(second), slow / 1.62, 0.9103, 0.9731, 0.0254)
    difference = Difference(
        value=-0.0024,
        low=-0.0061,
        high=0.0013,
        n=10_000,
        p_value=0.21,
        test="McNemar's exact test, bootstrap interval",
    )
    return RunRecord(
        onebyone="0.1.0",
        created="2026-05-04T12:31:07+00:00",
        status=Status(state="finished", stage="report"),
        source=ModelSource(
            name="resnet20-cifar10",
            spec="benchmarks/resnet20.py:make",
            weights="resnet20-cifar10.safetensors",
        ),
        machine=MACHINE,
        data=DataInfo(
            name="cifar10",
            train=45_000,
            validation=5_000,
            test=10_000,
            classes=CLASSES,
            inputs=InputSpec.of_shape((1, 3, 32, 32)),
            seed=0,
        ),
        command=(
            "onebyone",
            "shrink",
            "benchmarks/resnet20.py:make",
            "--data",
            "cifar10",
            "--budget",
            "macs=50%",
            "--out",
            "runs/r20",
        ),
        plan=Plan(
            network="resnet20-cifar10",
            inputs=InputSpec.of_shape((1, 3, 32, 32)),
            budgets=(Budget(quantity="macs", limit=cost(first).macs // 2, asked="macs=50%"),),
            before=cost(first),
            after=cost(second),
            choices=choices,
            left_alone=alone,
            calibration=CalibrationInfo(data="cifar10", examples=512, seed=0),
            harm=sum(choice.harm for choice in choices),
            front=front(cost(first)),
        ),
        before=before,
        one_shot=measured(cost(second), slow / 1.62, 0.8614, 0.9012, 0.0581),
        one_shot_difference=Difference(
            value=-0.0513, low=-0.0574, high=-0.0452, n=10_000, p_value=1e-30, test="McNemar"
        ),
        one_shot_agreement=metric(0.8892, name="agreement"),
        one_shot_divergence=0.2143,
        after=after,
        comparison=Comparison(
            before=before,
            after=after,
            inputs=InputSpec.of_shape((1, 3, 32, 32)),
            latency_ratio={
                "eager": Ratio(value=1.6213, low=1.58, high=1.66, rounds=60),
                "onnxruntime": Ratio(value=1.012, low=0.97, high=1.05, rounds=60),
            },
            difference=difference,
            agreement=metric(0.9584, name="agreement", half=0.004),
            divergence=0.0312,
            machine=MACHINE,
        ),
        training=train_log(),
        profile_before=profile(first, slow),
        profile_after=profile(second, slow / 1.62),
        disagreements=disagreements(12),
        confusion=confusion(),
        seconds={"profile": 3.1, "calibrate": 12.8, "plan": 41.0, "train": 113.6, "compare": 22.4},
    )


def empty_record(state: str = "failed", **changes) -> RunRecord:
    """Return a run that stopped before it had measured anything."""
    return RunRecord(
        onebyone="0.1.0",
        created="2026-05-04T12:31:07+00:00",
        status=Status(state=state, stage="calibrate", detail="DataError: 0 images in photos/."),
        source=ModelSource(name="mystery", spec=None),
        machine=MACHINE,
    ).with_(**changes)
