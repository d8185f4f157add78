"""iperf3: what one TCP stream over loopback gives on this machine.

Its JSON has the receiver's own figures. The congestion control matters on loopback as much as on a network, so both the
system's default and CUBIC, Linux's own default, are run where the kernel has them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Missing, Outcome

SETTINGS = "iperf3: one stream, its default 128 KiB writes; default congestion control, CUBIC (-C), and sendfile (-Z)"
START_TIMEOUT_S = 10.0
LEAST_BYTES = 64 << 20
#: Its client then sends a file without copying, as no program with bytes in its memory can.
SENDFILE = "iperf3 -Z"


def variants() -> list[tuple[str, tuple[str, ...]]]:
    """Names and options that this kernel allows."""
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    cubic = ("--congestion", "cubic") if "cubic" in available else ()
    found: list[tuple[str, tuple[str, ...]]] = [("iperf3", ()), (SENDFILE, ("--zerocopy", *cubic))]
    if cubic:
        found.insert(1, ("iperf3 cubic", cubic))
    return found


@contextlib.contextmanager
def server() -> Iterator[tuple[int, int]]:
    """Yields its port and process id."""
    program = shutil.which("iperf3")
    if program is None:
        raise Missing("iperf3 is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, "--server", "--bind", "127.0.0.1", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        # A connection would count as a test's, so whether it listens is read from the kernel.
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"iperf3 --server did not start (exit status {process.poll()})")
            time.sleep(0.01)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def send(port: int, size_bytes: int, options: tuple[str, ...]) -> Outcome:
    """One test. Runs in a worker, whose child the client is, so that its CPU time is the worker's.

    It lasts until all is sent, and what is on its way then is not counted: a short one would say too little.
    """
    size_bytes = max(size_bytes, LEAST_BYTES)
    command = ["iperf3", "--client", "127.0.0.1", "--port", str(port), "--bytes", str(size_bytes), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout or "{}")
    if done.returncode or "error" in answer:
        raise RuntimeError(f"{' '.join(command)}: {answer.get('error') or done.stderr}")
    received = answer["end"]["sum_received"]
    return Outcome(float(received["seconds"]), int(received["bytes"]))


def _listens(port: int) -> bool:
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == "0A" for fields in lines)
