"""Pictures of 1×1 convolutions at work: a weighting, 512 maps into 32, and class maps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

import onebyone
from onebyone.article.networks import Report, seeded
from onebyone.article.record import ActivationMap, Reduction, SeedRun, Weighting
from onebyone.article.shelf import Settings, Shelf
from onebyone.data import Data
from onebyone.data.splits import tensor_batches
from onebyone.evaluation.scores import evaluate
from onebyone.networks.hashing import hash_network
from onebyone.networks.layers import GlobalAverageHead, Pointwise
from onebyone.profiling.latency import threads
from onebyone.report.pictures import (
    color_map,
    data_uri,
    enlarge_pixels,
    image_pixels,
    map_grid,
    overlay,
)
from onebyone.training.train import train

WEIGHT = 4.0  # the article's
SHOWN = 6  # enlargement: 28 pixels would be too small on the page
WIDE_EXAMPLES = 3_000
WIDE_PICTURES = 5_000  # training pictures of the wide network
WIDE_RATE = 0.004
VARIANCE_EXAMPLES = 200
ERRORS_SHOWN = 4
SEARCHED = 2_000  # test pictures to search for examples


def weighting(network: nn.Module, data: Data, *, index: int = 0) -> Weighting:
    """Apply a 1×1 filter of weight 4 to a feature map of a trained network.

    Args:
        network: One of the article's networks, trained. Not modified.
        data: Data whose test picture is used.
        index: Position of the test picture.
    """
    first = network.get_submodule("features.conv1")
    scale = Pointwise(1, 1, bias=False)
    nn.init.constant_(scale.weight, WEIGHT)
    with torch.inference_mode():
        maps = first(_inputs(data, index))
        # The map with the largest variance: others may be almost constant.
        chosen = int(maps.var(dim=(0, 2, 3)).argmax())
        before = maps[:, chosen : chosen + 1]
        after = scale(before)
    old, new = before[0, 0].numpy(), after[0, 0].numpy()
    # The scale includes 0, so that the picture shows the factor of four.
    low, high = min(0.0, float(new.min())), max(0.0, float(new.max()))
    return Weighting(
        weight=WEIGHT,
        network=f"map {chosen + 1} of 3 of the convolution-only network's first layer, seed 0",
        image=_picture(data, index),
        before=data_uri(enlarge_pixels(color_map(old, low=low, high=high), SHOWN)),
        after=data_uri(enlarge_pixels(color_map(new, low=low, high=high), SHOWN)),
        before_range=(float(old.min()), float(old.max())),
        after_range=(float(new.min()), float(new.max())),
    )


def wide_network() -> nn.Sequential:
    """Return a classifier with the article's 512 maps of 12×12 and its 1×1 convolution to 32."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=nn.Conv2d(1, 32, 5),
            pool=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            wide=nn.Conv2d(32, 512, 3, padding=1),
            relu2=nn.ReLU(),
            reduce=Pointwise(512, 32),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            scores=nn.Linear(32 * 12 * 12, 10),
        )
    )


def reduction(data: Data, shelf: Shelf, report: Report, *, index: int = 0) -> Reduction:
    """Train a network with 512 maps and a 1×1 convolution to 32, and draw both.

    Args:
        data: The data; some of its training pictures are used.
        shelf: The store of finished trainings.
        report: Called with the training's progress.
        index: The test picture whose maps are shown.
    """
    network, run = _wide(data, shelf, report)
    wide, narrow = network[:5], network[5]
    test = data.test.take(VARIANCE_EXAMPLES)
    with torch.inference_mode():
        many = wide(_inputs(data, index))
        few = narrow(many)
        kept, best = variance_kept(
            (wide(inputs) for inputs, _ in tensor_batches(test, 50, stage="article")), narrow
        )
    return Reduction(
        network=(
            "conv 5×5 1→32, max-pool 2, ReLU, conv 3×3 32→512, ReLU, conv 1×1 512→32, ReLU, "
            f"one linear layer; trained for {len(run.log.epochs)} epochs on "
            f"{run.log.examples:,} pictures"
        ),
        test=evaluate(network, data.test.take(SEARCHED)),
        image=_picture(data, index),
        before=data_uri(enlarge_pixels(map_grid(many[0].numpy(), columns=32), 2)),
        after=data_uri(enlarge_pixels(map_grid(few[0].relu().numpy(), columns=16), 4)),
        maps=(many.shape[1], few.shape[1]),
        kept=kept,
        best=best,
        examples=len(test),
    )


