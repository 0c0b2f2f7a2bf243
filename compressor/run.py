"""One run: what is asked, what measures, where files go, and how long it may take."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compressor.bench import Bench
from compressor.budget import Budget
from compressor.job import Job
from compressor.latency.device import Device
from compressor.run_folder import RunFolder
from compressor.search.study import Study
from compressor.values import Original, Progress, Trial

# Of what a machine says of itself; where they are the same, what it measured stays true.
MACHINE_KEYS = ("host", "machine", "model", "instruction_set", "n_cores", "runtime", "version")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """All that the parts of a run share.

    Attributes:
        job: What is compressed for what.
        bench: Measures plans.
        folder: Where files are left.
        budget: How long it may take.
        step_s: Seconds that a step of training is forecast to take; 0 where nothing is trained.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far it has come.
    """

    job: Job
    bench: Bench
    folder: RunFolder
    budget: Budget
    step_s: float
    on_trial: Callable[[Trial], None]
    on_progress: Callable[[Progress], None]

    def within(self, name: str, settings: Mapping[str, object]) -> "Run":
        """A part of it that leaves its files in a folder within this one's."""
        return replace(self, folder=self.folder.within(name, settings))


def measured_before(folder: RunFolder, study: Study, device: Device) -> Original | None:
    """What was measured of the original, where that was on the machine that is here now."""
    then = folder.read_manifest().get("device")
    now = device.describe()
    if not isinstance(then, dict) or any(then.get(key) != now.get(key) for key in MACHINE_KEYS):
        logger.warning("the run goes on on another machine; the original is measured again")
        return None
    return study.original()
