"""Networks by name, from a file or from a library, and their weights on disk."""

from onebyone.networks.zoo.article import classic as classic
from onebyone.networks.zoo.article import convolution_only as convolution_only
from onebyone.networks.zoo.article import extra_nonlinearity as extra_nonlinearity
from onebyone.networks.zoo.load import Loaded as Loaded
from onebyone.networks.zoo.load import available as available
from onebyone.networks.zoo.load import build as build
from onebyone.networks.zoo.load import load as load
from onebyone.networks.zoo.nin import nin as nin
from onebyone.networks.zoo.plain import plain as plain
from onebyone.networks.zoo.weights import load_weights as load_weights
from onebyone.networks.zoo.weights import read_weights as read_weights
from onebyone.networks.zoo.weights import save_weights as save_weights
