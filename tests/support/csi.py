"""The CSI driver as a process, the calls of an orchestrator, and what is mounted."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import tenacity

from shoal_csi import csi_pb2 as pb
from shoal_csi.csi_pb2_grpc import ControllerStub, IdentityStub, NodeStub
from shoal_csi.mount_table import Mount, MountTable
from tests.support import mount_stand_in

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0
STAND_IN = shlex.join([sys.executable, mount_stand_in.__file__])

Mode = pb.VolumeCapability.AccessMode.Mode


def capability(mode: int = Mode.MULTI_NODE_READER_ONLY, *flags: str) -> pb.VolumeCapability:
    """Of a file system."""
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags),
        access_mode=pb.VolumeCapability.AccessMode(mode=Mode.Name(mode)),
    )


class Place:
    """A short folder with everything of one node: the driver's state and socket, targets of pods, the stand-in's files.

    Whatever is mounted in it is taken away at the end.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="csi", dir="/tmp"))
        self.state = self.path / "state"
        self.pods = self.path / "pods"
        self.stand_in = self.path / "in"
        self.log = self.path / "log"
        self.path.chmod(0o755)
        self.pods.mkdir()
        self.stand_in.mkdir()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exception: object) -> None:
        while mounts := MountTable.now().under(str(self.path)):
            for mount in reversed(mounts):
                subprocess.run(["umount", "-l", mount.mountpoint], check=False, capture_output=True)
        # What served the mounts ends by itself, and takes its own files away meanwhile.
        stop = tenacity.stop_after_delay(TIMEOUT_S)
        tenacity.Retrying(wait=tenacity.wait_fixed(0.1), stop=stop, reraise=True)(shutil.rmtree, self.path)

    def target(self, name: str) -> str:
        return str(self.pods / name)

    def mounted(self) -> list[Mount]:
        """The shared mounts."""
        return MountTable.now().under(str(self.state / "mounts"))

    def published(self) -> list[Mount]:
        """What pods have."""
        return MountTable.now().under(str(self.pods))

    def slow(self, seconds: float) -> None:
        (self.stand_in / "slow").write_text(str(seconds))

    def refuse(self, sentence: str) -> None:
        (self.stand_in / "refuse").write_text(sentence)

    def well(self) -> None:
        for name in ("slow", "refuse"):
            (self.stand_in / name).unlink(missing_ok=True)


class Driver:
    """A running driver and its clients.

    Args:
        args: more of its flags.
        wrapper: a command that becomes the driver's.
        name: of its socket.

    Attributes:
        socket: as an endpoint.
        metrics_port: where Prometheus is answered.
    """

    def __init__(
        self,
        place: Place,
        environment: Mapping[str, str],
        *args: str,
        wrapper: Sequence[str] = (),
        name: str = "csi.sock",
    ) -> None:
        self.place = place
        self.socket = f"unix://{place.path}/{name}"
        command = [
            *wrapper,
            sys.executable,
            "-m",
            "shoal_csi",
            "--endpoint",
            self.socket,
            "--state-dir",
            str(place.state),
        ]
        command += ["--node-id", "node-1", "--look-after-every", "0.5", "--metrics-listen", "127.0.0.1:0", *args]
        env = {**self.environment(place), **environment}
        with place.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("ready "), place.log.read_text()
        self.metrics_port: int = json.loads(said.removeprefix("ready "))["metrics"]
        # Calls do not wait for a driver that is not there: a kill is seen at once.
        self._channel = grpc.insecure_channel(self.socket)
        self.identity: Any = IdentityStub(self._channel)
        self.controller: Any = ControllerStub(self._channel)
        self.node: Any = NodeStub(self._channel)

    @staticmethod
    def environment(place: Place) -> dict[str, str]:
        """Of what is started for a place."""
        roots = os.pathsep.join(str(ROOT / name) for name in ("client", "controller", "cachenode"))
        own = {"PYTHONPATH": roots, "STAND_IN": str(place.stand_in), "SHOAL_RUN_DIR": str(place.path / "run")}
        return {**os.environ, **own}

    def publish(
        self,
        target: str,
        context: Mapping[str, str],
        *,
        volume_id: str = "v",
        can: pb.VolumeCapability | None = None,
        readonly: bool = False,
    ) -> None:
        request = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            target_path=target,
            volume_capability=can or capability(),
            readonly=readonly,
            volume_context=context,
        )
        self.node.NodePublishVolume(request, timeout=TIMEOUT_S)

    def unpublish(self, target: str, *, volume_id: str = "v") -> None:
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=target)
        self.node.NodeUnpublishVolume(request, timeout=TIMEOUT_S)

    def stats(self, path: str, *, volume_id: str = "v") -> pb.NodeGetVolumeStatsResponse:
        request = pb.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=path)
        answer: pb.NodeGetVolumeStatsResponse = self.node.NodeGetVolumeStats(request, timeout=TIMEOUT_S)
        return answer

    def create(
        self, name: str, parameters: Mapping[str, str], *, can: pb.VolumeCapability | None = None, **fields: Any
    ) -> pb.Volume:
        request = pb.CreateVolumeRequest(
            name=name, parameters=parameters, volume_capabilities=[can or capability()], **fields
        )
        answer: pb.CreateVolumeResponse = self.controller.CreateVolume(request, timeout=TIMEOUT_S)
        return answer.volume

    def validate(self, volume_id: str, can: pb.VolumeCapability, context: Mapping[str, str]) -> Any:
        request = pb.ValidateVolumeCapabilitiesRequest(
            volume_id=volume_id, volume_capabilities=[can], volume_context=context
        )
        return self.controller.ValidateVolumeCapabilities(request, timeout=TIMEOUT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self._channel.close()
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def driver(
    place: Place, environment: Mapping[str, str], *args: str, wrapper: Sequence[str] = (), name: str = "csi.sock"
) -> Iterator[Driver]:
    """A driver over the stand-in, unless there are `args`."""
    running = Driver(place, environment, *(args or ("--mount-command", STAND_IN)), wrapper=wrapper, name=name)
    try:
        yield running
    finally:
        running.close()


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call that must fail fails."""
    try:
        call()
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")


def again(call: Callable[[], object], *codes: grpc.StatusCode) -> None:
    """Repeat a call as an orchestrator does, while it fails with one of `codes` (default: ABORTED)."""
    retried = codes or (grpc.StatusCode.ABORTED,)

    def is_retried(error: BaseException) -> bool:
        return isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call) and error.code() in retried

    for attempt in tenacity.Retrying(
        wait=tenacity.wait_fixed(0.05),
        stop=tenacity.stop_after_delay(TIMEOUT_S),
        retry=tenacity.retry_if_exception(is_retried),
        reraise=True,
    ):
        with attempt:
            call()


def files_in(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@contextlib.contextmanager
def silent_mount(place: str, source: str) -> Iterator[int]:
    """A FUSE mount without a server: silent while the descriptor that this gives is open, dead once it is closed."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    Path(place).mkdir(parents=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    command = ["mount", "-i", "-t", "fuse", "-o", options, source, place]
    subprocess.run(command, check=True, pass_fds=[fd])
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
