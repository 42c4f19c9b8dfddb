"""Plans within a budget of memory: the weights, and the activations that are alive at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from onebyone.errors import BudgetError
from onebyone.profiling.memory import peak_activation_bytes
from onebyone.records import Budget, Plan
from onebyone.rewrites import restructure
from onebyone.units import format_bytes

# Networks that are built and counted until one is within the budget, at most.
MOST_BUILDS = 6


def memory_bytes(model: nn.Module, example: Tensor) -> int:
    """Return the bytes of a network's weights and buffers, and of its peak activations.

    Args:
        model: Not modified.
        example: An input ``(batch, …)``.
    """
    return _weights(model) + peak_activation_bytes(model, example)


def within_memory(
    model: nn.Module,
    example: Tensor,
    memory: Budget,
    budgets: Sequence[Budget],
    plan_within: Callable[[Sequence[Budget]], Plan],
) -> Plan:
    """Return the plan of least harm that is found to be within a budget of memory.

    A plan bounds parameters, which add up; the peak of the activations does not, so that the
    network is built and counted, and the bound on its parameters is set by what they leave.

    Args:
        model: Not modified.
        example: An input ``(batch, …)``.
        memory: The budget.
        budgets: All of them.
        plan_within: Makes a plan.

    Raises:
        BudgetError: If no network within the budget is found; says what is needed.
    """
    others = [budget for budget in budgets if budget.quantity not in ("memory", "params")]
    asked = [budget for budget in budgets if budget.quantity == "params"]
    size = next((p.element_size() for p in model.parameters()), 4)
    bounds = asked
    least: int | None = None
    for _ in range(MOST_BUILDS):
        try:
            made = plan_within((*others, *bounds))
        except BudgetError as error:
            raise _unreachable(memory, least, str(error)) from error
        small = restructure(model, made)
        needed = memory_bytes(small, example)
        if needed <= memory.limit:
            return replace(made, budgets=tuple(budgets), memory_bytes=needed)
        least = needed if least is None else min(least, needed)
        room = memory.limit - (needed - sum(p.numel() for p in small.parameters()) * size)
        limit = min([int(room / size), *(int(budget.limit) for budget in asked)])
        if limit < 1:
            activations = peak_activation_bytes(small, example)
            said = f"Its activations alone need {format_bytes(activations)}."
            raise _unreachable(memory, least, said)
        bounds = [Budget(quantity="params", limit=limit, asked=memory.asked)]
    raise _unreachable(memory, least, "")


def _unreachable(memory: Budget, least: int | None, detail: str) -> BudgetError:
    reached = "" if least is None else f" the smallest network tried needs {format_bytes(least)}."
    return BudgetError(
        f"The budget {memory.asked} is {format_bytes(memory.limit)} of weights and peak "
        f"activations, but{reached or ' no network within it was found.'} {detail}".rstrip()
    )


def _weights(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
