"""How long is left of a run, by what the last finished run of its kind took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from onebyone.core.errors import OutputError
from onebyone.core.identity import Digest
from onebyone.core.records import RunRecord
from onebyone.core.write_files import write_text
from onebyone.planning.latency.cache import cache_folder

# These choose the network, and hardly change how long that takes.
_OF_NO_WEIGHT = ("budget", "max_drop", "seed", "only_faster", "closest")


@dataclass(frozen=True)
class RunTimes:
    """What the stages of the last run of one kind took.

    A kind is a network, data, a machine and all settings but budgets and seeds.

    Attributes:
        file: Where they are kept.
        earlier: Seconds of each stage; empty where no such run has finished here.
    """

    file: Path
    earlier: Mapping[str, float]

    def left(self, stages: Sequence[str], finished: str) -> float | None:
        """Return the seconds that the stages after one will take; ``None`` where that is unknown.

        Args:
            stages: All stages of the run, in order.
            finished: The stage that has just finished.
        """
        later = stages[stages.index(finished) + 1 :] if finished in stages else ()
        if not later or not set(later) <= set(self.earlier):
            return None
        return sum(self.earlier[stage] for stage in later)

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Keep what the stages of a finished run took; what cannot be written is done without."""
        with suppress(OutputError, OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, msgspec.json.encode(_Content(dict(seconds))).decode())


def times_of(record: RunRecord) -> RunTimes | None:
    """Return the times of runs like one that begins; ``None`` of a run without a folder."""
    if record.identity is None:
        return None
    digest = Digest()
    digest.text(f"{record.identity.network} {record.identity.data} {record.machine}")
    for name, value in sorted(record.identity.settings.items()):
        if name not in _OF_NO_WEIGHT:
            digest.text(f"{name} {value}")
    file = cache_folder().parent / "runs" / f"{digest.hexadecimal()[:32]}.json"
    try:
        earlier = msgspec.json.decode(file.read_bytes(), type=_Content).seconds
    except (OSError, msgspec.MsgspecError):
        earlier = {}  # none yet, or not a file of ours
    return RunTimes(file, earlier)


@dataclass(frozen=True)
class _Content:
    seconds: dict[str, float]
