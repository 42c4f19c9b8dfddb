"""The logger of lines that a run says of itself; commands show them as they come."""

import logging

LOGGER = logging.getLogger("onebyone.run")
