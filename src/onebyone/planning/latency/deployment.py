"""Where a plan's network is to run."""

from __future__ import annotations

from onebyone.core.errors import OptionError
from onebyone.core.records import Deployment, PlanPrecision
from onebyone.profiling.latency import threads
from onebyone.runtimes import find_runtime


def deployment_of(
    runtime: str,
    *,
    device: str,
    batch: int,
    num_threads: int | None,
    precision: PlanPrecision = "float32",
) -> Deployment:
    """Return where a plan's network is to run: on the CPU if the runtime knows no other device.

    Raises:
        UnknownNameError: If there is no such runtime.
        MissingExtraError: If it is not installed.
        OptionError: If the batch is not positive, or the runtime does not run on the device.
    """
    found = find_runtime(runtime)
    device = found.device_for(device)
    if batch < 1:
        raise OptionError(f"`batch` must be 1 or more, got {batch}.")
    if device.partition(":")[0] not in found.devices:
        raise OptionError(
            f"The runtime {runtime!r} runs on {' and '.join(found.devices)}, got device {device!r}."
        )
    with threads(num_threads) as count:
        return Deployment(
            runtime=runtime,
            device=device,
            batch=batch,
            threads=count,
            version=found.version,
            precision=precision,
        )
