"""How many cases are tried: few in the suite, many by ``make fuzz``."""

import os

from hypothesis import HealthCheck, settings

# Of each kind that takes a millisecond or so a case.
CHEAP = int(os.environ.get("ONEBYONE_FUZZ", "30"))


def some(*, dearer: int = 1) -> settings:
    """Return the settings of a kind whose cases take that many times as long as a cheap one."""
    return settings(
        max_examples=max(2, CHEAP // dearer),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
