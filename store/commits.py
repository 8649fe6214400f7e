"""The commit log of one shard: what is in it is committed, what is not never happened.

A commit is one record, appended after the data it vouches for:

    b"COMMIT1\\n" | header length uint32 | payload length uint64 | header JSON | payload | crc32c uint32

The header says the rows, the length and running crc32c of every partial shard file, and where each
small array lies in the payload. A torn or damaged tail ends the log: those rows are written again.
Small and ragged arrays live in the payload until the job is finalised.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from store.errors import StoreError
from store.files import crc32c

MAGIC = b"COMMIT1\n"
HEAD = struct.Struct("<IQ")


@dataclass(frozen=True)
class Commit:
    """One record. `prefix` and `finished` map a direct array to (bytes, crc32c)."""

    start: int
    stop: int
    prefix: dict[str, tuple[int, int]]
    finished: dict[str, tuple[int, int]] | None  # None while the shard is open
    parts: dict[str, tuple[int, int]]  # array → (offset in the file, bytes)
    begin: int  # where the record lies in the file
    end: int


def encode_commit(
    start: int,
    stop: int,
    prefix: dict[str, tuple[int, int]],
    finished: dict[str, tuple[int, int]] | None,
    parts: dict[str, bytes],
) -> list[bytes]:
    """The record, in pieces to be written one after the other. `finished` is None while the shard is open."""
    header = {
        "rows": [start, stop],
        "prefix": prefix,
        "finished": finished,
        "parts": [[name, len(data)] for name, data in parts.items()],
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    head = MAGIC + HEAD.pack(len(encoded), sum(map(len, parts.values()))) + encoded
    pieces = [head, *parts.values()]  # a payload of 128 MB is not copied again
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return [*pieces, struct.pack("<I", crc)]


def read_commits(path: Path, *, check_all: bool = False) -> list[Commit]:
    """The valid records of a log, in order; a missing file has none.

    Only the last record's checksum is read, which a killed process may have torn; unless `check_all`, which
    raises StoreError for a damaged record in the middle.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        commits = list(_scan(file, path.stat().st_size))
        suspects = commits if check_all else commits[-1:]
        for commit in suspects:
            if _is_intact(file, commit):
                continue
            if commit is commits[-1]:
                commits.pop()
            else:
                raise StoreError(
                    f"{path}: commit of rows {commit.start}:{commit.stop} is damaged (crc32c differs); "
                    "delete this file and run the extraction again to redo its shard"
                )
    return commits


def intact_commits(path: Path) -> list[Commit]:
    """The records before the first damaged one; every checksum is read."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return list(takewhile(partial(_is_intact, file), list(_scan(file, path.stat().st_size))))


def _scan(file: BinaryIO, size: int) -> Iterator[Commit]:
    position = 0
    while position + len(MAGIC) + HEAD.size + 4 <= size:
        file.seek(position)
        head = file.read(len(MAGIC) + HEAD.size)
        if not head.startswith(MAGIC):
            return
        header_bytes, payload_bytes = HEAD.unpack(head[len(MAGIC) :])
        end = position + len(head) + header_bytes + payload_bytes + 4
        if end > size:
            return
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return
        yield _commit(header, position, position + len(head) + header_bytes, end)
        position = end


def _commit(header: dict[str, Any], begin: int, payload: int, end: int) -> Commit:
    parts = {}
    for name, length in header["parts"]:
        parts[name] = (payload, length)
        payload += length
    start, stop = header["rows"]
    return Commit(start, stop, header["prefix"], header["finished"], parts, begin, end)


def _is_intact(file: BinaryIO, commit: Commit) -> bool:
    file.seek(commit.begin)
    record = file.read(commit.end - commit.begin)
    return record[-4:] == struct.pack("<I", crc32c(record[:-4]))
