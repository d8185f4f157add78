"""``shoal ls``, ``cat`` and ``get``: a dataset's objects from a shell, through the file system that trainers use.

The rule: a file that `get` leaves under its name is whole; what is still on its way has another name beside it.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import click
from fsspec.core import has_magic
from tqdm import tqdm

from shoal import datasets, sizes
from shoal.cli import connect, output
from shoal.errors import InvalidRequest
from shoal.filesystem import ShoalFileSystem

#: Bytes in memory a file on its way.
PIECE_SIZE = 4 << 20
PARALLEL_FILES = 8

Entry = dict[str, Any]
"""fsspec's: name, size, type and, for objects, version."""


def filesystem(endpoint: str | None) -> Any:
    """A file system of its own, so that it pins the snapshots of now."""
    return ShoalFileSystem(endpoint=endpoint, skip_instance_cache=True)


def path_of(text: str) -> str:
    """``NAME[@SNAPSHOT]/path`` of what people type, with or without ``shoal://``.

    Raises:
        InvalidRequest: it names no dataset.
    """
    path = text.removeprefix("shoal://")
    datasets.parse_path(path)
    return path


LS_EXAMPLES = """\b
Examples:
  shoal ls
  shoal ls -l shoal://flights/2013
  shoal ls 'shoal://flights/2013/*.parquet'
  shoal ls -R flights --json | jq '[.[].size_bytes] | add'
"""


@click.command(epilog=LS_EXAMPLES)
@click.argument("path", required=False, metavar="[shoal://NAME[@SNAPSHOT][/PATH]]")
@click.option("-l", "--long", "is_long", is_flag=True, help="Also size in bytes and version.")
@click.option("-R", "--recursive", is_flag=True, help="All objects below PATH.")
@connect.endpoint_option
@output.json_option
def ls(path: str | None, is_long: bool, recursive: bool, endpoint: str | None, as_json: bool) -> None:
    """List a directory of a dataset, or the datasets."""
    fs = filesystem(endpoint)
    if path is None or path == "shoal://":
        entries = [
            entry for dataset in fs.ls("") for entry in (_below(fs, dataset["name"]) if recursive else [dataset])
        ]
    else:
        entries = _entries(fs, path_of(path), recursive)
    if as_json:
        output.document([_json(entry) for entry in entries])
    elif is_long and entries:
        output.data(output.table(("SIZE>", "VERSION", "NAME"), map(_row, entries)))
    else:
        for entry in entries:
            output.data(_url(entry))


def _entries(fs: Any, path: str, recursive: bool) -> list[Entry]:
    try:
        fs.info(path)
    except FileNotFoundError:
        # A name may hold a "*" itself, so it is a pattern only where nothing has that name.
        found = list(fs.glob(path, detail=True).values()) if has_magic(path) else []
        if not found:
            raise
    else:
        return _below(fs, path) if recursive else list(fs.ls(path, detail=True))
    return [e for entry in found for e in (_below(fs, entry["name"]) if recursive else [entry])]


def _below(fs: Any, path: str) -> list[Entry]:
    return list(fs.find(path, detail=True).values())


def _url(entry: Entry) -> str:
    return f"shoal://{entry['name']}{'/' if entry['type'] == 'directory' else ''}"


def _row(entry: Entry) -> tuple[str, str, str]:
    is_file = entry["type"] == "file"
    return str(entry["size"]) if is_file else "-", str(entry.get("version", "-")) if is_file else "-", _url(entry)


def _json(entry: Entry) -> Entry:
    return {
        "name": entry["name"],
        "type": entry["type"],
        "size_bytes": entry["size"] if entry["type"] == "file" else None,
        "version": entry.get("version"),
    }


CAT_EXAMPLES = """\b
Examples:
  shoal cat shoal://flights/README.md
  shoal cat shoal://flights/2013/01.csv shoal://flights/2013/02.csv | wc -l
"""


@click.command(epilog=CAT_EXAMPLES)
@click.argument("paths", nargs=-1, required=True, metavar="shoal://NAME[@SNAPSHOT]/PATH…")
@connect.endpoint_option
def cat(paths: tuple[str, ...], endpoint: str | None) -> None:
    """Write objects to stdout, one after the other."""
    wanted = [path_of(path) for path in paths]
    fs = filesystem(endpoint)
    out = sys.stdout.buffer
    for path in wanted:
        _copy(fs, path, lambda piece: write_all(out, piece))
    out.flush()


