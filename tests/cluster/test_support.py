"""The server and the proxy that other tests lean on."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import s3fs

from tests.support.proxy import CountingProxy, PacedProxy
from tests.support.weed import Weed

_STARTS_ONE = """
import sys
from tests.support.weed import Weed
with Weed() as weed:
    print(weed.endpoint_url, weed.directory, weed.pid, flush=True)
    sys.stdin.read()
"""


def test_a_bucket_takes_and_gives(s3: Weed) -> None:
    s3.create_bucket("support")
    filesystem = s3.filesystem()
    filesystem.pipe_file("support/a b/ü", b"123")
    assert filesystem.cat_file("support/a b/ü") == b"123"


def test_nothing_is_left_of_a_server_whose_owner_was_killed() -> None:
    root = Path(__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", _STARTS_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    url, directory, guard = owner.stdout.readline().split()
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        assert answer.status == 200
    ended = os.pidfd_open(int(guard))
    try:
        owner.kill()
        owner.communicate()
        assert select.select([ended], [], [], 60)[0], "the guard ends by itself"
    finally:
        os.close(ended)
    assert not Path(directory).exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/healthz", timeout=10)


def test_the_proxy_counts_and_resets(s3: Weed, counting_s3: CountingProxy) -> None:
    with urllib.request.urlopen(f"{counting_s3.endpoint_url}/healthz", timeout=10) as answer:
        answer.read()
    assert counting_s3.connections == 1
    assert counting_s3.bytes_from_origin > 0
    assert counting_s3.bytes_to_origin > 0
    counting_s3.reset()
    assert (counting_s3.connections, counting_s3.bytes_from_origin, counting_s3.bytes_to_origin) == (0, 0, 0)


def test_a_rate_holds_over_all_connections_together(s3: Weed) -> None:
    s3.create_bucket("rate")
    s3.filesystem().pipe_file("rate/object", bytes(1 << 20))
    with PacedProxy(s3.endpoint_url, 4 << 20) as proxy:
        options = {**s3.storage_options, "endpoint_url": proxy.endpoint_url}
        filesystem = s3fs.S3FileSystem(**options, skip_instance_cache=True)
        began = time.monotonic()
        found = filesystem.cat_ranges(["rate/object"] * 4, [0] * 4, [1 << 20] * 4)
        seconds = time.monotonic() - began
    assert all(each == bytes(1 << 20) for each in found)
    assert proxy.connections > 1
    assert proxy.bytes_from_origin >= 4 << 20
    assert seconds > 0.9  # four connections' bytes at the rate of one link; how much longer is the machine's


def test_the_proxy_of_a_dead_server_closes_connections() -> None:
    with CountingProxy("http://127.0.0.1:1") as proxy, pytest.raises(OSError, match=r"closed|reset|refused"):
        urllib.request.urlopen(proxy.endpoint_url, timeout=10)
