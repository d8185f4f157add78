"""The servers run as the chart runs them: user 65532, no capability, no new ones, a root file system that is read-only.

The flags are the chart's own, and so is the command that gives the cache node its folders.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from shoal_controller.__main__ import main as controller
from tests.support import helm

ROOT = Path(__file__).parents[2]
HOST = "shoal-controller.shoal.svc"

SCRIPT = """
cd /
touch /usr/written 2>/dev/null && { echo "the root file system can be written"; exit 1; }
$AS_CHOWN PREPARE
$AS_USER $PYTHON -m shoal_controller CONTROLLER > /tmp/controller.log 2>&1 &
controller=$!
$AS_USER $PYTHON -m shoal_cachenode CACHENODE > /tmp/cachenode.log 2>&1 &
cachenode=$!
tries=0
until grep -q connected /tmp/cachenode.log; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] && kill -0 $controller $cachenode || { cat /tmp/*.log; exit 1; }
    sleep 0.1
done
grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs):' /proc/$cachenode/status
export SHOAL_ENDPOINT=http://127.0.0.1:7441
$AS_USER $PYTHON -m shoal.cli dataset add data /opt/src/docs
$AS_USER $PYTHON -m shoal.cli prefetch data
env -u SHOAL_ENDPOINT $AS_USER $PYTHON -m shoal.cli cat shoal://data/wire.md | cmp - /opt/src/docs/wire.md
kill $cachenode && wait $cachenode && kill $controller && wait $controller && echo ended
"""


def why_not() -> str:
    if os.geteuid() != 0:
        return "mounts of their own want root"
    missing = [name for name in ("unshare", "setpriv", "chroot") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True, check=False)
    return tried.stderr


@pytest.mark.long
def test_without_any_right() -> None:
    if reason := why_not():
        pytest.skip(reason)
    found = {
        (component, container["name"]): container
        for component, pod in helm.pods(helm.manifests({}))
        for container in helm.containers(pod)
    }
    known = {flag for option in controller.params for flag in option.opts}
    on_kubernetes = ("--kubernetes", "--namespace", "--identity", "--pod-ip", "--lease-name", "--gate")
    commands = {
        "PREPARE": found["cachenode", "prepare"]["command"],
        "CACHENODE": [*found["cachenode", "cachenode"]["args"][1:], "--capacity=64MiB"],
        "CONTROLLER": [
            flag for flag in found["controller", "controller"]["args"][1:] if not flag.startswith(on_kubernetes)
        ],
    }
    assert {word.partition("=")[0] for word in commands["CONTROLLER"]} <= known
    script = SCRIPT
    for name, words in commands.items():
        line = shlex.join(words).replace(HOST, "127.0.0.1")
        for variable, value in (("POD_IP", "127.0.0.1"), ("NODE_NAME", "gpu-1"), ("ZONE", "")):
            line = line.replace(f"$({variable})", value)
        script = script.replace(name, line)
    alone = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
    done = subprocess.run(
        [*alone, "bash", ROOT / "tests/support/unprivileged.sh", ROOT, "bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1] == "ended"
    for line in ("Uid:\t65532\t65532\t65532\t65532", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        assert line in done.stdout
