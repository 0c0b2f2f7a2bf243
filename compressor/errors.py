"""Everything compressor raises on purpose.

    CompressorError
    |-- ConfigError             a flag, compress.toml or a profile says something impossible
    |-- ModelError              the model file or its architecture cannot be used
    |   `-- UntrustedModelError     reading the file would run code from it
    |-- DataError               images or labels cannot be used
    |-- GraphError              the network cannot be traced, or nothing in it can be pruned
    |-- PlanError               a plan names unknown groups or channels
    |-- EngineError             a foreign pruning engine cannot process the network
    |-- EquivalenceError        two models that must agree do not
    |-- ExportError             the ONNX file could not be written as asked
    |-- MeasurementError        the runtime could not run or time a model
    |-- SearchError             no trial of a search gave a measurement
    |-- InterruptedRunError     the user stopped a run; its folder can still be read
    `-- RunFolderError          a run folder cannot be written or read

A message says what was expected, what came, where, and what to do.
"""

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    """Base of every error a caller can cause."""


class ConfigError(CompressorError):
    """A flag, `compress.toml` or a profile says something impossible."""


class ModelError(CompressorError):
    """The model file or its architecture cannot be used."""


class UntrustedModelError(ModelError):
    """Reading the file would run code from it, and nobody said that it is trusted."""


class DataError(CompressorError):
    """Images or labels cannot be used."""


class GraphError(CompressorError):
    """The network cannot be traced, or nothing in it can be pruned."""


class PlanError(CompressorError):
    """A plan names unknown groups or channels."""


class EngineError(CompressorError):
    """A foreign pruning engine cannot process the network."""


class EquivalenceError(CompressorError):
    """Two models that must agree do not."""


class ExportError(CompressorError):
    """The ONNX file could not be written as asked."""


class MeasurementError(CompressorError):
    """The runtime could not run or time a model."""


class SearchError(CompressorError):
    """No trial of a search gave a measurement."""


class InterruptedRunError(CompressorError):
    """The user stopped a run; its folder can still be read."""


class RunFolderError(CompressorError):
    """A run folder cannot be written or read."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for every unknown name: what came, what was probably meant, what is known.

    Example:
        >>> unknown_name("target", "host-gpu", ["host-cpu", "jetson-nano"])
        "Unknown target 'host-gpu'. Did you mean 'host-cpu'? Known: host-cpu, jetson-nano."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
