"""``python -m onebyone`` is the command ``onebyone``."""

from onebyone.cli import main

raise SystemExit(main())