def _wide(data: Data, shelf: Shelf, report: Report) -> tuple[nn.Sequential, SeedRun]:
    name, words = "wide", "a network with 512 maps"
    examples = data.train.take(WIDE_EXAMPLES)
    epochs = max(2, round(WIDE_PICTURES / len(examples)))
    settings: Settings = {"epochs": epochs, "onebyone": onebyone.__version__}
    network = seeded(wide_network, 0)
    assert isinstance(network, nn.Sequential)
    start = hash_network(network)
    run = shelf.find(name, settings, network=start)
    if run is None or not shelf.load(name, network):
        with threads(1):  # as for all small data: a second thread makes it slower
            trained = train(
                network,
                examples,
                epochs=epochs,
                batch_size=32,
                learning_rate=WIDE_RATE,
                augment=False,
                progress=lambda done, total, text: report(done / total, f"{words}: {text}"),
            )
        run = SeedRun(network=name, seed=0, log=trained.log)
        shelf.keep(name, settings, run, network=start, model=trained.model)
        assert isinstance(trained.model, nn.Sequential)
        network = trained.model
    report(1.0, f"{words}: done")
    return network.eval(), run


def variance_kept(batches: Iterator[Tensor], reduce: nn.Module) -> tuple[float, float]:
    """Return the share of the maps' variance that a 1×1 convolution keeps, and the largest share.

    With the covariance C of the channels over pixels and the weights W of the convolution, the
    best linear reconstruction from W x explains tr(C Wᵀ (W C Wᵀ)⁺ W C) of tr(C). The most that the
    same number of linear combinations can explain is the sum of C's largest eigenvalues.

    Args:
        batches: Maps ``(batch, channels, height, width)``.
        reduce: A 1×1 convolution of these channels, ungrouped. Not modified.

    Returns:
        Two shares, from 0 to 1; the first is at most the second.
    """
    assert isinstance(reduce, nn.Conv2d)
    total, square, count = torch.zeros(()), torch.zeros(()), 0
    for maps in batches:
        pixels = maps.detach().movedim(1, -1).reshape(-1, maps.shape[1]).double()
        total = total + pixels.sum(dim=0)
        square = square + pixels.T @ pixels
        count += len(pixels)
    mean = total / count
    covariance = square / count - torch.outer(mean, mean)
    weight = reduce.weight.detach().double().flatten(1)
    mixed = weight @ covariance
    # A pseudo-inverse, since a dead or duplicate filter makes the inner matrix singular.
    explained = mixed.T @ torch.linalg.pinv(mixed @ weight.T, hermitian=True) @ mixed
    largest = torch.linalg.eigvalsh(covariance).flip(0)[: len(weight)]
    whole = float(covariance.trace())
    return float(explained.trace()) / whole, float(largest.sum()) / whole


def activation_maps(network: nn.Module, data: Data) -> tuple[ActivationMap, ...]:
    """Return class activation maps: the first right answer of each class, then a few errors.

    Args:
        network: The convolution-only network, trained. Not modified.
        data: The pictures are the first of its test part.
    """
    head = network.get_submodule("head")
    assert isinstance(head, GlobalAverageHead)
    right: dict[int, int] = {}
    wrong: list[int] = []
    predictions: list[int] = []
    labels: list[int] = []
    with torch.inference_mode():
        for inputs, targets in tensor_batches(data.test, 250, stage="article"):
            predictions += network(inputs).argmax(dim=1).tolist()
            labels += targets.tolist()
            if len(labels) >= SEARCHED:
                break
    for index, (label, predicted) in enumerate(zip(labels, predictions, strict=True)):
        if label == predicted:
            right.setdefault(label, index)
        elif len(wrong) < ERRORS_SHOWN:
            wrong.append(index)
    chosen = [right[label] for label in sorted(right)] + wrong
    return tuple(
        _activation(network, head, data, index, label=labels[index], predicted=predictions[index])
        for index in chosen
    )


def _activation(
    network: nn.Module,
    head: GlobalAverageHead,
    data: Data,
    index: int,
    *,
    label: int,
    predicted: int,
) -> ActivationMap:
    inputs = _inputs(data, index)
    with torch.inference_mode():
        maps = head.class_maps(network.get_submodule("features")(inputs))[0].numpy()
    image = np.kron(inputs[0].numpy(), np.ones((1, SHOWN, SHOWN)))
    return ActivationMap(
        index=index,
        label=data.classes[label],
        predicted=data.classes[predicted],
        image=_picture(data, index),
        predicted_map=data_uri(overlay(image, maps[predicted])),
        label_map="" if label == predicted else data_uri(overlay(image, maps[label])),
    )


def _inputs(data: Data, index: int) -> Tensor:
    """Return one test picture as a batch of one, normalized."""
    size = 250
    for start, (inputs, _) in enumerate(tensor_batches(data.test, size, stage="article")):
        if index < (start + 1) * size:
            return inputs[index - start * size : index - start * size + 1]
    raise AssertionError("an index of the test data")


def _picture(data: Data, index: int) -> str:
    pixels = data.test.image(index)
    if pixels is None:
        pixels = image_pixels(_inputs(data, index)[0].numpy())
    return data_uri(enlarge_pixels(pixels, SHOWN))
