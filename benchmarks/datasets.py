"""The former name of ``cifar10_data``, which hides Hugging Face's ``datasets`` where it is found."""

from cifar10_data import cifar10_imagenet_statistics, cifar10_nin_statistics

__all__ = ["cifar10_imagenet_statistics", "cifar10_nin_statistics"]
