"""From a budget to a plan: the options of least harm that meet it."""

from onebyone.planning.applicability import applies
from onebyone.planning.choosing import plan_from
from onebyone.planning.head_options import HeadChoice
from onebyone.planning.planner import HEAD_CHOICES, Planner, plan
from onebyone.planning.uniform import uniform_plan

__all__ = [
    "HEAD_CHOICES",
    "HeadChoice",
    "Planner",
    "applies",
    "plan",
    "plan_from",
    "uniform_plan",
]
