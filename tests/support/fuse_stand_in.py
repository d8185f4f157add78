"""A daemon for tests of the supervisor: a few files of known bytes, and an end at whatever step a test wants.

Started as the real one is: ``python -m tests.support.fuse_stand_in --fd N --state-fd M --dataset NAME``. Where the
directory ``SHOAL_STAND_IN`` has a file named after a step, the step ends or stops the process; ``once-`` before the
name: the file goes first, so that the next one does not end there.

    start      before anything
    init       INIT is taken and not answered
    loaded     before it says that it is ready
    read       a READ is taken and not answered
    broken     while it loads
    say        ends with ``error: `` and the file's content
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import select
import signal
import stat
import struct
import sys
from functools import cache
from pathlib import Path

from shoal_csi import kernel

FILES, SIZE = 8, 1 << 20
_LOOKUP, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE, _INIT = 1, 3, 14, 15, 17, 18, 26
_OPENDIR, _READDIR, _RELEASEDIR = 27, 28, 29
_SILENT = (2, 42, 36)


@cache
def content(number: int) -> bytes:
    """What the file ``f{number}`` holds."""
    return random.Random(number).randbytes(SIZE)


def step(name: str) -> None:
    directory = Path(os.environ.get("SHOAL_STAND_IN", "/nonexistent"))
    if (directory / name).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):
        (directory / f"once-{name}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):
        (directory / f"stop-{name}").unlink()
        os.kill(os.getpid(), signal.SIGSTOP)


if Path(os.environ.get("SHOAL_STAND_IN", "/nonexistent"), "broken").exists():
    raise ImportError("broken")


class Server:
    def __init__(self, fd: int, state_fd: int) -> None:
        self.fd, self.state_fd = fd, state_fd
        self.is_over = False

    def run(self) -> int:
        with contextlib.suppress(OSError):
            kernel.resend(self.fd)
        reads, writes = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(writes)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_over", True))
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(reads, select.POLLIN)
        if os.fstat(self.state_fd).st_size:  # INIT was answered by a predecessor
            self.ready()
        while not self.is_over:
            events = dict(poll.poll())
            if events.get(self.fd, 0) & select.POLLERR:
                return 0
            if self.fd in events:
                try:
                    request = os.read(self.fd, (1 << 20) + 4096)
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return 0
                    continue
                self.answer(request)
        return 0

    def ready(self) -> None:
        step("loaded")
        print("ready", json.dumps({"pid": os.getpid()}), flush=True)

    def reply(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(OSError):
            os.write(self.fd, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)

    def answer(self, request: bytes) -> None:
        length, operation, unique, node = struct.unpack_from("<IIQQ", request)
        body = request[40:length]
        match operation:
            case _ if operation == _INIT:
                step("init")
                os.pwrite(self.state_fd, b"init", 0)
                flags = struct.unpack_from("<IIII", body)[3] & (1 | 1 << 22)
                more = (0,) * 8
                self.reply(
                    unique, struct.pack("<4I2H2I2H2I6I", 7, 40, 1 << 17, flags, 64, 48, 1 << 20, 1, 32, 0, *more)
                )
                self.ready()
            case _ if operation == _LOOKUP:
                name = body.rstrip(b"\0").decode()
                if name[:1] == "f" and name[1:].isdecimal() and int(name[1:]) < FILES:
                    found = 2 + int(name[1:])
                    self.reply(unique, struct.pack("<4Q2I", found, 0, 3600, 3600, 0, 0) + attributes(found))
                else:
                    self.reply(unique, error=errno.ENOENT)
            case _ if operation == _GETATTR:
                self.reply(unique, struct.pack("<QII", 3600, 0, 0) + attributes(node))
            case _ if operation in (_OPEN, _OPENDIR):
                # direct_io: each read asks; noflush: no close does, for which every process that is started would wait.
                self.reply(unique, struct.pack("<QII", 1, 1 | 1 << 5 if operation == _OPEN else 0, 0))
            case _ if operation == _READ:
                step("read")
                _, offset, count = struct.unpack_from("<QQI", body)
                self.reply(unique, content(node - 2)[offset : offset + count])
            case _ if operation == _READDIR:
                offset = struct.unpack_from("<QQ", body)[1]
                entries = [(2 + n, f"f{n}".encode()) for n in range(FILES)]
                self.reply(unique, b"".join(entry(i, *each) for i, each in enumerate(entries) if i >= offset))
            case _ if operation == _STATFS:
                self.reply(unique, struct.pack("<5Q4I", 1, 0, 0, 1, 1, 4096, 255, 4096, 0) + b"\0" * 24)
            case _ if operation in (_RELEASE, _RELEASEDIR):
                self.reply(unique)
            case _ if operation not in _SILENT:
                self.reply(unique, error=errno.ENOSYS)


def attributes(node: int) -> bytes:
    mode, size = (stat.S_IFDIR | 0o755, 4096) if node == 1 else (stat.S_IFREG | 0o444, SIZE)
    return struct.pack("<6Q10I", node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def entry(index: int, node: int, name: bytes) -> bytes:
    plain = struct.pack("<QQII", node, index + 1, len(name), stat.S_IFREG >> 12) + name
    return plain + b"\0" * (-len(plain) % 8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--state-fd", type=int, required=True)
    for name in ("--dataset", "--subpath", "--endpoint"):
        parser.add_argument(name, default="")
    options = parser.parse_args()
    said = Path(os.environ.get("SHOAL_STAND_IN", "/nonexistent"), "say")
    if said.exists():
        sys.exit(f"error: {said.read_text()}")
    step("start")
    sys.exit(Server(options.fd, options.state_fd).run())


if __name__ == "__main__":
    main()
