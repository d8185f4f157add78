"""What the driver asks the cluster: which datasets there are, and which snapshot a volume shows.

The rule: a volume that names its whole digest is published without a question, so a controller that is away stops only
those that want the newest.
"""

from __future__ import annotations

from shoal import cluster, datasets
from shoal.datasets import DatasetRecord
from shoal.errors import InvalidRequest
from shoal_csi.volume import Volume


class Catalog:
    """The datasets of one cluster. It is first asked when a call needs it: a driver starts without any cluster.

    Args:
        endpoint: see `shoal.cluster.parse_endpoint`; "" for what the environment says.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def record(self, dataset: str) -> DatasetRecord:
        """The dataset as it is now.

        Raises:
            DatasetNotFound: there is none of that name.
            ClusterUnavailable: nobody answers.
        """
        return cluster.connect(self._endpoint or None).dataset(dataset)

    def snapshot(self, volume: Volume) -> str:
        """The digest that the volume shows if it is published now.

        Raises:
            DatasetNotFound, SnapshotNotFound: there is none.
            ClusterUnavailable: nobody answers.
        """
        try:
            return datasets.check_digest(volume.wanted_snapshot)
        except InvalidRequest:
            return datasets.choose_snapshot(self.record(volume.dataset), volume.wanted_snapshot)
