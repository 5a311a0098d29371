"""How to sample: one place for the defaults, the checks and the help that command-line flags are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.sampling.guidance import SCHEDULES, guidance_scales
from llamagen_unitok.sampling.seeds import MAX_SEED


def _setting(default, flag: str, help: str, **more):
    return field(default=default, metadata={"flag": flag, "help": help, **more})


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings; raises ValueError, in one line that names the setting and its flag, for impossible ones.

    Field metadata: `flag`, `help`, `type` (of the flag's value), `choices` where they are few.
    """

    cfg_scale: float = _setting(1.0, "--cfg", "guidance scale; 1 is no guidance, 0 ignores the class", type=float)
    cfg_schedule: str = _setting(
        "constant", "--cfg-schedule", "how guidance grows over the positions", type=str, choices=tuple(SCHEDULES)
    )
    cfg_power: float = _setting(1.0, "--cfg-power", "exponent of the power-cosine schedule", type=float)
    cfg_interval: int | None = _setting(
        None, "--cfg-interval", "N: guide positions 0 to N+1 only (default: all)", type=int
    )
    temperature: float = _setting(1.0, "--temperature", "divides the logits; 0 takes the likeliest code", type=float)
    top_k: int = _setting(0, "--top-k", "keep the k likeliest codes; 0 keeps all", type=int)
    top_p: float = _setting(1.0, "--top-p", "keep the likeliest codes up to this probability, in (0, 1]", type=float)
    seed: int = _setting(0, "--seed", "picture i of seed s is always the same", type=int)

    def __post_init__(self) -> None:
        self._check("cfg_scale", 0 <= _finite(self.cfg_scale), "a finite number of at least 0")
        self._check("cfg_schedule", self.cfg_schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("cfg_power", 0 < _finite(self.cfg_power), "a finite number above 0")
        whole = self.cfg_interval is None or 0 <= _whole(self.cfg_interval)
        self._check("cfg_interval", whole, "a whole number of at least 0, or left out to guide all positions")
        self._check("temperature", 0 <= _finite(self.temperature), "a finite number of at least 0")
        self._check("top_k", 0 <= _whole(self.top_k), "a whole number of at least 0 (0 keeps all codes)")
        self._check("top_p", 0 < _finite(self.top_p) <= 1, "above 0 and at most 1 (1 keeps all codes)")
        self._check("seed", 0 <= _whole(self.seed) <= MAX_SEED, "a whole number from 0 to 2^64 - 1")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = self.__dataclass_fields__[name].metadata["flag"]
            raise ValueError(f"{flag} ({name}) must be {expected}, got {getattr(self, name)!r}")

    def check_generator(self, config: GPTConfig) -> None:
        """Raise ValueError when a generator of this architecture cannot follow these settings."""
        if self.cfg_scale != 1 and not config.has_null_class:
            raise ValueError(
                f"--cfg {self.cfg_scale:g} needs a null class, but this generator was trained without label dropout "
                "and has none (has_null_class=False): use --cfg 1, or a generator trained with class dropout"
            )

    def scales(self, num_positions: int) -> list[float]:
        """The guidance scale at each position; 1 where there is no guidance."""
        return guidance_scales(num_positions, self.cfg_scale, self.cfg_schedule, self.cfg_power, self.cfg_interval)


def _finite(value: object) -> float:
    """The number, or nan, which no comparison accepts, for anything that is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else math.nan


def _whole(value: object) -> float:
    return value if isinstance(value, int) and not isinstance(value, bool) else math.nan
