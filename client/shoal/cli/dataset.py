"""``shoal dataset``: which origins the cluster serves, and under which names.

The rule: nothing here touches the origin's objects; it is listed, never written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from shoal import datasets, shards, sizes
from shoal.cli import connect, output, records
from shoal.cli.output import SizeType
from shoal.errors import InvalidRequest

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@click.group()
def dataset() -> None:
    """Register origins as datasets, and look after them."""


ADD_EXAMPLES = """\b
Examples:
  shoal dataset add flights s3://bucket/flights
  shoal dataset add photos ./photos --replicas 2
  shoal dataset add evals s3://bucket/evals --pin --quota 500GiB
  shoal dataset add lab s3://lab/run7 --storage-options '{"endpoint_url": "http://minio:9000",
      "key": "env:LAB_KEY", "secret": "file:/run/secrets/lab"}'
"""


class StorageOptions(click.ParamType[str]):
    """A JSON object, passed on as text."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f'{value!r} is no JSON object: write {{"key": "value"}}', param, ctx)
        return str(value)


class QuotaType(SizeType):
    """A size, or "none" for 0 bytes."""

    name = "size|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 0 if value == "none" else super().convert(value, param, ctx)


@dataset.command(epilog=ADD_EXAMPLES)
@click.argument("name")
@click.argument("origin_url")
@click.option(
    "--shard-size",
    type=SizeType(),
    default=sizes.format(shards.DEFAULT_SHARD_SIZE).replace(" ", ""),
    help="Larger objects are cut into shards of this size.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Nodes that keep each shard.")
