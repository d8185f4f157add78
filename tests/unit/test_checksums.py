"""Part checksums against brute force, and what a receive does with them whatever the node sends."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shoal import checksums, connection, shard_client
from shoal.checksums import PartCheck
from shoal.connection import Connection, Interrupted
from shoal.errors import NodeUnavailable, ShardCorrupt, ShoalError
from shoal.health import Latency
from shoal.shard_client import ShardAt
from shoal.transport import Transport
from shoal.watch import Watch
from shoal.wire import batch
from shoal.wire.batch import ShardRange

WORDS = st.lists(st.integers(0, 2**64 - 1), max_size=9)


@st.composite
def ranges(draw: st.DrawFn, least: int = 0) -> tuple[int, int, int, int]:
    """(start, end, size_bytes, part_size) of a range inside a shard, of at least so many bytes."""
    size_bytes = draw(st.integers(least, 60))
    start = draw(st.integers(0, size_bytes - least))
    return start, draw(st.integers(start + least, size_bytes)), size_bytes, draw(st.integers(1, 20))


def parts_of(size_bytes: int, part_size: int) -> list[tuple[int, int]]:
    return [(first, min(first + part_size, size_bytes)) for first in range(0, size_bytes, part_size)]


def whole(start: int, end: int, size_bytes: int, part_size: int) -> dict[int, tuple[int, int]]:
    """Brute force: the parts inside [start, end), by index."""
    parts = parts_of(size_bytes, part_size)
    return {i: (first, last) for i, (first, last) in enumerate(parts) if start <= first and last <= end}


def content(size_bytes: int) -> bytes:
    return bytes(i * 37 % 251 for i in range(size_bytes))


def sums_of(data: bytes, parts: Iterable[tuple[int, int]]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(data[first:last]) for first, last in parts]


def cut(data: bytes, cuts: Sequence[int]) -> list[memoryview]:
    """`data` in pieces that end at `cuts`, empty ones among them."""
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    return [memoryview(data)[a:b] for a, b in pairwise(edges)]


@given(ranges())
def test_whole_parts(given_range: tuple[int, int, int, int]) -> None:
    assert list(checksums.whole_parts(*given_range)) == list(whole(*given_range))


@given(ranges(), st.integers(1, 9))
def test_a_range_past_the_end_is_one_to_the_end(given_range: tuple[int, int, int, int], past: int) -> None:
    start, _, size_bytes, part_size = given_range
    to_end = checksums.whole_parts(start, size_bytes, size_bytes, part_size)
    assert list(checksums.whole_parts(start, size_bytes + past, size_bytes, part_size)) == list(to_end)


@given(WORDS)
def test_encode_and_pack_round_trip(sums: list[int]) -> None:
    assert checksums.decode(checksums.encode(sums)) == sums
    packed = checksums.pack(sums)
    assert len(packed) == checksums.WORD_BYTES * len(sums)
    assert checksums.unpack(packed) == checksums.unpack(bytearray(packed)) == sums
    assert batch.decode_sums(memoryview(batch.encode_sums(sums))).tolist() == sums


def test_formats_are_the_ones_on_the_wire() -> None:
    assert checksums.encode([1, 0xABC]) == "0000000000000001,0000000000000abc"
    assert checksums.pack([1]) == b"\1" + bytes(7)
    assert checksums.checksum(b"part") == xxhash.xxh3_64_intdigest(b"part")
    with pytest.raises(ValueError):
        checksums.decode("12,xyz")


@given(ranges(), st.lists(st.integers(0, 60), max_size=6))
def test_right_bytes_pass_in_any_pieces(given_range: tuple[int, int, int, int], cuts: list[int]) -> None:
    start, end, size_bytes, _ = given_range
    data = content(size_bytes)
    sums = sums_of(data, whole(*given_range).values())
    known, unknown = PartCheck(*given_range, sums), PartCheck(*given_range)
    assert (known.trailing_bytes, unknown.trailing_bytes) == (0, 8 * len(sums))
    for piece in cut(data[start:end], cuts):
        known.update(piece)
        unknown.update(piece)
    unknown.compare(sums)
    unknown.compare([0] * len(sums))


@given(ranges(1), st.lists(st.integers(0, 60), max_size=6), st.integers(0, 59), st.integers(1, 255), st.booleans())
def test_a_wrong_byte_is_told_at_the_end_of_its_part(
    given_range: tuple[int, int, int, int], cuts: list[int], place: int, mask: int, is_trailing: bool
) -> None:
    """In a whole part; one in a part that the range only touches is the node's to notice (`shoal.checksums`)."""
    start, end, size_bytes, part_size = given_range
    place = start + place % (end - start)
    data = content(size_bytes)
    parts = whole(*given_range)
    sums = sums_of(data, parts.values())
    wrong = bytearray(data)
    wrong[place] ^= mask
    check = PartCheck(*given_range, None if is_trailing else sums)
    reached, told = start, None
    for piece in cut(bytes(wrong[start:end]), cuts):
        try:
            check.update(piece)
        except ShardCorrupt as error:
            told = str(error)
            break
        reached += len(piece)
    bad = parts.get(place // part_size)
    if is_trailing:
        assert told is None
        if bad is None:
            check.compare(sums)
            return
        with pytest.raises(ShardCorrupt, match=f"part {place // part_size} does not match"):
            check.compare(sums)
        without = [0 if part == place // part_size else known for part, known in zip(parts, sums, strict=True)]
        check.compare(without)  # what the node does not know, it cannot tell
    elif bad is None:
        assert told is None and reached == end
    else:
        assert told == f"part {place // part_size} does not match its checksum"
        assert reached < bad[1] <= reached + len(piece), "told by the piece that ends the part"


@given(ranges(1), st.integers(0, 59), st.lists(st.integers(0, 60), max_size=4))
def test_trusted_bytes_leave_no_part_out(given_range: tuple[int, int, int, int], came: int, cuts: list[int]) -> None:
    """A read that goes on behind them compares every whole part once; and no more comes again than it must."""
    start, end, size_bytes, part_size = given_range
    came %= end - start
    data = content(size_bytes)
    parts = whole(*given_range)
    sums = sums_of(data, parts.values())
    check = PartCheck(*given_range, sums)
    for piece in cut(data[start : start + came], cuts):
        check.update(piece)
    splits_none = [t for t in range(came + 1) if not any(a < start + t < b for a, b in parts.values())]
    assert check.trusted_bytes == max(splits_none)
    later = checksums.whole_parts(start + check.trusted_bytes, end, size_bytes, part_size)
    before = [i for i, (_, last) in parts.items() if last <= start + check.trusted_bytes]
    assert [*before, *later] == list(parts)


def test_nothing_is_trusted_before_its_checksum_is_known() -> None:
    check = PartCheck(0, 40, 40, 10)
    check.update(memoryview(content(25)))
    assert check.trusted_bytes == 0


def test_another_number_of_checksums_is_corrupt() -> None:
    for sums in ([], [1], [1, 2, 3]):
        with pytest.raises(ShardCorrupt, match=f"{len(sums)} checksums came for 2 parts"):
            PartCheck(5, 30, 40, 10, sums)


# A receive


class Scripted(Transport):
    """A node that answers each connection with the next of `answers`, and then closes it."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self._theirs: list[socket.socket] = []

    def suspect(self, address: str) -> None:
        """Probe nobody: the script has no answers for it."""

    def _connect(self, address: str, timeout_s: float) -> Connection:
        ours, theirs = socket.socketpair()
        theirs.sendall(self.answers.pop(0))
        theirs.shutdown(socket.SHUT_WR)
        self._theirs.append(theirs)
        return Connection(ours, Latency())

    def requests(self) -> list[str]:
        return [sock.recv(1 << 16).decode() for sock in self._theirs]


PART = 10
DATA = content(47)
SHARD = ShardAt("d" * 32, 3, 1, len(DATA))
SUMS = sums_of(DATA, parts_of(len(DATA), PART))


def answer(body: bytes, sums: str | None, *, length: int | None = None, part_size: object = PART) -> bytes:
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(body) if length is None else length}\r\n"
    if sums is not None:
        head += f"Shoal-Part-Size: {part_size}\r\nShoal-Checksums: {sums}\r\n"
    return f"{head}\r\n".encode() + body


def receive(node: Transport, start: int = 0, end: int = len(DATA), *, verify: bool = True) -> bytes:
    view = memoryview(bytearray(end - start))
    watch = Watch(node, "node:1")
    shard_client.read(node, "node:1", SHARD, start, end, lambda: view, verify=verify, headers={}, watch=watch)
    return bytes(view)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_receive_compares_what_the_node_says_before_or_behind_the_body() -> None:
    before, behind = checksums.encode(SUMS), DATA + checksums.pack(SUMS)
    partly = DATA + checksums.pack([0, *SUMS[1:]])
    node = Scripted(answer(DATA, before), answer(behind, "trailing"), answer(partly, "trailing"), answer(DATA, None))
    assert [receive(node) for _ in range(4)] == [DATA] * 4
    for request in node.requests():
        assert "Range: bytes=0-46\r\n" in request and "Shoal-Want-Checksums: 1\r\n" in request


@pytest.mark.parametrize("place", range(0, len(DATA), 4))
def test_receive_of_a_wrong_byte(place: int) -> None:
    wrong = flipped(DATA, place)
    node = Scripted(
        answer(wrong, checksums.encode(SUMS)), answer(wrong + checksums.pack(SUMS), "trailing"), answer(wrong, None)
    )
    for _ in range(2):
        with pytest.raises(ShardCorrupt, match=f"part {place // PART} does not match"):
            receive(node)
    assert receive(node) == wrong  # a node that names no checksums is as one that was not asked for them


def test_receive_without_verify_asks_for_no_checksums() -> None:
    node = Scripted(answer(DATA, None))
    assert receive(node, verify=False) == DATA
    assert "Checksums" not in node.requests()[0]


@pytest.mark.parametrize("came", [0, 1, 5_999, 6_000, 30_000, 49_999, 80_001, 85_999])
def test_interrupted_body_is_good_up_to_the_last_part_that_was_compared(
    monkeypatch: pytest.MonkeyPatch, came: int
) -> None:
    """Bytes 4000 to 90000: an edge of 6000, and then whole parts."""
    part, stride = 10_000, 3_000
    monkeypatch.setattr(connection, "_CHECK_STRIDE", stride)
    data = content(90_000)
    shard = ShardAt("d" * 32, 0, 0, len(data))
    sums = checksums.encode(sums_of(data, parts_of(len(data), part)[1:]))
    node = Scripted(answer(data[4_000 : 4_000 + came], sums, length=86_000, part_size=part))
    view = memoryview(bytearray(86_000))
    with pytest.raises(Interrupted) as caught:
        watch = Watch(node, "node:1")
        shard_client.read(node, "node:1", shard, 4_000, 90_000, lambda: view, verify=True, headers={}, watch=watch)
    good = caught.value.received
    assert view[:good] == data[4_000 : 4_000 + good]
    # What came since the last look counts as little as a part begun; the first look is after the head's own bytes.
    assert good <= came and (good < 6_000 or good % part == 6_000)
    assert good > came - part - stride or came < 6_000 + stride


@pytest.mark.parametrize("words", [0, 3, 8, 20])
def test_interrupted_before_all_checksums_came_is_good_for_nothing(words: int) -> None:
    body = flipped(DATA, 0) + checksums.pack(SUMS)[:words]
    node = Scripted(answer(body, "trailing", length=len(DATA) + 8 * len(SUMS)))
    with pytest.raises(Interrupted) as caught:
        receive(node)
    assert caught.value.received == 0


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (answer(DATA, checksums.encode(SUMS[:-1])), ShardCorrupt),
        (answer(DATA, "nonsense"), NodeUnavailable),
        (answer(DATA, checksums.encode(SUMS), part_size="ten"), NodeUnavailable),
        (answer(DATA, checksums.encode(SUMS), part_size=0), NodeUnavailable),
        (answer(DATA, "trailing"), NodeUnavailable),  # shorter than body and checksums
        (answer(DATA + bytes(8), checksums.encode(SUMS)), NodeUnavailable),
        (b"", NodeUnavailable),
        (b"HTTP/1.1 206 OK\r\nContent-", NodeUnavailable),
    ],
    ids=["too-few", "no-hex", "no-number", "no-part-size", "no-trailer", "too-long", "nothing", "half-a-head"],
)
def test_receive_of_an_answer_that_is_not_ours(sent: bytes, error: type[ShoalError]) -> None:
    with pytest.raises(error):
        receive(Scripted(sent))


def test_batch_compares_ranges_that_are_whole_parts() -> None:
    wanted = [ShardRange(0, 0, 10, 10), ShardRange(0, 0, 3, 4), ShardRange(1, 0, 40, 7)]
    pieces = [DATA[r.start : r.start + r.length] for r in wanted]
    sums = batch.encode_sums([SUMS[1], 0, SUMS[4]])

    def read(body: bytes, *, verify: bool = True) -> bytes:
        buffer, _ = shard_client.read_batch(
            Scripted(answer(body + sums, None)), "node:1", "d" * 32, wanted, verify=verify, headers={}, until=math.inf
        )
        return buffer.to_pybytes()

    good = b"".join(pieces)
    assert read(good) == good
    assert read(flipped(good, 11)) == flipped(good, 11)  # in the second range, of which the node told nothing
    for place, named in ((0, "row 0, shard 0"), (9, "row 0, shard 0"), (14, "row 1, shard 0")):
        with pytest.raises(ShardCorrupt, match=named):
            read(flipped(good, place))
        assert read(flipped(good, place), verify=False) == flipped(good, place)
    with pytest.raises(NodeUnavailable):
        read(good + b"x")
