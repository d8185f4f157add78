"""Context managers of things that are started piece by piece: all of it is there within the block, or none is left."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Startable(abc.ABC):
    """What is half started when `start` fails, or is interrupted, is closed as what is whole would be."""

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Remove whatever there is by now; the second call does nothing."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
