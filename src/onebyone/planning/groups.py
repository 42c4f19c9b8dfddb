"""Options of groups of layers that share channels, with their cost, error and harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from onebyone.core.records import LayerCost, Option, Settings
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.surgery import replaced
from onebyone.planning.applicability import is_left
from onebyone.planning.harm import Measured, SiteHarms, places_to_measure
from onebyone.rewrites.low_rank.reduced_rank import Problem
from onebyone.rewrites.registry import group_rewrite, group_rewrites


@dataclass(frozen=True)
class GroupSite:
    """A group of layers that one rewrite takes, and its options by their cost alone."""

    rewrite: str
    group: ChannelGroup
    options: tuple[Option, ...]


def group_sites(
    network: nn.Module,
    example: Inputs,
    layers: Mapping[str, LayerCost],
    *,
    free: Sequence[str],
    leave: Sequence[str] = (),
) -> list[GroupSite]:
    """Return the groups of a network that rewrites take, and their options.

    Args:
        network: Not modified.
        example: An input.
        layers: By name, as they were seen.
        free: Layers that may be rewritten; others are no readers of a group.
        leave: Names of modules to leave alone, with all inside them.
    """
    found = []
    for rewrite, how in group_rewrites().items():
        for group in how.find(network, example).groups:
            if not set(group.readers) <= set(free):
                continue
            if any(is_left(name, leave) for name in group.members):
                continue
            options = group_options(rewrite, network, group, layers, how.grid(group))
            paying = tuple(o for o in options if o.saved.macs > 0 and o.saved.params > 0)
            if paying:
                found.append(GroupSite(rewrite, group, paying))
    return found


def group_options(
    rewrite: str,
    network: nn.Module,
    group: ChannelGroup,
    layers: Mapping[str, LayerCost],
    asked: Sequence[Settings],
) -> list[Option]:
    """Return the options of a group for some settings, by their cost alone.

    Args:
        rewrite: A rewrite of groups.
        network: Not modified.
        group: The layers.
        layers: By name, as they were seen.
        asked: Settings of the rewrite.
    """
    how = group_rewrite(rewrite)
    before = how.cost(network, group, layers, None)
    return [
        Option.of(
            rewrite,
            settings,
            site=group.site,
            before=before,
            after=how.cost(network, group, layers, settings),
            occupies=group.members,
        )
        for settings in asked
    ]


class GroupProblems:
    """Collects what the readers of groups see, one reader after the other."""

    def __init__(self, sites: Sequence[GroupSite]) -> None:
        self._waiting = list(sites)
        self._problems: dict[str, Problem] = {}

    def needs(self, name: str) -> bool:
        """Whether a layer is a reader of a group."""
        return any(name in site.group.readers for site in self._waiting)

    def seen(self, name: str, problem: Problem) -> Iterator[tuple[GroupSite, list[Problem]]]:
        """Note what a layer sees; yield the groups all readers of which have been seen now."""
        if self.needs(name):
            self._problems[name] = problem
        for site in list(self._waiting):
            readers = site.group.readers
            if all(reader in self._problems for reader in readers):
                self._waiting.remove(site)
                yield site, [self._problems[reader] for reader in readers]
        needed = {reader for site in self._waiting for reader in site.group.readers}
        self._problems = {n: p for n, p in self._problems.items() if n in needed}


def judged(
    site: GroupSite,
    network: nn.Module,
    problems: Sequence[Problem],
    *,
    probes: int,
    harm_with: Callable[[str, nn.Module], Measured],
) -> tuple[tuple[Option, ...], SiteHarms]:
    """Return a group's options in order of their error, and what is known of their harm.

    Args:
        site: The group.
        network: Its readers are replaced meanwhile.
        problems: Of each reader.
        probes: Options whose harm is measured, at most.
        harm_with: Gives how far the outputs move with one module replaced.

    Raises:
        ModelError: If outputs are not finite.
        torch.linalg.LinAlgError: If the equations cannot be solved.
    """
    fits = group_rewrite(site.rewrite).fits(network, site.group, problems)
    options = [replace(o, error=fits.error(o.first.settings)) for o in site.options]
    options.sort(key=lambda option: option.error or 0.0)
    measured: dict[int, Measured] = {}
    for place in places_to_measure(len(options), probes):
        (first, new), *others = fits.stand_ins(options[place].first.settings).items()
        with replaced(network, dict(others)):
            measured[place] = harm_with(first, new)
    felt = sum(problem.felt for problem in problems) / 2
    predicted = [felt * (option.error or 0.0) for option in options]
    return tuple(options), SiteHarms.of(predicted, measured)
