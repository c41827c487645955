"""A run's metrics where Prometheus would fetch them."""

import time

import requests

from pipeline.training.metrics.gauges import Gauges

_WAIT_S = 300.0


def show_for_a_while(metrics: dict[str, float]) -> None:
    """In a worker, as rank 0 is one: Ray passes values on every few seconds, while their process lives."""
    Gauges("digits-1").show(metrics)
    time.sleep(_WAIT_S)


def test_a_nodes_page_for_prometheus_has_them(ray_session: None) -> None:
    import ray

    shown = ray.remote(num_cpus=0)(show_for_a_while).remote({"loss": 0.25, "system/node_0/cpu_utilization": 50.0})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    page = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    deadline_s, found = time.monotonic() + _WAIT_S, ""
    while time.monotonic() < deadline_s and "ddpm_loss" not in found:
        found = requests.get(page, timeout=60).text
        time.sleep(0.5)
    ray.cancel(shown, force=True)
    (line,) = [line for line in found.splitlines() if line.startswith("ray_ddpm_loss{")]
    assert 'run="digits-1"' in line and line.endswith(" 0.25")
    assert "ray_ddpm_system_node_0_cpu_utilization{" in found
