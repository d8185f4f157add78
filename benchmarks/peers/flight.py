"""Arrow Flight, the way Arrow moves tables between machines.

The server streams the record batches of the mapped files from C++ (`RecordBatchStream`, no interpreter lock, no copy
into Python), 8 MiB a batch, so that framing costs nothing; the client takes each batch as it comes and lets it go.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.flight as flight

from benchmarks.harness import Outcome

SETTINGS = "pyarrow Flight: RecordBatchStream over mapped files, batches of 8 MiB, no TLS, one stream"

_servers: list[flight.FlightServerBase] = []


class _Server(flight.FlightServerBase):  # type: ignore[misc] # pyarrow has no type information
    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        return flight.RecordBatchStream(_table(ticket.ticket.decode()))


@functools.cache
def _table(path: str) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def serve() -> int:
    """Start the server in this worker and return its port."""
    server = _Server("grpc://127.0.0.1:0")
    _servers.append(server)
    threading.Thread(target=server.serve, daemon=True).start()
    return int(server.port)


@functools.cache
def _client(port: int) -> flight.FlightClient:
    return flight.connect(f"grpc://127.0.0.1:{port}")


def read(port: int, paths: Sequence[str]) -> Outcome:
    size = 0
    started = time.perf_counter()
    for path in paths:
        for chunk in _client(port).do_get(flight.Ticket(path.encode())):
            size += chunk.data.nbytes
    return Outcome(time.perf_counter() - started, size)
