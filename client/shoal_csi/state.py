"""What a mount's server leaves to whoever takes over from it: a few pages of a file in memory that outlives it.

    head       what INIT agreed on, the snapshot that is served, the largest backing id that was given, and what was
               counted (`shoal_csi.numbers`)
    journal    the last changes of the table that each thread of the server made, and for which requests
    table      the inodes that are open: passthrough with which backing id, or cached; and how often

A server may be killed between any two of its stores. Each field is a word, so it is the old one or the new one. What
belongs together is written first and made valid by one more word: the number of a journal's entry, a flag of the head.

The rule: an entry of the journal is written before the table is, so the last entry says what the table must be.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.datasets import DatasetRecord
from shoal.errors import StoreUnusable
from shoal_csi import state_head as head
from shoal_csi.protocol import RESEND_BIT, Terms

#: Threads of a server that may change the table.
MAX_THREADS = 8
#: Servers whose journals are kept, so that one that dies at once does not write over what its predecessor left.
_JOURNALS = 8

_TEXT_BYTES = 1 << 13
_TEXT_AT = 512  # a word of length, then JSON
# Words of a journal's entry.
_NUMBER, _UNIQUE, _SLOT, _INODE, _BACKING, _COUNT = range(6)
_ENTRY_WORDS = 8
_ENTRIES = _JOURNALS * MAX_THREADS * 2
_JOURNAL_AT = _TEXT_BYTES // 8
_TABLE_AT = _JOURNAL_AT + _ENTRIES * _ENTRY_WORDS
# Words of a slot of the table. A slot without opens is free.
_SLOT_INODE, _SLOT_BACKING, _SLOT_COUNT = range(3)
_SLOT_WORDS = 4
_FIRST_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Slot:
    """An open inode.

    Attributes:
        backing: its backing id; 0 where its opens are cached.
        count: how often it is open; 0 is a slot that is free.
    """

    inode: int
    backing: int
    count: int


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the journal: what slot `number` became for the request `unique`."""

    order: int
    unique: int
    number: int
    slot: Slot


