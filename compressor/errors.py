"""Everything compressor raises on purpose.

    CompressorError
    |-- ConfigError             a flag, compress.toml or a profile says something impossible
    |   `-- PluginError             a package that brings what was asked for cannot be used
    |-- ModelError              the model file or its architecture cannot be used
    |   `-- UntrustedModelError     reading the file would run code from it
    |-- DataError               images or labels cannot be used
    |-- TaskError               a task of the user's own lacks something, or failed
    |-- GraphError              the network cannot be traced, or nothing in it can be pruned
    |-- PlanError               a plan names unknown groups or channels
    |-- EngineError             a foreign pruning engine cannot process the network
    |-- EquivalenceError        two models that must agree do not
    |-- ExportError             the ONNX file could not be written as asked
    |-- MeasurementError        one model could not be run or timed; in a search, a failed trial
    |   |-- UnsupportedModelError   the runtime does not take the model; its node is quoted
    |   |-- OutOfMemoryError        the device has not enough memory for the model
    |   |-- TimeLimitError          building or running took longer than it may
    |   |-- RuntimeCrashError       the runtime's process died
    |   |-- TrainingError           the network, or its loss, failed while it was trained
    |   `-- UnstableClockError      the clock or the clock rates cannot be trusted
    |-- DeviceError             the device as a whole; nothing can be measured on it now
    |   |-- UnreachableError        no answer, or not the machine of the profile
    |   |-- AuthenticationError     it answers, but does not let us in
    |   |-- HostKeyError            it cannot prove to be the machine that is known
    |   |-- RuntimeMissingError     the runtime, or the provider asked for, is not installed
    |   |-- DeviceBusyError         another search uses it
    |   |-- ProtocolError           it answers with something that is no answer
    |   `-- DeviceLostError         it was there and went away
    |-- SearchError             no trial of a search gave a measurement
    |-- InterruptedRunError     the user stopped a run; its folder can still be read
    `-- RunFolderError          a run folder cannot be written or read
        `-- ForeignStudyError       something else wrote its study, or what lies beside it

A message says what was expected, what came, where, and what to do.
"""

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    """Base of every error a caller can cause."""


class ConfigError(CompressorError):
    """A flag, `compress.toml` or a profile says something impossible."""


class PluginError(ConfigError):
    """A package that brings what was asked for cannot be used."""


class ModelError(CompressorError):
    """The model file or its architecture cannot be used."""


class UntrustedModelError(ModelError):
    """Reading the file would run code from it, and nobody said that it is trusted."""


class DataError(CompressorError):
    """Images or labels cannot be used."""


class TaskError(CompressorError):
    """A task of the user's own lacks something, or failed."""


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
    """One model could not be run or timed; in a search, a failed trial."""


class UnsupportedModelError(MeasurementError):
    """The runtime does not take the model."""


class OutOfMemoryError(MeasurementError):
    """The device has not enough memory for the model."""


class TimeLimitError(MeasurementError):
    """Building or running took longer than it may."""


class RuntimeCrashError(MeasurementError):
    """The runtime's process died."""


class TrainingError(MeasurementError):
    """The network, or its loss, failed while it was trained."""


class UnstableClockError(MeasurementError):
    """The clock, or the clock rates of the device, cannot be trusted."""


class DeviceError(CompressorError):
    """The device as a whole; nothing can be measured on it now."""


class UnreachableError(DeviceError):
    """No answer, or not the machine of the profile."""


class AuthenticationError(DeviceError):
    """The device answers, but does not let us in."""


class HostKeyError(DeviceError):
    """The device cannot prove to be the machine that is known."""


class RuntimeMissingError(DeviceError):
    """The runtime, or the provider asked for, is not installed on the device."""


class DeviceBusyError(DeviceError):
    """Another search uses the device."""


class ProtocolError(DeviceError):
    """The device answers with something that is no answer."""


class DeviceLostError(DeviceError):
    """The device was there and went away."""


class SearchError(CompressorError):
    """No trial of a search gave a measurement."""


class InterruptedRunError(CompressorError):
    """The user stopped a run; its folder can still be read."""


class RunFolderError(CompressorError):
    """A run folder cannot be written or read."""


class ForeignStudyError(RunFolderError):
    """Something else wrote a study, or what lies beside it; a killed run leaves nothing such."""


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