def write_all(out: BinaryIO, piece: memoryview) -> None:
    """Write all of `piece`. With PYTHONUNBUFFERED set, stdout is a bare descriptor and may take only a part."""
    while piece:
        piece = piece[out.write(piece) :]


def _copy(fs: Any, path: str, write: Callable[[memoryview], object]) -> None:
    """Hand an object's bytes to `write` in order. A piece is valid until `write` returns."""
    piece = memoryview(bytearray(PIECE_SIZE))
    with fs.open(path, "rb") as file:
        while count := file.readinto(piece):
            write(piece[:count])


GET_EXAMPLES = """\b
Examples:
  shoal get shoal://flights/2013/01.parquet
  shoal get shoal://flights/2013/01.parquet jan.parquet
  shoal get --recursive shoal://flights/2013 /scratch
"""


@click.command(epilog=GET_EXAMPLES)
@click.argument("source", metavar="shoal://NAME[@SNAPSHOT][/PATH]")
@click.argument("target", type=click.Path(), default=".")
@click.option("-r", "--recursive", is_flag=True, help="All objects below a directory.")
@connect.endpoint_option
@output.json_option
def get(source: str, target: str, recursive: bool, endpoint: str | None, as_json: bool) -> None:
    """Copy objects to local files. TARGET is a file, or a directory that they go into."""
    path = path_of(source)
    fs = filesystem(endpoint)
    info = fs.info(path)
    if info["type"] == "directory" and not recursive:
        raise InvalidRequest(f"{path} is a directory: add --recursive to copy all objects below it")
    # What follows NAME@ is not part of a name that anybody would want for a local directory.
    name = PurePosixPath(path).name if "/" in path.rstrip("/") else datasets.parse_path(path.rstrip("/")).dataset
    goes_into = target.endswith("/") or Path(target).is_dir()
    base = Path(target, name) if goes_into else Path(target)
    entries = _below(fs, path) if info["type"] == "directory" else [info]
    root = info["name"] if info["type"] == "directory" else ""
    jobs = [(entry["name"], _local(base, entry["name"], root)) for entry in entries]
    total_bytes = sum(entry["size"] for entry in entries)
    _download(fs, jobs, total_bytes, name)
    if as_json:
        output.document({"target": str(base), "objects": len(jobs), "total_bytes": total_bytes})
    else:
        count = f"{len(jobs):,} {'object' if len(jobs) == 1 else 'objects'}"
        output.data(f"copied {count}, {sizes.format(total_bytes)}, to {base}")


def _local(base: Path, name: str, root: str) -> Path:
    """The file that an object goes to. Names come from the origin, so they may try to lead elsewhere.

    Raises:
        InvalidRequest: the name has no place below `base`.
    """
    if not root:
        return base
    parts = name.removeprefix(root).removeprefix("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidRequest(f"object {name!r} has no place in a local directory: copy it alone, under a name you give")
    return base.joinpath(*parts)


def _download(fs: Any, jobs: Iterable[tuple[str, Path]], total_bytes: int, description: str) -> None:
    stopped = threading.Event()
    counting = threading.Lock()  # guards the bar
    with (
        tqdm(
            desc=description,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not sys.stderr.isatty(),
        ) as bar,
        ThreadPoolExecutor(PARALLEL_FILES) as pool,
    ):

        def count(length: int) -> None:
            with counting:
                bar.update(length)

        running = [pool.submit(_download_one, fs, name, path, count, stopped) for name, path in jobs]
        try:
            for future in running:
                future.result()
        finally:
            # After a failure or Ctrl-C: what waits never starts, and what runs ends at its next piece.
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _download_one(fs: Any, name: str, path: Path, count: Callable[[int], None], stopped: threading.Event) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".shoal-{secrets.token_hex(8)}"
    try:
        with aside.open("xb") as file:

            def write(piece: memoryview) -> None:
                if stopped.is_set():
                    raise InterruptedError(f"copying {name} was stopped")
                file.write(piece)
                count(len(piece))

            _copy(fs, name, write)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
