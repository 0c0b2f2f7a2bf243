"""What is chosen by name: our own, and what installed packages bring.

A package brings a strategy of search, or an importance, by an entry point:

    [project.entry-points."compressor.strategies"]
    halving = "my_package.halving:Halving"

Names are known without importing anything, so that help, TAB and the check of a flag are quick. A
package that takes a name which is taken is told of and left out; one that cannot be used is an
error when it is asked for, and only then.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from compressor.errors import CompressorError, PluginError, unknown_name
from compressor.user_code import USER_CODE_FAILURES, told

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Registry:
    """Everything of one kind.

    Attributes:
        kind: In words, for messages.
        group: Of the entry points.
        built_in: Name -> "module:attribute".
        needs: Attributes that each of them must have.
    """

    kind: str
    group: str
    built_in: Mapping[str, str]
    needs: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        """Names, ours first."""
        return iter((*self.built_in, *self._found))

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._found

    def load(self, name: str) -> object:
        """The one of that name.

        Raises:
            PluginError: There is none, or its package cannot be used.
        """
        if name not in self:
            raise PluginError(unknown_name(self.kind, name, list(self)))
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(import_module(module), attribute)
        entry = self._found[name]
        brought = f"The {self.kind} {name!r} of the package {_package(entry)}"
        try:
            found: object = entry.load()
        except USER_CODE_FAILURES as err:
            raise PluginError(f"{brought} cannot be imported: {told(err)}.") from err
        missing = [need for need in self.needs if not hasattr(found, need)]
        if missing:
            raise PluginError(
                f"{brought} ({entry.value}) is none: it has no {' and no '.join(missing)}."
            )
        return found

    def flag(self, name: str) -> str:
        """What asks for the one of that name, and who brings it, for messages."""
        flag = f"--{self.kind} {name}"
        brought = self._found.get(name)
        return f"{flag} of the package {_package(brought)}" if brought else flag

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Within, code of the one of that name runs; a package's may raise what it likes.

        Raises:
            PluginError: In place of what a package's code raised, but for errors of ours.
        """
        try:
            yield
        except CompressorError:
            raise
        except USER_CODE_FAILURES as err:
            if name in self.built_in:
                raise
            raise PluginError(f"{self.flag(name)}: {told(err)}.") from err

    @cached_property
    def _found(self) -> dict[str, EntryPoint]:
        """Of installed packages."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            first = found.get(entry.name)
            if entry.name in self.built_in or first is not None:
                owner = f"the package {_package(first)}" if first else "compressor"
                what = f"the package {_package(entry)} brings a {self.kind} {entry.name!r}"
                logger.warning("%s, a name that %s has: it is left out", what, owner)
            else:
                found[entry.name] = entry
        return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


STRATEGIES = Registry(
    kind="search",
    group="compressor.strategies",
    built_in={
        "bocr": "compressor.search.bocr:Bocr",
        "bo": "compressor.search.bocr:PlainBo",
        "random": "compressor.search.baselines:RandomSearch",
        "tpe": "compressor.search.baselines:Tpe",
        "cma-es": "compressor.search.baselines:CmaEs",
        "genetic": "compressor.search.genetic:Genetic",
        "swarm": "compressor.search.swarm:Swarm",
    },
    needs=("needs", "from_config", "propose"),
)
# Those of ours that look at classes, which is refused early where there are none; packages say it
# by their `needs`.
LOOKING_AT_CLASSES = frozenset({"genetic", "swarm"})
IMPORTANCES = Registry(
    kind="importance",
    group="compressor.importances",
    built_in={
        "l1": "compressor.importance:L1",
        "l2": "compressor.importance:L2",
        "geometric-median": "compressor.importance:GEOMETRIC_MEDIAN",
        "bn-scale": "compressor.importance:BN_SCALE",
        "taylor": "compressor.importance:TAYLOR",
        "cpmc": "compressor.importance:CPMC",
        "random": "compressor.importance:RANDOM",
    },
    needs=("scores",),
)
