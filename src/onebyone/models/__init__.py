"""Networks by name, from a file or from a library, and their weights on disk."""

from onebyone.models.article import classic as classic
from onebyone.models.article import convolution_only as convolution_only
from onebyone.models.article import extra_nonlinearity as extra_nonlinearity
from onebyone.models.nin import nin as nin
from onebyone.models.weights import load_weights as load_weights
from onebyone.models.weights import read_weights as read_weights
from onebyone.models.weights import save_weights as save_weights
from onebyone.models.zoo import Loaded as Loaded
from onebyone.models.zoo import available as available
from onebyone.models.zoo import build as build
from onebyone.models.zoo import load as load
