"""What a user may ask for. Nothing here needs torch: flags are checked before it is imported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.values import PairedLatency, Side

SPEEDUP = "speedup"
MAX_LATENCY = "max-latency"
MAX_DROP = "max-drop"
MACS = "macs"
PARAMS = "params"

MAX_SPEEDUP = 1000.0  # that can be asked for


@dataclass(frozen=True)
class Constraint:
    """One limit as the user put it.

    Attributes:
        kind: `SPEEDUP` (times the original), `MAX_LATENCY` (milliseconds), `MAX_DROP` (points of
            accuracy), `MACS` or `PARAMS` (share of the original's).
        value: In the unit of `kind`.
    """

    kind: str
    value: float

    def min_speedup(self, original_ms: float) -> float:
        """The ratio original / candidate that a plan must reach; 0 where time is not limited."""
        if self.kind == MAX_LATENCY:
            return original_ms / self.value
        return self.value if self.kind == SPEEDUP else 0.0

    def is_met_in_time(self, pair: "PairedLatency", *, surely: bool = False) -> bool:
        """Whether the measured figure that the limit speaks of reaches it, if it is of time.

        Args:
            pair: What was measured.
            surely: Where the figure is unsure, the end of its interval has to reach it that
                noise does not.
        """
        share = pair.reached / pair.ratio if surely else 1.0
        if self.kind == MAX_LATENCY:
            return pair.candidate.median_ms <= share * self.value
        return self.kind != SPEEDUP or share * pair.ratio >= self.value

    def is_met(self, pair: "PairedLatency", original: "Side", compressed: "Side") -> bool:
        """Whether the limit is met, in time or else; not where noise alone may have reached it."""
        if self.kind == MAX_DROP:
            return 100 * (original.accuracy - compressed.accuracy) <= self.value
        if self.kind == MACS:
            return compressed.macs <= self.value * original.macs
        if self.kind == PARAMS:
            return compressed.params <= self.value * original.params
        return self.is_met_in_time(pair, surely=True)

    def __str__(self) -> str:
        if self.kind in (SPEEDUP, MAX_LATENCY):
            return f"{self.value:g}x" if self.kind == SPEEDUP else f"{self.value:g} ms"
        if self.kind == MAX_DROP:
            return f"a drop of at most {self.value:g} points"
        return f"{self.value:.0%} of the {'MACs' if self.kind == MACS else 'parameters'}"

    @property
    def flag(self) -> str:
        """As `compress` takes it."""
        if self.kind in (MACS, PARAMS):
            return f"--constraint {self.kind}={self.value:g}"
        return f"--{self.kind} {self.value:g}{'ms' if self.kind == MAX_LATENCY else ''}"
