"""Data sets by name, by folder or by the user's own means, in fast reproducible batches."""

from onebyone.data.augment import Augmentation
from onebyone.data.convert import as_data, as_split
from onebyone.data.load import load_data
from onebyone.data.named import NAMED, data_directory
from onebyone.data.splits import Data, DatasetSplit, Split, TensorSplit

__all__ = [
    "NAMED",
    "Augmentation",
    "Data",
    "DatasetSplit",
    "Split",
    "TensorSplit",
    "as_data",
    "as_split",
    "data_directory",
    "load_data",
]
