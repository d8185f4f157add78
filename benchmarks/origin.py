"""How a client reaches the S3 server of a run. In a module of its own because it travels to every worker, which shall
import no more than its contender needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Origin:
    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def storage_options(self) -> dict[str, Any]:
        """fsspec's."""
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint_url}
