"""How fast a model was sampled from: what a job has measured, kept with the model's version for those that plan one."""

import hashlib
from dataclasses import dataclass

from pipeline import config_io
from pipeline.models.network_pass import Precision

_LONG_S = 60.0  # of measuring: what is as long replaces whatever stood before, since software changes


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRate:
    """Img·NFE/s (images times network evaluations of each) of one actor, and all that it depends on beside the model.

    The sampler is not in it: the network takes nearly all of the time.
    """

    format_version: int = 2
    """Version of this record."""
    device: str
    """Kind of device, as commit records have it: "cpu", or the GPU's name."""
    cpus_per_actor: int
    """CPUs, and threads of torch, of the actor."""
    batch_size: int
    """Images per network evaluation."""
    precision: Precision
    """How the network was evaluated."""
    channels_last: bool
    """Whether channels were innermost."""
    compile: bool
    """Whether the network was compiled."""
    evaluations_per_s: float
    """Img·NFE/s from the first shard given to an actor to its last one made."""
    busy_s: float
    """Over how many seconds of actors that was measured."""

    @property
    def setting(self) -> str:
        """A name, 16 hex digits, of everything but the figure."""
        fixed = {
            name: getattr(self, name)
            for name in ("device", "cpus_per_actor", "batch_size", "precision", "channels_last", "compile")
        }
        return hashlib.sha256(config_io.to_json(fixed)).hexdigest()[:16]

    def replaces(self, standing: "SamplingRate") -> bool:
        """Whether this newer figure is to stand instead: a run of a few images says less than one of hours."""
        return self.busy_s >= min(standing.busy_s, _LONG_S)
