"""A run's metrics as Ray's, which every node offers to Prometheus beside its own."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "ddpm_"
"""Before the name that a metric has in MLflow; Ray puts `ray_` before that."""


class Gauges:
    """The latest value of each metric, with the run's name as its tag.

    Args:
        run_name: Tells runs of one cluster apart.
    """

    def __init__(self, run_name: str) -> None:
        """Offer nothing yet."""
        self._run_name = run_name
        self._gauges: dict[str, Gauge] = {}

    def show(self, metrics: Mapping[str, float]) -> None:
        """Offer new values; waits for nobody."""
        for name, value in metrics.items():
            if name not in self._gauges:
                shown = PREFIX + name.replace("/", "_")  # which a name for Prometheus cannot have
                self._gauges[name] = Gauge(shown, f"Training: {name}", tag_keys=("run",))
                self._gauges[name].set_default_tags({"run": self._run_name})
            self._gauges[name].set(value)
