"""The bytes on /dev/fuse: layouts, and a server that is sent anything at all."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import snapshot as snapshots
from shoal.datasets import DatasetRecord
from shoal.reader import ObjectReader
from shoal.snapshot import Snapshot
from shoal_csi import protocol
from shoal_csi.protocol import IN_HEADER, OUT_HEADER, Attributes, Init, Malformed, Offer, Opcode
from shoal_csi.server import Served, Server
from shoal_csi.state import State
from shoal_csi.tree import Tree

EVERYTHING = (1 << 42) - 1


def request(opcode: int, body: bytes = b"", node: int = 1, unique: int = 2) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body


def test_a_header_comes_apart() -> None:
    header, body = protocol.parse_header(memoryview(request(Opcode.LOOKUP, b"name\0", node=7, unique=1 << 63 | 4)))
    assert header == (Opcode.LOOKUP, 1 << 63 | 4, 7, 1)
    assert protocol.parse_name(body) == b"name"


@pytest.mark.parametrize("wrong", [b"", b"\0" * 39, request(1) + b"x", request(1)[:-1]])
def test_what_is_no_request(wrong: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse_header(memoryview(wrong))


@pytest.mark.parametrize("wrong", [b"", b"no end", b"two\0ends\0"])
def test_what_is_no_name(wrong: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse_name(memoryview(wrong))


def test_the_second_word_of_flags_counts_only_where_it_is_announced() -> None:
    body = struct.pack("<5I", 7, 45, 1 << 20, int(Init.INIT_EXT) | 1, 1 << 5) + bytes(44)
    assert protocol.parse_init(memoryview(body)) == Offer(7, 45, 1 << 20, Init.INIT_EXT | Init.PASSTHROUGH | 1)
    body = struct.pack("<5I", 7, 30, 1 << 20, 1, 1 << 5) + bytes(44)
    assert protocol.parse_init(memoryview(body)).flags == 1


def test_terms_are_what_both_sides_have() -> None:
    offer = Offer(7, 45, 1 << 20, EVERYTHING)
    terms = protocol.negotiate(offer, passthrough=True, silent_opens=False, max_readahead=1 << 22)
    assert terms.passthrough
    assert terms.has_resend
    assert not terms.opens_silently
    assert terms.minor == 40
    old = Offer(7, 31, 1 << 20, EVERYTHING & ~Init.PASSTHROUGH & ~Init.HAS_RESEND)
    terms = protocol.negotiate(old, passthrough=True, silent_opens=False, max_readahead=1 << 22)
    assert not terms.passthrough
    assert not terms.has_resend
    assert terms.minor == 31
    silent = protocol.negotiate(offer, passthrough=True, silent_opens=True, max_readahead=1 << 22)
    assert silent.opens_silently
    assert not silent.passthrough


@given(st.booleans())
def test_the_answer_to_init(passthrough: bool) -> None:
    offer = Offer(7, 45, 1 << 20, EVERYTHING)
    terms = protocol.negotiate(offer, passthrough=passthrough, silent_opens=False, max_readahead=1 << 22)
    packed = protocol.pack_init(terms, max_pages=256)
    assert len(packed) == 64
    major, minor, readahead, low = struct.unpack_from("<4I", packed)
    max_pages, _, high, depth = struct.unpack_from("<2H2I", packed, 28)
    assert (major, minor, readahead, max_pages) == (7, 40, 1 << 22, 256)
    assert bool((low | high << 32) & Init.PASSTHROUGH) == passthrough
    assert depth == int(passthrough)


def test_attributes() -> None:
    packed = protocol.pack_attr(Attributes(9, 1000, False, 77))
    assert len(packed) == 16 + 88
    inode, size, units, _, mtime, _ = struct.unpack_from("<6Q", packed, 16)
    assert (inode, size, units, mtime) == (9, 1000, 2, 77)
    mode, links = struct.unpack_from("<2I", packed, 16 + 60)
    assert (mode, links) == (0o100444, 1)
    assert struct.unpack_from("<I", protocol.pack_entry(Attributes(1, 0, True)), 40 + 60) == (0o040555,)
    statx = protocol.pack_statx(Attributes(9, 1000, False, 77))
    assert len(statx) == 288
    assert struct.unpack_from("<H6x3Q", statx, 32 + 28)[0] == 0o100444
    assert struct.unpack_from("<2Q", statx, 32 + 32) == (9, 1000)


def test_a_name_that_is_not_there_is_remembered() -> None:
    node, _, valid, _ = struct.unpack_from("<4Q", protocol.pack_entry(None))
    assert node == 0
    assert valid == protocol.FOREVER_S


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=30), st.integers(0, 3000), st.booleans())
def test_entries_packed_together_are_those_packed_one_by_one(names: list[bytes], limit: int, is_plus: bool) -> None:
    count = len(names)
    lengths = np.array([len(name) for name in names], np.int64)
    data = np.frombuffer(b"".join(names), np.uint8)
    inodes = np.arange(5, 5 + count, dtype=np.uint64)
    offsets = inodes + np.uint64(100)
    sizes = np.arange(count, dtype=np.int64) * 777
    packed, taken = protocol.pack_files(
        inodes, offsets, sizes, data, np.cumsum(lengths) - lengths, lengths, limit, 9, is_plus=is_plus
    )
    expected, fitting = b"", 0
    for number, name in enumerate(names):
        head = protocol.pack_entry(Attributes(5 + number, 777 * number, False, 9)) if is_plus else b""
        head += struct.pack("<QQII", 5 + number, 105 + number, len(name), protocol.DT_REG)
        entry = head + name + bytes(-len(name) % 8)
        assert len(entry) == protocol.dirent_size(len(name), plus=is_plus)
        if len(expected) + len(entry) > limit:
            break
        expected, fitting = expected + entry, fitting + 1
    assert (packed, taken) == (expected, fitting)


class Wire:
    """A server behind a socket that keeps the limits of messages, as /dev/fuse does."""

    def __init__(self, directory: Path) -> None:
        rows = [("a/b", 10, "v1"), ("c", 0, "v2")]
        path = snapshots.write(directory, origin="file:///x", identity="x", shard_size=1 << 20, rows=rows)
        opened = Snapshot.open(path)
        record = DatasetRecord("set", "file:///x", "", 1 << 20, 1, opened.digest, (opened.digest,), 2, 10)
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(20)
        self._theirs = theirs
        self._state_fd = os.memfd_create("state")

        def reader_of(row: int) -> ObjectReader:
            raise AssertionError("no bytes are read here")

        served = Served(record, opened, Tree(opened.paths, opened.sizes), reader_of)
        self.server = Server(theirs.fileno(), served, State(self._state_fd), on_over=lambda: None, takers=1)
        self.server.start()
        assert self.ours.recv(64)[4:8] == struct.pack("<i", 7), "taken requests are asked for again"

    def ask(self, message: bytes) -> tuple[int, int, bytes]:
        """Errno, unique number and body of the answer to a request."""
        self.ours.send(message)
        return self.answer()

    def answer(self) -> tuple[int, int, bytes]:
        data = self.ours.recv(1 << 20)
        length, number, unique = OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return -number, unique, data[OUT_HEADER.size :]

    def close(self) -> None:
        # One more request than it wants to take, so that it sees that it is to stop.
        self.server._is_stopping = True
        self.ours.send(request(Opcode.FORGET))
        self.server.stop(20)
        self.server.close()
        self.ours.close()
        self._theirs.close()
        os.close(self._state_fd)


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    made = Wire(tmp_path_factory.mktemp("wire"))
    yield made
    made.close()


_ANSWERED = sorted(set(range(1, 60)) - protocol.UNANSWERED - {Opcode.READ, Opcode.GETXATTR})


@settings(max_examples=300)
@given(
    st.sampled_from(_ANSWERED),
    st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"") + b"\0")),
    st.sampled_from([0, 1, 2, 3, 4, 5, 1 << 40, (1 << 64) - 1]),
    st.integers(1, (1 << 64) - 1),
)
def test_any_request_gets_one_answer(wire: Wire, opcode: int, body: bytes, node: int, unique: int) -> None:
    number, told, _ = wire.ask(request(opcode, body, node, unique))
    assert told == unique
    assert 0 <= number < 134
    # And the server is as well as before.
    number, told, entry = wire.ask(request(Opcode.LOOKUP, b"a\0", 1, 5))
    assert (number, told, len(entry)) == (0, 5, 128)


@given(st.binary(min_size=1, max_size=60))
def test_what_is_no_request_does_not_end_the_server(wire: Wire, garbage: bytes) -> None:
    wire.ours.send(garbage)
    number, told, _ = wire.ask(request(Opcode.STATFS, b"", 1, 6))
    assert (number, told) == (0, 6)


def test_writes_are_refused_and_the_unknown_is(wire: Wire) -> None:
    for opcode in protocol.WRITES:
        assert wire.ask(request(opcode, bytes(64)))[0] == 30, opcode
    assert wire.ask(request(Opcode.FLUSH, bytes(24)))[0] == 38
    assert wire.ask(request(4096))[0] == 38
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
        assert wire.ask(request(Opcode.OPEN, struct.pack("<II", flags, 0), 2))[0] == 30


def test_attributes_by_name(wire: Wire) -> None:
    def get(name: bytes, size: int, node: int = 2) -> tuple[int, bytes]:
        number, _, body = wire.ask(request(Opcode.GETXATTR, struct.pack("<II", size, 0) + name + b"\0", node))
        return number, body

    assert get(b"user.shoal.version", 0) == (0, struct.pack("<II", 2, 0))
    assert get(b"user.shoal.version", 2) == (0, b"v1")
    assert get(b"user.shoal.version", 1)[0] == 34
    assert get(b"user.other", 100)[0] == 61
    assert get(b"user.shoal.version", 100, node=1)[0] == 61
    number, body = get(b"user.shoal.mount", 4096, node=1)
    assert number == 0
    assert b'"dataset": "set"' in body
    assert wire.ask(request(Opcode.LISTXATTR, struct.pack("<II", 100, 0), 2))[2] == b"user.shoal.version\0"


def test_an_open_that_is_asked_again_counts_once(wire: Wire) -> None:
    body = struct.pack("<II", os.O_RDONLY, 0)
    before = len(wire.server.opens)
    # Offered nothing, the server has neither passthrough nor silent opens, whatever the dataset is.
    init = struct.pack("<4I", 7, 40, 0, 0) + bytes(48)
    assert wire.ask(request(Opcode.INIT, init, 0, 8))[0] == 0
    number, _, opened = wire.ask(request(Opcode.OPEN, body, 2, 10))
    assert number == 0
    assert struct.unpack("<QIi", opened)[0] == 2
    assert len(wire.server.opens) == before + 1
    assert wire.ask(request(Opcode.RELEASE, bytes(24), 2, 12))[0] == 0
    assert len(wire.server.opens) == before
