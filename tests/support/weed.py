"""A real S3 server for tests, the demo and benchmarks: SeaweedFS on free ports of 127.0.0.1, with access keys.

`weed mini` is used because it answers in under a second, where `weed server` waits 1.5 s for an election and 1 s more
for its gateway. The rule: nothing outlives us. A shell stands between us and the server and ends it, files included,
when our end of its standard input closes, which the kernel does for us even after ``kill -9``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import s3fs

from shoal.devcluster.ports import free_ports
from shoal.devcluster.starting import Startable

#: $1: directory, $2: ports (they name the sockets that weed leaves in /tmp), then the command. Exit status 137 is ours;
#: after any other the directory stays, so that the log can be read.
_GUARD = """
exec 3<&0
dir=$1; ports=$2; shift 2
"$@" 3<&- & weed=$!
{ cat <&3 >/dev/null; kill -9 $weed; } & watch=$!
wait $weed; status=$?
kill $watch 2>/dev/null
for port in $ports; do rm -f /tmp/seaweedfs-*-"$port".sock; done
if [ $status = 137 ]; then rm -rf "$dir"; fi
exit $status
"""
_PORTS = ("master", "volume", "filer", "s3", "admin")
_START_TIMEOUT_S = 60


class Weed(Startable):
    """A SeaweedFS with one identity; use it as a context manager. Data goes when it closes.

    Attributes:
        endpoint_url: ``http://127.0.0.1:{port}`` of its S3 gateway.
        access_key, secret_key: of the one identity, fresh each time.
        directory: of its files, which goes with it.
        pid: of the shell that guards it; it ends last.
    """

    def __init__(self) -> None:
        self.access_key = "shoal" + secrets.token_hex(6)
        self.secret_key = secrets.token_hex(20)
        self.endpoint_url = ""
        self.directory = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._filesystem: s3fs.S3FileSystem | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec (and ``shoal dataset add --storage-options``) needs to reach it."""
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint_url}

    def filesystem(self) -> s3fs.S3FileSystem:
        """One for all, as each costs 0.1 s; without a listings cache, so that it sees what other processes write."""
        if self._filesystem is None:
            options = self.storage_options
            self._filesystem = s3fs.S3FileSystem(**options, use_listings_cache=False, skip_instance_cache=True)
        return self._filesystem

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket (3 to 63 lower-case letters, digits, '-' and '.')."""
        self.filesystem().call_s3("create_bucket", Bucket=name)

    def start(self) -> None:
        self._filesystem = None
        directory = self.directory = Path(tempfile.mkdtemp(prefix="shoal-weed-"))
        ports = free_ports(2 * len(_PORTS))
        self.endpoint_url = f"http://127.0.0.1:{ports[2 * _PORTS.index('s3')]}"
        identity = {
            "name": "shoal",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = directory / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        (directory / "data").mkdir()
        command = [
            *(find_weed(), "-logtostderr=true", "mini", f"-dir={directory / 'data'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-webdav=false", "-admin.ui=false", "-master.telemetry=false"),
            # Files grow as they are written; a bucket takes several of them, so the number must not run out.
            *("-volume.max=10000", "-master.volumeSizeLimitMB=1024"),
        ]
        for index, name in enumerate(_PORTS):
            command += [f"-{name}.port={ports[2 * index]}", f"-{name}.port.grpc={ports[2 * index + 1]}"]
        # Nothing of ours may reach it: it would take AWS_* for credentials, and read configuration from HOME.
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(directory)}
        environment["WEED_MASTER_VOLUME_GROWTH_COPY_1"] = "1"  # files for a new bucket; 7 would slow its first write
        log = directory / "weed.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(directory), " ".join(map(str, ports)), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us to handle, not for it
            )
        self._await_ready(log)

    def close(self) -> None:
        """End the server and delete its files. A second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)

    def _await_ready(self, log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
                    raise RuntimeError(f"SeaweedFS did not start:\n{tail}") from error
            time.sleep(0.02)


def find_weed() -> str:
    """The `weed` program: beside the running interpreter (an environment need not be activated), else on PATH."""
    name = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if name is None:
        raise FileNotFoundError("'weed' is not installed: pip install 'shoal[demo]'")
    return name
