"""How long a group of workers may make no step, and how long a worker waits for another: in this order.

A worker that waits for one that hangs must not give up first, or nobody would learn where the other stands.
"""

from pipeline.stores.patience import patience_s
from pipeline.training.train_config import WorkerConfig

_PATIENCE_FACTOR = 1.1
_PEER_MARGIN_S = 600.0


def hang_timeout_s(workers: WorkerConfig) -> float:
    """Seconds without a step after which a group counts as hung: longer than a server is waited for."""
    return max(workers.hang_timeout_s, _PATIENCE_FACTOR * patience_s())


def peer_timeout_s(workers: WorkerConfig) -> float:
    """Seconds that a worker waits for the others in a collective operation."""
    return hang_timeout_s(workers) + _PEER_MARGIN_S
