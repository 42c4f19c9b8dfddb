"""A planned network that was built and measured, and whether it is what was planned for."""

from __future__ import annotations

from dataclasses import dataclass

from onebyone.core.records import Plan, PlannedLatency

# A prediction is good enough when the measurement is no farther from it than this share.
AGREEMENT = 0.03
# A budget is met if the measured time is above it by no more than this share: what is noise.
OVER = 0.01


@dataclass(frozen=True)
class Attempt:
    """A plan with the time of its network.

    Attributes:
        plan: With the time that was predicted.
        latency: What was measured.
    """

    plan: Plan
    latency: PlannedLatency

    @property
    def agrees(self) -> bool:
        """Whether the prediction was good enough."""
        return self.latency.error <= AGREEMENT

    def meets(self, limit: float | None) -> bool:
        """Whether the time is within a limit; what was planned for is the original's own time."""
        before = self.plan.before.ms or 0.0
        return limit is None or before / self.latency.ratio.value <= limit * (1 + OVER)
