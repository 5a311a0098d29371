"""Labels → codes: guidance, filters, seeded draws, and the decoding loop over an engine."""

from llamagen_unitok.sampling.decoding import decode, generate
from llamagen_unitok.sampling.engines import ENGINES, engine_name
from llamagen_unitok.sampling.guidance import SCHEDULES
from llamagen_unitok.sampling.kept import release
from llamagen_unitok.sampling.settings import SamplingConfig

__all__ = ["ENGINES", "SCHEDULES", "SamplingConfig", "decode", "engine_name", "generate", "release"]
