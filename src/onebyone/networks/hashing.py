"""Hashes of networks: of their weights, and of their modules with the code."""

from __future__ import annotations

import re

from torch import Tensor, nn

from onebyone.core.identity import Digest

# The versions of these packages identify their code, so it is not hashed.
_LIBRARIES = ("torch", "torchvision", "timm", "onebyone")


def hash_weights(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers: names, types, shapes and values."""
    digest = Digest()
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            digest.tensor(name, value)
        else:
            digest.text(f"{name} {value!r}")
    return digest.hexadecimal()


def hash_network(network: nn.Module) -> str:
    """Return the SHA-256 of a network: its modules, the code of their forwards, and its weights."""
    digest = Digest()
    digest.text(_without_addresses(str(network)))
    for name, module in network.named_modules():
        digest.text(f"{name} {_plain_attributes(module)}")
    own = {type(module) for module in network.modules()}
    for kind in sorted(own, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            digest.code(getattr(kind, "forward", None))
    digest.text(hash_weights(network))
    return digest.hexadecimal()


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _plain_attributes(module: nn.Module) -> list[tuple[str, str]]:
    """Return a module's public numbers and strings: settings that its forward may use."""
    return sorted(
        (name, repr(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | str)
    )
