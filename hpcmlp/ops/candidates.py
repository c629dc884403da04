"""The ways there are to compute each matrix product, the library's and our own, and the choice among them by timing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAKERS = ("library", "own")
AND = " & "     # between the names of products that are chosen together


@dataclass(eq=False)
class Ways:
    """The ways to compute a product, those of the library first.

    names : of the ways, by maker; unique. ways : what the device needs to run each of them.
    choice : place of the one in use. seconds : of each, where they were timed.
    """

    names: list[str]
    ways: list[Any]
    makers: list[str]
    choice: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def chosen(self) -> Any:
        return self.ways[self.choice]

    def of(self, maker: str) -> list[int]:
        """Return the places of the ways of one maker. Local."""
        return [k for k, name in enumerate(self.makers) if name == maker]


def offer(library: list[tuple[str, Any]], own: list[tuple[str, Any]], makers: tuple[str, ...] = MAKERS) -> Ways:
    """Return the ways of `makers`, or of any maker where these have none. Local."""
    offered = dict(zip(MAKERS, (library, own), strict=True))
    kept = [(maker, *way) for maker in makers for way in offered[maker]] \
        or [(maker, *way) for maker in MAKERS for way in offered[maker]]
    return Ways([name for _, name, _ in kept], [way for _, _, way in kept], [maker for maker, _, _ in kept])


def agree(one: Ways, other: Ways) -> bool:
    """Set two products that share a mask to the first maker that both have; False without one. Local."""
    for maker in MAKERS:
        if one.of(maker) and other.of(maker):
            one.choice, other.choice = one.of(maker)[0], other.of(maker)[0]
            return True
    return False


def choose(launches: list[Any], known: dict[str, str], seconds: Callable[[Any, int], float]) -> dict[str, str]:
    """Choose a way for every product (`launches.Multiply`), and return the names of the choices by the products' keys.

    Local. `known` choices are taken over where they are still offered: sums keep their order then, and bits their
    values. `seconds(launch, place)` times one way. A product that writes relu's mask and the one that reads it are of
    the same maker, as only the maker knows how the mask looks.
    """
    chosen = dict(known)
    for group in _groups(launches):
        key = AND.join(launch.name for launch in group)
        names = chosen.get(key, "").split(AND)
        if not _possible(group, names):
            names = _fastest(group, seconds)
            chosen[key] = AND.join(names)
        for launch, name in zip(group, names, strict=True):
            launch.ways.choice = launch.ways.names.index(name)
    return chosen


def _groups(launches: list[Any]) -> list[list[Any]]:
    """Products that share a mask, and each of the others by itself."""
    groups: dict[int, list[Any]] = {}
    for launch in launches:
        groups.setdefault(id(launch if launch.product.aux is None else launch.product.aux), []).append(launch)
    return list(groups.values())


def _possible(group: list[Any], names: list[str]) -> bool:
    if len(names) != len(group) or any(n not in launch.ways.names for launch, n in zip(group, names, strict=True)):
        return False
    return len({launch.ways.makers[launch.ways.names.index(n)] for launch, n in zip(group, names, strict=True)}) == 1


def _fastest(group: list[Any], seconds: Callable[[Any, int], float]) -> list[str]:
    """The names of the fastest ways that are of one maker."""
    for launch in group:
        launch.ways.seconds = [seconds(launch, place) for place in range(len(launch.ways.names))]
    totals = {}
    for maker in MAKERS:
        if all(launch.ways.of(maker) for launch in group):
            places = [min(launch.ways.of(maker), key=launch.ways.seconds.__getitem__) for launch in group]
            totals[maker] = (sum(launch.ways.seconds[k] for launch, k in zip(group, places, strict=True)), places)
    _, places = min(totals.values(), key=lambda total: total[0])    # the library's where they are equal
    return [launch.ways.names[k] for launch, k in zip(group, places, strict=True)]
