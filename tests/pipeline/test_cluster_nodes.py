"""Nodes that answer, and those that only Ray takes for alive."""

import socket

import pytest
import ray

from pipeline import cluster_nodes
from pipeline.cluster_nodes import (
    avoiding,
    draining_nodes,
    fitting_nodes,
    gone_nodes,
    has_room,
    silent_nodes,
    whole_cluster,
)


@pytest.mark.usefixtures("ray_session")
def test_what_ray_says_of_itself() -> None:
    """Its function for draining nodes is not public: this is where a version without it would be noticed."""
    assert whole_cluster()["CPU"] == 2 and draining_nodes() == frozenset() and silent_nodes() == []
    node = ray.get_runtime_context().get_node_id()
    assert gone_nodes([node]) == []
    assert fitting_nodes({"CPU": 2.0}) == {node} and fitting_nodes({"CPU": 3.0}) == frozenset()
    assert has_room({"CPU": 0.0}) and not has_room({"CPU": 3.0}) and not has_room({"CPU": 1.0, "GPU": 1.0})


def test_no_selector_where_nothing_is_left_out() -> None:
    assert avoiding([]) is None
    assert avoiding(["a", "b"]) == {"ray.io/node-id": "!in(a,b)"}


def test_a_node_is_silent_when_its_port_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there, gone = listening.getsockname()[1], socket.create_server(("127.0.0.1", 0))
        port_of_gone = gone.getsockname()[1]
        gone.close()
        nodes = [
            {"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": there},
            {"NodeID": "b", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port_of_gone},
            {"NodeID": "c", "Alive": False, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": there},
        ]
        monkeypatch.setattr(cluster_nodes.ray, "nodes", lambda: nodes)
        assert silent_nodes() == ["b"]
        assert gone_nodes(["a", "b", "b", "c", "d"]) == ["b", "c", "d"]
