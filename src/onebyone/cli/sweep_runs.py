"""What a worker of a sweep does with the command line of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onebyone.cli.loading import data_of, load_asked, run_settings
from onebyone.cli.sweep_trials import parsed
from onebyone.core.settings.runs import ShrinkSettings


def shrunk_quietly(command: Sequence[str]) -> str:
    """Make the run of a command line, going on with what is in its folder.

    Args:
        command: ``onebyone shrink …`` with ``--out``.

    Returns:
        The message of the error; empty if the run has finished.
    """
    from onebyone.cli.boundary import message_of
    from onebyone.pipeline.shrink import shrink_loaded

    try:
        args = parsed(command)
        settings = replace(run_settings(args, ShrinkSettings), resume=True)
        loaded = load_asked(args, needs_weights=True)
        shrink_loaded(loaded.model, loaded.source, data_of(args), settings)
    except Exception as error:  # noqa: BLE001 - it is a row of a table
        return message_of(error, command[1:])
    return ""


def identified(command: Sequence[str]) -> tuple[str, str]:
    """Return the hashes of the network and of the data of a command line."""
    from onebyone.data.hashing import hash_data
    from onebyone.networks.hashing import hash_network
    from onebyone.networks.surgery import evaluation_copy

    args = parsed(command)
    network = evaluation_copy(load_asked(args, needs_weights=True).model, device="cpu")
    return hash_network(network), hash_data(data_of(args))
