"""Plans within a budget of memory: the weights, and the activations that are alive at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from onebyone.core.errors import BudgetError
from onebyone.core.records import Budget, Plan
from onebyone.core.tensor_trees import (
    Inputs,
)
from onebyone.core.units import format_bytes
from onebyone.profiling.activation_memory import peak_activation_bytes
from onebyone.rewrites import restructure

# Networks that are built and counted until one is within the budget, at most.
MOST_BUILDS = 6


def memory_bytes(model: nn.Module, example: Inputs) -> int:
    """Return the bytes of a network's weights and buffers, and of its peak activations.

    Args:
        model: Not modified.
        example: What it is called with.
    """
    return _weights(model) + peak_activation_bytes(model, example)


def within_memory(
    model: nn.Module,
    example: Inputs,
    memory: Budget,
    budgets: Sequence[Budget],
    plan_within: Callable[[Sequence[Budget]], Plan],
    *,
    closest: bool = False,
) -> Plan:
    """Return the plan of least harm that is found to be within a budget of memory.

    A plan bounds parameters, which add up; the peak of the activations does not, so that the
    network is built and counted, and the bound on its parameters is set by what they leave.

    Args:
        model: Not modified.
        example: What it is called with.
        memory: The budget.
        budgets: All of them.
        plan_within: Makes a plan.
        closest: Return the plan of the smallest network that was tried where none is within the
            budget, in place of an error.

    Raises:
        BudgetError: If no network within the budget is found; says what is needed.
    """
    others = [budget for budget in budgets if budget.quantity not in ("memory", "params")]
    asked = [budget for budget in budgets if budget.quantity == "params"]
    size = next((p.element_size() for p in model.parameters()), 4)
    bounds = asked
    tried: list[Plan] = []
    said = ""
    for _ in range(MOST_BUILDS):
        try:
            made = plan_within((*others, *bounds))
        except BudgetError as error:
            said = str(error)
            if not error.nearest or not tried:
                break
            made = plan_within(error.nearest)
        small = restructure(model, made)
        needed = memory_bytes(small, example)
        made = replace(made, budgets=tuple(budgets), memory_bytes=needed)
        if needed <= memory.limit:
            return made
        tried.append(made)
        if said:
            break
        room = memory.limit - (needed - sum(p.numel() for p in small.parameters()) * size)
        limit = min([int(room / size), *(int(budget.limit) for budget in asked)])
        if limit < 1 and not closest:
            activations = peak_activation_bytes(small, example)
            said = f"Its activations alone need {format_bytes(activations)}."
            break
        bounds = [Budget(quantity="params", limit=max(limit, 1), asked=memory.asked)]
    if closest and tried:
        return min(tried, key=_memory_of)
    raise _unreachable(memory, tried, said)


def _memory_of(made: Plan) -> int:
    return made.memory_bytes or 0


def _unreachable(memory: Budget, tried: Sequence[Plan], detail: str) -> BudgetError:
    if not tried:
        return BudgetError(
            f"The budget {memory.asked} is {format_bytes(memory.limit)} of weights and peak "
            f"activations, but no network within the other budgets was found. {detail}".rstrip()
        )
    least = min(_memory_of(made) for made in tried)
    return BudgetError(
        f"The budget {memory.asked} is {format_bytes(memory.limit)} of weights and peak "
        f"activations, but the smallest network tried needs {format_bytes(least)}. {detail} "
        f"Raise the budget to `memory={least}` or more, or take the nearest with `--closest` "
        f"(`closest=True`).".replace("  ", " "),
        nearest=[replace(memory, limit=least)],
    )


def _weights(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