@click.option(
    "--storage-options",
    type=StorageOptions(),
    default="{}",
    metavar="JSON",
    help="fsspec's options for the origin. A value may be env:NAME or file:PATH, read by the servers.",
)
@click.option("--pin", "pinned", is_flag=True, help="Never drop its shards to make room.")
@click.option(
    "--quota", "quota_bytes", type=QuotaType(), default="none", help="Share of the cluster's cache kept for it."
)
@click.option("--direct", is_flag=True, help="Clients with credentials may read the origin where no node answers.")
@connect.endpoint_option
@output.json_option
def add(
    name: str,
    origin_url: str,
    shard_size: int,
    replicas: int,
    storage_options: str,
    pinned: bool,
    quota_bytes: int,
    direct: bool,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """List ORIGIN_URL and serve it as shoal://NAME.

    ORIGIN_URL is any fsspec URL (s3://, gs://, https://, hf://, …) or a local directory, which all servers must see.
    """
    datasets.check_name(name)
    origin = origin_of(origin_url)
    with connect.control(connect.cluster(endpoint)) as control:
        added = control.add_dataset(
            name,
            origin,
            shard_size=shard_size,
            replicas=replicas,
            storage_options=storage_options,
            pinned=pinned,
            quota_bytes=quota_bytes,
            direct=direct,
        )
    known = records.dataset(added)
    if as_json:
        output.document(known)
    else:
        output.data(f"added {name}: {_extent(known)} of {known['origin']}; read it as shoal://{name}/…")


LIST_EXAMPLES = """\b
Examples:
  shoal dataset list
  shoal dataset list --json | jq -r '.[].name'
"""


@dataset.command("list", epilog=LIST_EXAMPLES)
@connect.endpoint_option
@output.json_option
def list_(endpoint: str | None, as_json: bool) -> None:
    """List all datasets."""
    with connect.control(connect.cluster(endpoint)) as control:
        known = [records.dataset(raw) for raw in control.datasets()]
    if as_json:
        output.document(known)
    elif known:
        output.data(output.table(records.DATASET_COLUMNS, map(records.dataset_row, known)))
    else:
        output.remark("there are no datasets yet: 'shoal dataset add NAME ORIGIN_URL' registers one")


SHOW_EXAMPLES = """\b
Examples:
  shoal dataset show flights
  shoal dataset show flights --json | jq -r .snapshot
"""


@dataset.command(epilog=SHOW_EXAMPLES)
@click.argument("name")
@connect.endpoint_option
@output.json_option
def show(name: str, endpoint: str | None, as_json: bool) -> None:
    """Show one dataset: size, snapshots, how much of it is cached."""
    datasets.check_name(name)
    with connect.control(connect.cluster(endpoint)) as control:
        known = records.dataset(control.dataset(name))
    if as_json:
        output.document(known)
    else:
        output.data(output.fields(records.dataset_fields(known)))


SET_EXAMPLES = """\b
Examples:
  shoal dataset set flights --replicas 2
  shoal dataset set flights --pin --quota 500GiB
  shoal dataset set flights --no-pin --quota none --no-direct
"""


@dataset.command("set", epilog=SET_EXAMPLES)
@click.argument("name")
@click.option("--replicas", type=click.IntRange(min=1), help="Nodes that keep each shard.")
@click.option("--pin/--no-pin", "pinned", default=None, help="Whether its shards are never dropped to make room.")
@click.option("--quota", "quota_bytes", type=QuotaType(), help="Share of the cluster's cache kept for it.")
@click.option("--direct/--no-direct", default=None, help="Whether clients may read the origin where no node answers.")
@connect.endpoint_option
@output.json_option
def set_(
    name: str,
    replicas: int | None,
    pinned: bool | None,
    quota_bytes: int | None,
    direct: bool | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Change how a dataset is kept. Its snapshots and what is cached of it stay.

    With more replicas the nodes make the missing copies from each other, in the background.
    """
    datasets.check_name(name)
    wanted = {"replicas": replicas, "pinned": pinned, "quota_bytes": quota_bytes, "direct": direct}
    if all(value is None for value in wanted.values()):
        raise click.UsageError("nothing is to be changed: give --replicas, --[no-]pin, --quota or --[no-]direct")
    with connect.control(connect.cluster(endpoint)) as control:
        known = records.dataset(
            control.set_dataset(name, replicas=replicas, pinned=pinned, quota_bytes=quota_bytes, direct=direct)
        )
    if as_json:
        output.document(known)
    else:
        output.data(f"{name}: {records.policy(known)}")


REFRESH_EXAMPLES = """\b
Examples:
  shoal dataset refresh flights
  shoal dataset refresh flights --json | jq .changed
"""


@dataset.command(epilog=REFRESH_EXAMPLES)
@click.argument("name")
@connect.endpoint_option
@output.json_option
def refresh(name: str, endpoint: str | None, as_json: bool) -> None:
    """List the origin again and say what changed.

    Processes that already read the dataset keep the snapshot they began with.
    """
    datasets.check_name(name)
    with connect.control(connect.cluster(endpoint)) as control:
        before = records.dataset(control.dataset(name))
        after = records.dataset(control.refresh_dataset(name))
    changed = before["snapshot"] != after["snapshot"]
    if as_json:
        output.document({"name": name, "changed": changed, "before": before, "after": after})
    elif changed:
        output.data(f"refreshed {name}: {_extent(before)} before, {_extent(after)} now")
    else:
        output.data(f"{name} is unchanged: {_extent(after)}")


REMOVE_EXAMPLES = """\b
Example:
  shoal dataset remove flights
"""


@dataset.command(epilog=REMOVE_EXAMPLES)
@click.argument("name")
@connect.endpoint_option
@output.json_option
def remove(name: str, endpoint: str | None, as_json: bool) -> None:
    """Forget a dataset and free its cache. Its origin stays as it is."""
    datasets.check_name(name)
    with connect.control(connect.cluster(endpoint)) as control:
        known = records.dataset(control.dataset(name))
        control.remove_dataset(name)
    if as_json:
        output.document({"name": name, "removed": True, "cached_bytes": known["cached_bytes"]})
    else:
        freed = sizes.format(known["cached_bytes"])
        output.data(f"removed {name}: nodes free its {freed} of cache, but for what other datasets share")


def origin_of(text: str) -> str:
    """The origin URL that `text` means: itself, or ``file://`` and the absolute path of a local directory.

    Raises:
        InvalidRequest: it is neither.
    """
    scheme, separator, rest = text.partition("://")
    if separator:
        if not rest or not _SCHEME.fullmatch(scheme + ":"):
            raise InvalidRequest(_malformed(text))
        return f"file://{Path(rest).absolute()}" if scheme in ("file", "local") else text
    path = Path(text)
    if not text or (_SCHEME.match(text) and not path.exists()):
        raise InvalidRequest(_malformed(text))
    return f"file://{path.absolute()}"


def _malformed(text: str) -> str:
    return f"{text!r} is no origin: write a URL such as s3://bucket/prefix, or the path of a local directory"


def _extent(known: records.Json) -> str:
    objects = known["objects"]
    return f"{objects:,} {'object' if objects == 1 else 'objects'}, {sizes.format(known['total_bytes'])}"
