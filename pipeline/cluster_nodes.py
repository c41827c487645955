"""The nodes of a Ray cluster: what they have, which answer, which are about to go.

A node that has died counts as alive with Ray for about half a minute: it is found by asking its port.
"""

import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state

_CONNECT_TIMEOUT_S = 2.0
_MAX_ASKED_AT_ONCE = 32
_NODE_LABEL = "ray.io/node-id"


def whole_cluster() -> dict[str, float]:
    """All that the cluster's nodes have, free or not, by Ray's names."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def fitting_nodes(needs: Mapping[str, float]) -> frozenset[str]:
    """Ids of the nodes that have, free or not, what something needs, by Ray's names."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return frozenset(node["NodeID"] for node in nodes if _covers(node["Resources"], needs))


def has_room(needs: Mapping[str, float]) -> bool:
    """Whether a node has so much that is free, by Ray's names."""
    return any(_covers(free, needs) for free in state.available_resources_per_node().values())  # type: ignore[no-untyped-call]


def silent_nodes() -> list[str]:
    """Ids of nodes that Ray counts as alive and that do not answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(_MAX_ASKED_AT_ONCE, thread_name_prefix="nodes") as pool:
        return [node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes)) if not answers]


def gone_nodes(ids: Iterable[str]) -> list[str]:
    """Which of some nodes are no longer there, or do not answer."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}  # type: ignore[no-untyped-call]
    return sorted({id for id in ids if not (id in nodes and nodes[id]["Alive"] and _answers(nodes[id]))})


def avoiding(nodes: list[str]) -> dict[str, str] | None:
    """The label selector that leaves nodes out; None where there are none."""
    return {_NODE_LABEL: f"!in({','.join(nodes)})"} if nodes else None  # Ray takes a space for part of a name


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that have given notice: Ray starts nothing new there, and they will go."""
    return frozenset(state.get_draining_nodes())  # no public function says so outside Ray Train


def _covers(there: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(there.get(kind, 0.0) >= amount for kind, amount in needs.items())


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
