"""The names of the data sets that need only a name, which help and reports list."""

from __future__ import annotations

DATA_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