class State:
    """The file behind `fd`, mapped. Not thread-safe but for what says so.

    Attributes:
        starts: servers that opened it so far, this one included.

    Raises:
        StoreUnusable: it is of another version, or something else.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        size = os.fstat(fd).st_size
        if size == 0:
            size = _bytes_for(_FIRST_SLOTS)
            os.ftruncate(fd, size)
        self.check(fd)
        self._map(size)
        if not self._words[head.MAGIC_AT]:
            self._words[head.VERSION_AT] = head.VERSION
            self._words[head.MAGIC_AT] = head.MAGIC
        self._words[head.STARTS] += np.uint64(1)
        self.starts = int(self._words[head.STARTS])

    @staticmethod
    def check(fd: int) -> None:
        """Change nothing. Raises StoreUnusable: what is there was left by a version that this one cannot go on from."""
        first = os.pread(fd, 8 * (head.VERSION_AT + 1), 0)
        magic, version = (
            int.from_bytes(first[8 * at : 8 * at + 8], sys.byteorder) for at in (head.MAGIC_AT, head.VERSION_AT)
        )
        if magic == 0:
            return  # the first server has yet to come
        if magic != head.MAGIC:
            raise StoreUnusable("what was left of this mount is no state of Shoal's: unmount, and mount again")
        if version != head.VERSION:
            age = "a newer" if version > head.VERSION else "an older"
            raise StoreUnusable(
                f"the state of this mount was left by {age} Shoal (version {version}, and this one reads "
                f"{head.VERSION}): let that one serve it, or unmount, and mount again"
            )

    @staticmethod
    def pinned_in(fd: int) -> tuple[DatasetRecord, str] | None:
        """As `pinned`, of the file behind `fd`. Changes nothing."""
        first = os.pread(fd, _TEXT_BYTES, 0)
        words = np.frombuffer(first[: len(first) // 8 * 8], np.uint64)
        if len(words) <= _TEXT_AT // 8 or not words[head.IS_PINNED]:
            return None
        length = int(words[_TEXT_AT // 8])
        raw = json.loads(first[_TEXT_AT + 8 : _TEXT_AT + 8 + length])
        return DatasetRecord.from_dict(raw["dataset"]), raw["snapshot"]

    def _map(self, size: int) -> None:
        self._mapped = mmap.mmap(self._fd, size)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._mapped, np.uint64)

    # What is served

    @property
    def pinned(self) -> tuple[DatasetRecord, str] | None:
        """The dataset, and the digest of the snapshot that is served; None before `pin`."""
        return self.pinned_in(self._fd)

    def pin(self, record: DatasetRecord, digest: str) -> None:
        """Let this mount be of that snapshot, for good."""
        lean = record.to_dict() | {"snapshots": [digest], "snapshot": digest}
        text = json.dumps({"dataset": lean, "snapshot": digest}).encode()
        if len(text) > _TEXT_BYTES - _TEXT_AT - 8:
            raise StoreUnusable(f"the record of dataset {record.name} is too long to be kept: {len(text):,} bytes")
        self._mapped[_TEXT_AT + 8 : _TEXT_AT + 8 + len(text)] = text
        self._words[_TEXT_AT // 8] = len(text)
        self._words[head.IS_PINNED] = 1

    @property
    def terms(self) -> Terms | None:
        """What INIT agreed on; None before that."""
        if not self._words[head.IS_AGREED]:
            return None
        return Terms(*(int(self._words[at]) for at in (head.MINOR, head.FLAGS, head.READAHEAD)))

    def agree(self, terms: Terms) -> None:
        self._words[head.MINOR], self._words[head.FLAGS] = terms.minor, terms.flags
        self._words[head.READAHEAD] = terms.max_readahead
        self._words[head.IS_AGREED] = 1

    @property
    def last_backing(self) -> int:
        """The largest backing id that was noted. The kernel gives them in turn."""
        return int(self._words[head.LAST_BACKING])

    def note_backing(self, backing: int) -> None:
        self._words[head.LAST_BACKING] = backing

    # What was counted

    def numbers(self) -> tuple[int, ...]:
        """All words that there are for it."""
        return tuple(int(word) for word in self._words[head.NUMBERS_AT : head.NUMBERS_AT + head.NUMBERS])

    def set_number(self, place: int, number: int) -> None:
        self._words[head.NUMBERS_AT + place] = number

    # The table

    @property
    def slots(self) -> int:
        return (len(self._words) - _TABLE_AT) // _SLOT_WORDS

    def slot(self, number: int) -> Slot:
        at = _TABLE_AT + number * _SLOT_WORDS
        return Slot(*(int(self._words[at + field]) for field in (_SLOT_INODE, _SLOT_BACKING, _SLOT_COUNT)))

    def used(self) -> dict[int, Slot]:
        """The slots of inodes that are open, by number."""
        table = self._words[_TABLE_AT : _TABLE_AT + self.slots * _SLOT_WORDS].reshape(-1, _SLOT_WORDS)
        return {number: self.slot(number) for number in np.flatnonzero(table[:, _SLOT_COUNT]).tolist()}

    def grow(self) -> None:
        """Twice as many slots."""
        size = _bytes_for(2 * self.slots)
        os.ftruncate(self._fd, size)
        self._map(size)

    def change(self, thread: int, change: Change) -> None:
        """Note a change in the journal of `thread`, then make it."""
        words = self._words
        pair = _JOURNAL_AT + 2 * (self.starts % _JOURNALS * MAX_THREADS + thread) * _ENTRY_WORDS
        # The thread's older entry. The newer one may be the last of all, and is what counts until this one does.
        at = min(pair, pair + _ENTRY_WORDS, key=lambda at: words[at + _NUMBER])
        words[at + _NUMBER] = 0
        words[at + _UNIQUE], words[at + _SLOT] = change.unique & ~RESEND_BIT, change.number
        words[at + _INODE], words[at + _BACKING] = change.slot.inode, change.slot.backing
        words[at + _COUNT] = change.slot.count
        words[at + _NUMBER] = change.order
        self._set(change)

    def journal(self) -> list[Change]:
        """The last changes of each thread, in the order in which they were made."""
        found = []
        for entry in range(_ENTRIES):
            at = _JOURNAL_AT + entry * _ENTRY_WORDS
            order, unique, number, inode, backing, count = (int(word) for word in self._words[at : at + _COUNT + 1])
            if order:
                found.append(Change(order, unique, number, Slot(inode, backing, count)))
        return sorted(found, key=lambda change: change.order)

    def redo(self) -> list[Change]:
        """Make the last change of the journal once more: its server may not have come to it. Returns the journal."""
        found = self.journal()
        if found:
            self._set(found[-1])
        return found

    def _set(self, change: Change) -> None:
        at = _TABLE_AT + change.number * _SLOT_WORDS
        self._words[at + _SLOT_INODE], self._words[at + _SLOT_BACKING] = change.slot.inode, change.slot.backing
        self._words[at + _SLOT_COUNT] = change.slot.count


def _bytes_for(slots: int) -> int:
    return -(-(_TABLE_AT + slots * _SLOT_WORDS) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
