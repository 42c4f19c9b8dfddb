"""From a budget to a plan: the options of least harm that meet it."""

from onebyone.planning.applies import applies
from onebyone.planning.budget import check_budgets
from onebyone.planning.options import HeadChoice
from onebyone.planning.planner import HEAD_CHOICES, Planner, plan, plan_from
from onebyone.planning.uniform import uniform_plan

__all__ = [
    "HEAD_CHOICES",
    "HeadChoice",
    "Planner",
    "applies",
    "check_budgets",
    "plan",
    "plan_from",
    "uniform_plan",
]
