"""A training says how long it waited for its data."""

import time
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import Dataset

from onebyone.data import Data, DatasetSplit, TensorSplit
from onebyone.training.train import train

PAUSE = 0.01  # seconds for each item


class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(PAUSE)
        return torch.ones(3) * index, index % 2


def trained(split):
    data = Data(name="d", train=split, validation=split, test=split, classes=("a", "b"))
    return train(nn.Linear(3, 2), data, epochs=2, batch_size=4, metric=None).log


def test_the_time_in_which_items_are_loaded_is_waited_for():
    log = trained(DatasetSplit(Slow()))
    for epoch in log.epochs:
        assert 8 * PAUSE <= epoch.waited <= epoch.seconds
    assert log.csv().splitlines()[0].endswith(",waited_seconds")
    assert log.waiting.endswith(
        "% of the time (loaded as they are used, by no worker (`num_workers`)): more workers would "
        "help if processors are free"
    )
    assert f"The training {log.waiting}." in log.table().notes


def test_of_data_in_memory_the_share_is_said_without_advice():
    log = trained(TensorSplit(torch.rand(8, 3), torch.arange(8) % 2))
    assert all(0 < epoch.waited < epoch.seconds for epoch in log.epochs)
    assert log.waiting.startswith("waited for data ")
    assert log.waiting.endswith(" of the time")


def test_the_share_is_of_all_epochs_that_know_it():
    log = trained(TensorSplit(torch.rand(8, 3), torch.arange(8) % 2))
    first, second = (replace(epoch, seconds=4.0) for epoch in log.epochs)
    log = replace(log, epochs=(replace(first, waited=None), replace(second, waited=1.0)))
    assert log.waiting == "waited for data 25% of the time"
    assert replace(log, epochs=(replace(first, waited=None),)).waiting is None
