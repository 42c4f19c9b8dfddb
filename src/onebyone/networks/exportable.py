"""Networks as torch.export takes them, and a limit on the formulas of sizes that it traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import SymInt, Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import map_tensors, tensors_in

# Operations in the formula of a size. Strides, pads and poolings of a deep network make up to ten.
# Where pads are computed from the size ("same" padding), each stride multiplies the formula by
# three, and tracing five of them takes many minutes.
MOST_OPERATIONS = 30


class OnCopies(nn.Module):
    """Runs a network on copies of its inputs, because a file must not modify them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network."""
        copies = map_tensors(Tensor.clone, (inputs, named))
        return self.network(*copies[0], **copies[1])


@contextmanager
def growth_limited(network: nn.Module) -> Iterator[None]:
    """Watch the sizes of what each module reads while a network is traced.

    Args:
        network: Its modules have hooks meanwhile.

    Raises:
        ModelError: In the tracing, if a size's formula is too large.
    """

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor in tensors_in(args):
            if any(_operations(size) > MOST_OPERATIONS for size in tensor.shape):
                raise ModelError(
                    f"the sizes of its maps are formulas of more than {MOST_OPERATIONS} operations "
                    f"at a {type(module).__name__}, as where each padding is computed from the size"
                )

    hooks = [module.register_forward_pre_hook(check) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _operations(size: int | SymInt) -> int:
    if not isinstance(size, SymInt):
        return 0
    known = size.node.maybe_as_int()
    return 0 if known is not None else int(size.node.expr.count_ops())
