"""Settings: what they may be, and how they are written."""

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from compressor.plugins import Registry

MAX_INPUT = 2**28  # numbers of one image
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|min|m|h)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected a number with a unit, like 12ms, 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def _milliseconds(value: object) -> object:
    seconds = _seconds(value)
    return seconds * 1000 if isinstance(value, str) and isinstance(seconds, float) else value


def _not_too_large(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MAX_INPUT:
        raise ValueError(f"an input has at most {MAX_INPUT} numbers")
    return shape


InputShape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_not_too_large)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Std = Annotated[float, Field(ge=1e-6, le=1e6)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=1e8)]
Milliseconds = Annotated[float, BeforeValidator(_milliseconds), Field(ge=1e-6, le=3.6e6)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # all that TOML promises to hold


@dataclass(frozen=True)
class OneOf:
    """Takes the names in a registry and no others."""

    registry: Registry

    def __call__(self, name: str) -> str:
        """`name`.

        Raises:
            PydanticCustomError: It is not known.
        """
        if name not in self.registry:
            raise PydanticCustomError("not_known", "not known", {"known": list(self.registry)})
        return name
