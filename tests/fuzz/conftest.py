"""The records of other tests are what fuzzing starts from."""

import sys
from pathlib import Path

for room in ("report", "article"):
    sys.path.append(str(Path(__file__).parents[1] / room))
