"""What is checked before Ray starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import ClusterConfig, ray_session
from pipeline.errors import ConfigError
from tests.processes import environment

# A process of its own: the tests' Ray may run in this one already.
STARTS = """
from ray._private.utils import validate_socket_filepath
from pipeline import cluster

os_path = []
cluster.ray.init = lambda **options: print("ray starts")
with cluster.ray_session(cluster.ClusterConfig()):
    pass
"""


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in environment().items() if name not in ("TMPDIR", "RAY_TMPDIR")}
    return subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, env=without | variables)
