"""A whole cluster as real processes on this machine: for ``shoal dev``, tests, the demo and benchmarks."""

from shoal.devcluster.cluster import DevCluster
from shoal.devcluster.server import Death, ServerProcess

__all__ = ["Death", "DevCluster", "ServerProcess"]
