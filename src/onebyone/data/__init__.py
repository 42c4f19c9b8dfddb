"""Data sets by name, from a folder or from the user's code, in fast reproducible batches."""

from onebyone.data.augment import Augmentation
from onebyone.data.convert import as_data, as_split
from onebyone.data.datasets import DatasetSplit, repeatable
from onebyone.data.load import load_data
from onebyone.data.named import NAMED, data_directory
from onebyone.data.shards import Shards
from onebyone.data.splits import Data, Split, TensorSplit
from onebyone.data.streams import PictureSplit

__all__ = [
    "NAMED",
    "Augmentation",
    "Data",
    "DatasetSplit",
    "PictureSplit",
    "Shards",
    "Split",
    "TensorSplit",
    "as_data",
    "as_split",
    "data_directory",
    "load_data",
    "repeatable",
]
