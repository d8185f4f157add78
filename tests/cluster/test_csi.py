"""The CSI driver as a process, called over its socket, over real bind mounts.

What mounts a dataset is a stand-in here except where a test says otherwise: what is asserted is the driver's own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import NotFound
from shoal_csi import bind, capability, mounts, rundir
from shoal_csi import csi_pb2 as pb
from shoal_csi.rundir import Record
from tests.support import csi
from tests.support.csi import Driver, Mode, Place, again, code_of, driver, files_in
from tests.support.waiting import wait_for

# Its processes take minutes of two cores.
pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")]

Code = grpc.StatusCode
FILES = {"train/0.bin": b"zero", "train/1.bin": b"one" * 1000, "val/odd name.txt": b"", "top": b"t"}
NOBODY = 65534


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    _write(folder, FILES)
    return folder


@pytest.fixture(scope="module")
def shoal(origin: Path) -> Iterator[DevCluster]:
    """A cluster with the datasets `one` and `two`."""
    with DevCluster(nodes=1, capacity="1GiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            for name in ("one", "two"):
                control.add_dataset(name, f"file://{origin}", shard_size=0, replicas=1, storage_options="{}")
        yield cluster


def _make_place() -> Place:
    place = Place()
    for name in ("one", "two"):
        _write(place.stand_in / name, FILES)
    return place


@pytest.fixture(scope="module")
def shared_driver(shoal: DevCluster) -> Iterator[Driver]:
    with _make_place() as place, driver(place, shoal.environment()) as running:
        yield running


@pytest.fixture
def running(shared_driver: Driver) -> Iterator[Driver]:
    """A driver over the cluster that nobody stops. After each test nothing is left of what it did."""
    yield shared_driver
    place = shared_driver.place
    place.well()
    for mount in place.published():
        again(lambda target=mount.mountpoint: shared_driver.unpublish(target))  # type: ignore[misc]
    wait_for(lambda: _nothing_is_left(place))


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """That of the running driver, or a new one for tests that start and kill their own."""
    if "running" in request.fixturenames:
        yield request.getfixturevalue("running").place
    else:
        with _make_place() as place:
            yield place


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _digest(cluster: DevCluster, dataset: str) -> str:
    with Control(cluster.controller_grpc) as control:
        return control.dataset(dataset).snapshot


def _nothing_is_left(place: Place) -> bool:
    return not place.mounted() and not place.published() and not list((place.state / "mounts").iterdir())


# One volume.


def test_a_pod_sees_the_dataset_and_cannot_write(place: Place, running: Driver) -> None:
    target = place.target("a")
    running.publish(target, {"dataset": "one"})
    assert files_in(target) == FILES
    with pytest.raises(OSError, match="Read-only file system"):
        (Path(target) / "new").write_bytes(b"")
    (mount,) = place.published()
    assert {"ro", "nosuid", "nodev"} <= mount.options
    running.unpublish(target)
    assert not Path(target).exists()
    assert _nothing_is_left(place)


def test_a_folder_of_the_dataset(place: Place, running: Driver) -> None:
    running.publish(place.target("a"), {"dataset": "one", "subpath": "train"})
    assert files_in(place.target("a")) == {"0.bin": b"zero", "1.bin": b"one" * 1000}


def test_programs_without_rights_read(place: Place, running: Driver) -> None:
    target = place.target("a")
    running.publish(target, {"dataset": "one"})
    command = ["cat", f"{target}/train/0.bin"]
    done = subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True)
    assert done.stdout == b"zero"


def test_volumes_of_one_dataset_share_a_mount(place: Place, running: Driver) -> None:
    for name, context in {
        "a": {"dataset": "one"},
        "b": {"dataset": "one", "subpath": "train"},
        "c": {"dataset": "two"},
    }.items():
        running.publish(place.target(name), context, volume_id=name)
    assert len(place.mounted()) == 2
    running.unpublish(place.target("a"), volume_id="a")
    assert files_in(place.target("b")).keys() == {"0.bin", "1.bin"}
    assert len(place.mounted()) == 2
    running.unpublish(place.target("b"), volume_id="b")
    assert len(place.mounted()) == 1
    running.unpublish(place.target("c"), volume_id="c")
    assert _nothing_is_left(place)


def test_calls_may_be_repeated(place: Place, running: Driver) -> None:
    target = place.target("a")
    for _ in range(3):
        running.publish(target, {"dataset": "one"})
    assert len(place.published()) == 1
    for _ in range(3):
        running.unpublish(target)
    assert _nothing_is_left(place)


def test_kubernetes_writes_of_an_inline_volume(place: Place, running: Driver) -> None:
    """An inline volume always comes as a writer's; the pod says readOnly."""
    context = {"dataset": "one", "csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "p"}
    writer = csi.capability(Mode.SINGLE_NODE_WRITER)
    code, sentence = code_of(lambda: running.publish(place.target("a"), context, can=writer))
    assert code is Code.FAILED_PRECONDITION
    assert "readOnly: true" in sentence
    assert place.published() == []
    running.publish(place.target("a"), context, can=writer, readonly=True)
    running.publish(place.target("b"), {"dataset": "one", "writers": "read-only"}, can=writer)
    assert "ro" in place.published()[1].options


def test_mount_options(place: Place, running: Driver) -> None:
    target = place.target("a")
    strict = csi.capability(Mode.MULTI_NODE_READER_ONLY, "noexec", "noatime")
    running.publish(target, {"dataset": "one"}, can=strict)
    assert {"ro", "noexec", "noatime"} <= place.published()[0].options
    running.publish(target, {"dataset": "one"}, can=strict)
    code, sentence = code_of(lambda: running.publish(target, {"dataset": "one"}))
    assert code is Code.ALREADY_EXISTS
    assert "other mount options" in sentence


def test_numbers_of_a_volume(place: Place, running: Driver) -> None:
    target = place.target("a")
    running.publish(target, {"dataset": "one"})
    answer = running.stats(target)
    assert not answer.volume_condition.abnormal
    usage = {each.unit: each for each in answer.usage}
    seen = os.statvfs(target)
    assert usage[pb.VolumeUsage.BYTES].total == seen.f_blocks * seen.f_frsize > 0
    assert usage[pb.VolumeUsage.INODES].total == seen.f_files > 0
    assert code_of(lambda: running.stats(place.target("b")))[0] is Code.NOT_FOUND
    assert code_of(lambda: running.stats("not/absolute"))[0] is Code.NOT_FOUND


# What is refused.


def _refused(place: Place, call: Callable[[], object], code: grpc.StatusCode, sentence: str) -> None:
    found = code_of(call)
    assert found[0] is code, found
    assert sentence in found[1]
    assert place.published() == []


def test_arguments_are_checked_first(place: Place, running: Driver) -> None:
    good = {"dataset": "one"}
    a = place.target("a")
    bad, missing = Code.INVALID_ARGUMENT, Code.NOT_FOUND
    publish = running.publish
    _refused(place, lambda: publish(a, good, volume_id=""), bad, "volume_id is missing")
    _refused(place, lambda: publish("", good), bad, "target_path is missing")
    _refused(place, lambda: publish("a/b", good), bad, "an absolute path")
    _refused(place, lambda: publish("/tmp/../etc", good), bad, "an absolute path")
    _refused(place, lambda: publish(f"{a}/b/c", good), bad, "its parent is no folder")
    _refused(place, lambda: publish(a, {}), bad, "add the attribute 'dataset'")
    _refused(place, lambda: publish(a, {"dataset": "one", "subdir": "x"}), bad, "'subdir' is no attribute")
    _refused(place, lambda: publish(a, good, can=pb.VolumeCapability()), bad, "no access type")
    _refused(place, lambda: publish(a, {"dataset": "three"}), missing, "three")
    _refused(place, lambda: publish(a, {"dataset": "one", "snapshot": "0000"}), missing, "is not one of its snapshots")
    _refused(place, lambda: publish(a, {"dataset": "one", "subpath": "test"}), missing, "'test' is missing")
    _refused(place, lambda: publish(a, {"dataset": "one", "subpath": "top"}), bad, "is no folder")
    _refused(place, lambda: running.unpublish(a, volume_id=""), bad, "volume_id is missing")
    _refused(place, lambda: running.unpublish(""), bad, "target_path is missing")
    _refused(place, lambda: running.stats(a, volume_id=""), bad, "volume_id is missing")
    _refused(place, lambda: running.stats(""), bad, "volume_path is missing")
    without = pb.NodePublishVolumeRequest(volume_id="v", target_path=a, volume_context=good)
    _refused(place, lambda: running.node.NodePublishVolume(without), bad, "volume_capability is missing")
    assert _nothing_is_left(place)
    assert not Path(a).exists()


def test_a_link_in_a_dataset_leads_nowhere(place: Place, running: Driver) -> None:
    link = place.stand_in / "one" / "out"
    link.symlink_to("/etc")
    context = {"dataset": "one", "subpath": "out"}
    try:
        _refused(place, lambda: running.publish(place.target("a"), context), Code.INVALID_ARGUMENT, "is no folder")
    finally:
        link.unlink()


def test_another_volume_at_the_target(place: Place, running: Driver) -> None:
    target = place.target("a")
    running.publish(target, {"dataset": "one", "subpath": "train"})
    for other in ({"dataset": "two", "subpath": "train"}, {"dataset": "one"}):
        code, sentence = code_of(lambda other=other: running.publish(target, other))  # type: ignore[misc]
        assert code is Code.ALREADY_EXISTS
        assert "/train is at" in sentence
    assert files_in(target).keys() == {"0.bin", "1.bin"}


def test_something_else_at_the_target(place: Place, running: Driver) -> None:
    target = place.target("a")
    Path(target).mkdir()
    (Path(target) / "file").write_bytes(b"somebody's")
    code, sentence = code_of(lambda: running.unpublish(target))
    assert code is Code.INTERNAL
    assert "not empty" in sentence
    assert (Path(target) / "file").exists()
    subprocess.run(["mount", "-t", "tmpfs", "somebody", target], check=True)
    code, sentence = code_of(lambda: running.publish(target, {"dataset": "one"}))
    assert code is Code.ALREADY_EXISTS
    assert "a mount of somebody" in sentence
    subprocess.run(["umount", target], check=True)
    (Path(target) / "file").unlink()
    running.unpublish(target)


def test_a_mount_that_fails_says_why_and_leaves_nothing(place: Place, running: Driver) -> None:
    place.refuse("the drive is full of eels")
    code, sentence = code_of(lambda: running.publish(place.target("a"), {"dataset": "one"}))
    assert code is Code.INTERNAL
    assert "error: the drive is full of eels" in sentence
    assert _nothing_is_left(place)
    place.well()
    running.publish(place.target("a"), {"dataset": "one"})


def test_no_cluster(place: Place) -> None:
    digest = "0123456789abcdef" * 2
    nowhere = {"SHOAL_ENDPOINT": "http://127.0.0.1:1", "SHOAL_SOCKET": str(place.path / "none")}
    with driver(place, nowhere) as running:
        assert running.identity.Probe(pb.ProbeRequest()).ready.value
        code, sentence = code_of(lambda: running.publish(place.target("a"), {"dataset": "one"}))
        assert code is Code.UNAVAILABLE
        assert "127.0.0.1:1" in sentence
        assert code_of(lambda: running.create("n", {"dataset": "one"}))[0] is Code.UNAVAILABLE
        running.publish(place.target("a"), {"dataset": "one", "snapshot": digest})
        assert f"/one@{digest}/" in place.mounted()[0].mountpoint


# Claims.


def test_a_claim_is_a_name_for_a_dataset(place: Place, running: Driver, shoal: DevCluster) -> None:
    size = pb.CapacityRange(required_bytes=1 << 50)
    volume = running.create("pvc-1", {"dataset": "one", "subpath": "train"}, capacity_range=size)
    assert dict(volume.volume_context) == {"dataset": "one", "subpath": "train", "snapshot": _digest(shoal, "one")}
    assert running.create("pvc-1", {"dataset": "one", "subpath": "train"}) == volume
    assert running.create("pvc-2", {"dataset": "one", "subpath": "train"}).volume_id != volume.volume_id
    assert running.create("pvc-1", {"dataset": "two", "subpath": "train"}).volume_id != volume.volume_id
    newest = running.create("pvc-1", {"dataset": "one", "snapshot": "newest"})
    assert newest.volume_context["snapshot"] == "newest"
    running.publish(place.target("a"), volume.volume_context, volume_id=volume.volume_id)
    assert files_in(place.target("a")).keys() == {"0.bin", "1.bin"}
    for _ in range(2):
        running.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id))
    assert files_in(place.target("a")).keys() == {"0.bin", "1.bin"}


def test_a_claim_keeps_its_snapshot(place: Place, running: Driver, shoal: DevCluster, tmp_path: Path) -> None:
    _write(tmp_path, {"a": b"1"})
    with Control(shoal.controller_grpc) as control:
        control.add_dataset("grows", f"file://{tmp_path}", shard_size=0, replicas=1, storage_options="{}")
    _write(place.stand_in / "grows", FILES)
    kept = running.create("pvc-1", {"dataset": "grows"})
    follows = running.create("pvc-2", {"dataset": "grows", "snapshot": "newest"})
    first = _digest(shoal, "grows")
    _write(tmp_path, {"b": b"2"})
    with Control(shoal.controller_grpc) as control:
        second = control.refresh_dataset("grows").snapshot
    running.publish(place.target("a"), kept.volume_context)
    running.publish(place.target("b"), follows.volume_context)
    assert first != second
    names = {mount.mountpoint.split("/")[-2] for mount in place.mounted()}
    assert names == {f"grows@{first}", f"grows@{second}"}
    assert code_of(lambda: running.publish(place.target("a"), {"dataset": "grows", "snapshot": second}))[0] is (
        Code.ALREADY_EXISTS
    )


def test_claims_that_cannot_be(place: Place, running: Driver) -> None:
    one = {"dataset": "one"}
    bad = Code.INVALID_ARGUMENT
    _refused(place, lambda: running.create("", one), bad, "name is missing")
    _refused(place, lambda: running.create("n", {}), bad, "add the attribute 'dataset'")
    _refused(place, lambda: running.create("n", {"dataset": "three"}), Code.NOT_FOUND, "three")
    for mode in (Mode.SINGLE_NODE_WRITER, Mode.MULTI_NODE_MULTI_WRITER):
        _refused(place, lambda: running.create("n", one, can=csi.capability(mode)), bad, "ReadOnlyMany")  # noqa: B023
        running.create("n", one | {"writers": "read-only"}, can=csi.capability(mode))
    for mode in (Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY):
        running.create("n", one, can=csi.capability(mode))
    clone = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id="x"))
    _refused(place, lambda: running.create("n", one, volume_content_source=clone), bad, "cannot be cloned")
    _refused(place, lambda: running.create("n", one, mutable_parameters={"a": "b"}), bad, "no parameters that change")
    size = pb.CapacityRange(required_bytes=2, limit_bytes=1)
    _refused(place, lambda: running.create("n", one, capacity_range=size), bad, "2 to 1 bytes")
    without = pb.CreateVolumeRequest(name="n", parameters=one)
    _refused(place, lambda: running.controller.CreateVolume(without), bad, "volume_capabilities are missing")
    _refused(place, lambda: running.controller.DeleteVolume(pb.DeleteVolumeRequest()), bad, "volume_id is missing")


def test_what_can_be_done_with_a_volume(running: Driver) -> None:
    reader, writer = csi.capability(), csi.capability(Mode.MULTI_NODE_MULTI_WRITER)
    volume = running.create("n", {"dataset": "one"})
    confirmed = running.validate(volume.volume_id, reader, volume.volume_context).confirmed
    assert list(confirmed.volume_capabilities) == [reader]
    assert confirmed.volume_context == volume.volume_context
    assert running.validate(volume.volume_id, reader, {}).HasField("confirmed")
    assert running.validate("a static volume's own handle", reader, {"dataset": "one"}).HasField("confirmed")
    refused = running.validate(volume.volume_id, writer, volume.volume_context)
    assert not refused.HasField("confirmed")
    assert "ReadOnlyMany" in refused.message
    for volume_id, context in (("unknown", {}), ("unknown", {"dataset": "three"})):
        code, _ = code_of(lambda i=volume_id, c=context: running.validate(i, reader, c))  # type: ignore[misc]
        assert code is Code.NOT_FOUND


# What the driver says of itself.


def test_services_are_those_that_were_asked_for(place: Place, shoal: DevCluster) -> None:
    with driver(place, shoal.environment(), "--controller") as running:
        running.create("n", {"dataset": "one"})
        assert code_of(lambda: running.unpublish(place.target("a")))[0] is Code.UNIMPLEMENTED
        assert len(running.identity.GetPluginCapabilities(pb.GetPluginCapabilitiesRequest()).capabilities) == 1
    with driver(place, shoal.environment(), "--node", "--mount-command", csi.STAND_IN) as running:
        assert code_of(lambda: running.create("n", {"dataset": "one"}))[0] is Code.UNIMPLEMENTED
        assert not running.identity.GetPluginCapabilities(pb.GetPluginCapabilitiesRequest()).capabilities
        assert running.node.NodeGetInfo(pb.NodeGetInfoRequest()).node_id == "node-1"
        assert running.identity.GetPluginInfo(pb.GetPluginInfoRequest()).name == "csi.shoal.io"


def test_what_is_no_message_is_an_invalid_argument(running: Driver) -> None:
    channel = grpc.insecure_channel(running.socket)
    call = channel.unary_unary("/csi.v1.Node/NodePublishVolume")
    code, sentence = code_of(lambda: call(b"\xff\xff\xff"))
    channel.close()
    assert code is Code.INVALID_ARGUMENT
    assert "no request of NodePublishVolume" in sentence


def test_secrets_are_not_logged(place: Place, running: Driver) -> None:
    request = pb.NodePublishVolumeRequest(volume_id="v", secrets={"key": "hunter2"})
    assert code_of(lambda: running.node.NodePublishVolume(request))[0] is Code.INVALID_ARGUMENT
    assert "NodePublishVolume: INVALID_ARGUMENT: target_path is missing" in place.log.read_text()
    assert "hunter2" not in place.log.read_text()


def test_one_driver_a_socket(place: Place, shoal: DevCluster) -> None:
    with driver(place, shoal.environment()) as first:
        command = [sys.executable, "-m", "shoal_csi", "--endpoint", first.socket, "--node-id", "n"]
        environment = {**os.environ, "PYTHONPATH": str(csi.ROOT / "client")}
        second = subprocess.run(
            [*command, "--state-dir", str(place.state)], env=environment, capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert second.stderr.startswith("error: another driver serves at")
        assert first.stop() == 0
    with driver(place, shoal.environment()) as third:
        third.publish(place.target("a"), {"dataset": "one"})


# Many calls at once, and drivers that are killed.


def test_one_target_and_many_callers(place: Place, running: Driver) -> None:
    target = place.target("a")
    place.slow(0.2)
    codes = []

    def publish() -> None:
        try:
            running.publish(target, {"dataset": "one"})
            codes.append(Code.OK)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            codes.append(error.code())

    _at_once([publish] * 8)
    assert Code.OK in codes
    assert set(codes) <= {Code.OK, Code.ABORTED}
    assert len(place.published()) == len(place.mounted()) == 1
    running.unpublish(target)
    assert _nothing_is_left(place)


def test_many_targets_share_one_mount_from_the_start(place: Place, running: Driver) -> None:
    place.slow(0.2)
    targets = [place.target(str(number)) for number in range(8)]
    _at_once([lambda t=target: running.publish(t, {"dataset": "one"}, volume_id=t) for target in targets])  # type: ignore[misc]
    assert len(place.mounted()) == 1
    assert len(place.published()) == 8
    _at_once([lambda t=target: running.unpublish(t, volume_id=t) for target in targets])  # type: ignore[misc]
    wait_for(lambda: _nothing_is_left(place))


def test_pods_that_come_and_go(place: Place, running: Driver) -> None:
    """The last volume of a dataset goes while the next one comes: that one has a mount that answers."""

    def pod(name: str, dataset: str) -> None:
        for _ in range(10):
            again(lambda: running.publish(place.target(name), {"dataset": dataset, "subpath": "train"}))
            assert files_in(place.target(name)).keys() == {"0.bin", "1.bin"}
            again(lambda: running.unpublish(place.target(name)))

    _at_once([lambda n=number: pod(f"p{n}", ("one", "two")[n % 2]) for number in range(6)])  # type: ignore[misc]
    wait_for(lambda: _nothing_is_left(place))


@pytest.mark.parametrize("killed_after_s", [0.05, 0.3, 0.6, 1.0])
def test_killed_while_publishing(place: Place, shoal: DevCluster, killed_after_s: float) -> None:
    """Whatever was done by then, the next driver finishes it, once."""
    target = place.target("a")
    place.slow(0.3)
    with driver(place, shoal.environment()) as first:
        request = pb.NodePublishVolumeRequest(
            volume_id="v", target_path=target, volume_capability=csi.capability(), volume_context={"dataset": "one"}
        )
        call = first.node.NodePublishVolume.future(request)
        threading.Event().wait(killed_after_s)  # how far it is by then is what differs between the runs
        first.kill()
        call.exception()
    place.well()
    with driver(place, shoal.environment()) as second:
        again(lambda: second.publish(target, {"dataset": "one"}))
        assert files_in(target) == FILES
        assert len(place.published()) == 1
        again(lambda: second.unpublish(target))
        wait_for(lambda: _nothing_is_left(place))


def test_killed_while_unpublishing(place: Place, shoal: DevCluster) -> None:
    target = place.target("a")
    with driver(place, shoal.environment()) as first:
        first.publish(target, {"dataset": "one"})
        place.slow(5.0)
        request = pb.NodeUnpublishVolumeRequest(volume_id="v", target_path=target)
        call = first.node.NodeUnpublishVolume.future(request)
        wait_for(lambda: not place.published())
        first.kill()
        call.exception()
        assert place.mounted()
    place.well()
    with driver(place, shoal.environment()) as second:
        second.unpublish(target)
        wait_for(lambda: _nothing_is_left(place))


def test_killed_between_two_calls(place: Place, shoal: DevCluster) -> None:
    with driver(place, shoal.environment()) as first:
        first.publish(place.target("a"), {"dataset": "one"})
        first.publish(place.target("b"), {"dataset": "two", "subpath": "train"})
        first.kill()
    assert files_in(place.target("a")) == FILES
    with driver(place, shoal.environment()) as second:
        second.publish(place.target("a"), {"dataset": "one"})
        assert len(place.published()) == 2
        wait_for(lambda: place.log.read_text().count("taken over") == 2)
        assert f"which answers, for 1 volumes: {place.target('b')}" in place.log.read_text()
        for name in ("a", "b"):
            second.unpublish(place.target(name))
        assert _nothing_is_left(place)


def test_a_bind_that_was_not_finished_is(place: Place, running: Driver) -> None:
    """A driver that was killed between the two calls of a bind mount."""
    running.publish(place.target("a"), {"dataset": "one"})
    target = place.target("b")
    Path(target).mkdir()
    subprocess.run(["mount", "--bind", place.mounted()[0].mountpoint, target], check=True)
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)
    assert "rw" in {option for mount in place.published() for option in mount.options}
    running.publish(target, {"dataset": "one"})
    assert all({"ro", "nosuid", "nodev"} <= mount.options for mount in place.published())


def test_volumes_of_a_dead_mount_are_bound_again(place: Place, shoal: DevCluster) -> None:
    digest = _digest(shoal, "one")
    shared = place.state / "mounts" / f"one@{digest}" / "1"
    target = place.target("a")
    with csi.silent_mount(str(shared), "shoal"):
        bind.bind(str(shared), "", target, capability.ALWAYS)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(target)
    place.refuse("no cluster yet")
    with driver(place, shoal.environment()) as running:
        wait_for(lambda: "no cluster yet" in place.log.read_text())
        assert running.stats(target).volume_condition.abnormal
        place.well()
        wait_for(lambda: "bound again: 1 volumes" in place.log.read_text())
        assert files_in(target) == FILES
        (mount,) = place.published()
        assert {"ro", "nosuid", "nodev"} <= mount.options
        (fresh,) = place.mounted()
        assert Path(fresh.mountpoint).parent == shared.parent
        assert fresh.mountpoint != str(shared)
        assert not running.stats(target).volume_condition.abnormal
        running.unpublish(target)
        assert _nothing_is_left(place)


def test_a_dead_mount_that_nobody_uses_is_detached(place: Place, shoal: DevCluster) -> None:
    shared = place.state / "mounts" / f"one@{_digest(shoal, 'one')}" / "1"
    with csi.silent_mount(str(shared), "shoal"):
        pass
    with driver(place, shoal.environment()):
        wait_for(lambda: f"detached {shared}, which has lost its server" in place.log.read_text())
        wait_for(lambda: _nothing_is_left(place))


def test_a_round_that_fails_is_not_the_last(place: Place, shoal: DevCluster) -> None:
    folder = place.state / "mounts"
    shared = folder / f"one@{_digest(shoal, 'one')}" / "1"
    with driver(place, shoal.environment()):
        folder.rmdir()
        wait_for(lambda: "cannot be looked after, trying again" in place.log.read_text())
        with csi.silent_mount(str(shared), "shoal"):
            pass
        wait_for(lambda: f"detached {shared}, which has lost its server" in place.log.read_text())


def test_a_volume_stays_until_there_is_what_takes_its_place(place: Place) -> None:
    """What a pod would find instead is an empty folder of the node."""
    target = place.target("a")
    Path(target).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "before", target], check=True)
    with pytest.raises(NotFound, match="'gone' is missing"):
        bind.replace(str(place.stand_in / "one"), "gone", target, capability.ALWAYS)
    assert [mount.source for mount in place.published()] == ["before"]
    bind.replace(str(place.stand_in / "one"), "train", target, capability.ALWAYS)
    assert files_in(target).keys() == {"0.bin", "1.bin"}


def test_a_dead_volume_is_published_anew(place: Place, running: Driver) -> None:
    target = place.target("a")
    with csi.silent_mount(target, "somebody's"):
        pass
    running.publish(target, {"dataset": "one"})
    assert files_in(target) == FILES


def test_a_silent_mount_is_left_alone_and_hangs_nobody(place: Place, shoal: DevCluster) -> None:
    """Its server may be on its way back, with files open."""
    digest = _digest(shoal, "one")
    shared = place.state / "mounts" / f"one@{digest}" / "1"
    target = place.target("a")
    options = ("--mount-command", csi.STAND_IN, "--probe-timeout", "0.5")
    with csi.silent_mount(str(shared), "shoal"):
        bind.bind(str(shared), "", target, capability.ALWAYS)
        with driver(place, shoal.environment(), *options) as running:
            wait_for(lambda: f"{shared} does not answer: left alone for 1 volumes" in place.log.read_text())
            for name in ("a", "b"):
                code, sentence = code_of(lambda n=name: running.publish(place.target(n), {"dataset": "one"}))  # type: ignore[misc]
                assert code in (Code.UNAVAILABLE, Code.ABORTED)
                assert "does not answer" in sentence or "at work on" in sentence
            assert running.stats(target).volume_condition.message.endswith("does not answer")
            assert len(place.mounted()) == len(place.published()) == 1
            running.publish(place.target("c"), {"dataset": "two"})
            again(lambda: running.unpublish(target))
            assert not Path(target).exists()
            running.kill()


# Over real mounts.


@pytest.fixture
def real(place: Place, shoal: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Driver]]:
    """Starts drivers that run `shoal mount`."""
    monkeypatch.setenv("SHOAL_RUN_DIR", str(place.path / "run"))
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(driver(place, shoal.environment(), "--probe-timeout", "5"))


def _served(place: Place) -> list[dict[str, Any]]:
    """What processes serve of it; others on this machine may have mounts too."""
    return [each for each in mounts.listed() if each["mountpoint"].startswith(str(place.path))]


def test_a_dataset_of_the_cluster_in_a_pod(place: Place, real: Callable[[], Driver], origin: Path) -> None:
    running = real()
    target, folder = place.target("a"), place.target("b")
    running.publish(target, {"dataset": "one"})
    running.publish(folder, {"dataset": "one", "subpath": "train"})
    assert files_in(target) == files_in(str(origin)) == FILES
    assert files_in(folder).keys() == {"0.bin", "1.bin"}
    done = subprocess.run(["cat", f"{folder}/1.bin"], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True)
    assert done.stdout == FILES["train/1.bin"]
    with pytest.raises(OSError, match="Read-only file system"):
        (Path(target) / "new").write_bytes(b"")
    usage = {each.unit: each for each in running.stats(target).usage}
    assert usage[pb.VolumeUsage.BYTES].total >= sum(map(len, FILES.values()))
    for each in (target, folder):
        running.unpublish(each)
    assert _nothing_is_left(place)
    assert _served(place) == []


def test_files_stay_open_while_drivers_are_killed(place: Place, real: Callable[[], Driver]) -> None:
    first = real()
    first.publish(place.target("a"), {"dataset": "one", "subpath": "train"})
    with Path(place.target("a"), "1.bin").open("rb") as file:
        assert file.read(3) == b"one"
        first.kill()
        file.seek(0)
        assert file.read() == FILES["train/1.bin"]
        second = real()
        second.publish(place.target("a"), {"dataset": "one", "subpath": "train"})
        wait_for(lambda: "taken over" in place.log.read_text())
        file.seek(0)
        assert file.read() == FILES["train/1.bin"]
    second.unpublish(place.target("a"))
    assert _nothing_is_left(place)


def test_killed_while_a_dataset_is_being_mounted(place: Place, real: Callable[[], Driver]) -> None:
    """The command goes on without its driver. Whichever of the two mounts is used in the end, no other is left."""
    first, target = real(), place.target("a")
    request = pb.NodePublishVolumeRequest(
        volume_id="v", target_path=target, volume_capability=csi.capability(), volume_context={"dataset": "one"}
    )
    call = first.node.NodePublishVolume.future(request)
    wait_for(lambda: list((place.state / "mounts").glob("one@*/*")) != [])
    first.kill()
    call.exception()
    second = real()
    again(lambda: second.publish(target, {"dataset": "one"}))
    assert files_in(target) == FILES
    wait_for(lambda: len(place.mounted()) == 1)
    again(lambda: second.unpublish(target))
    wait_for(lambda: _nothing_is_left(place) and _served(place) == [])


def test_a_volume_outlives_all_processes_of_its_mount(place: Place, real: Callable[[], Driver]) -> None:
    """What the end of a node plugin's container does."""
    first = real()
    target = place.target("a")
    first.publish(target, {"dataset": "one", "subpath": "train"})
    file = Path(place.target("file"))  # as the kubelet binds a volume's `subPath` for a container
    file.touch()
    subprocess.run(["mount", "--bind", f"{target}/1.bin", file], check=True)
    first.kill()
    (mounted,) = _served(place)
    for pid in (mounted["supervisor_pid"], mounted["daemon_pid"]):
        os.kill(pid, signal.SIGKILL)
    second = real()
    wait_for(lambda: "bound again: 2 volumes" in place.log.read_text())
    assert files_in(target).keys() == {"0.bin", "1.bin"}
    assert file.read_bytes() == FILES["train/1.bin"]
    subprocess.run(["umount", file], check=True)
    file.unlink()
    second.unpublish(target)
    assert _nothing_is_left(place)
    assert _served(place) == []


def test_a_mount_without_a_supervisor_gets_one(place: Place, real: Callable[[], Driver]) -> None:
    running = real()
    target = place.target("a")
    running.publish(target, {"dataset": "one"})
    (mounted,) = _served(place)
    os.kill(mounted["supervisor_pid"], signal.SIGKILL)
    wait_for(lambda: _served(place)[0]["supervisor_pid"] not in (None, mounted["supervisor_pid"]))
    assert files_in(target) == FILES
    running.unpublish(target)
    wait_for(lambda: _served(place) == [])


def test_unpublished_while_a_file_is_open(place: Place, real: Callable[[], Driver]) -> None:
    running = real()
    target = place.target("a")
    running.publish(target, {"dataset": "one"})
    with Path(target, "train/1.bin").open("rb") as file:
        running.unpublish(target)
        assert _nothing_is_left(place)
        assert file.read() == FILES["train/1.bin"]
    wait_for(lambda: _served(place) == [])


#: Containers as Kubernetes makes them: processes that end with the first one, and mounts that reach the host
#: (``Bidirectional``), or come from there (``HostToContainer``).
PLUGIN = ("unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child", "--mount-proc")
POD = ("unshare", "--mount", "--propagation", "slave", "sleep", "600")


@contextlib.contextmanager
def containers(place: Place, shoal: DevCluster) -> Iterator[tuple[contextlib.ExitStack, Callable[..., Driver]]]:
    """What starts the plugin in a container of its own, with a run directory and a socket of the names given."""
    subprocess.run(["mount", "--bind", str(place.path), str(place.path)], check=True)
    subprocess.run(["mount", "--make-shared", str(place.path)], check=True)
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", "-R", str(place.path)], check=False)

        def container(run_dir: str, socket: str = "csi.sock") -> Driver:
            environment = {**shoal.environment(), "SHOAL_RUN_DIR": str(place.path / run_dir)}
            return stack.enter_context(driver(place, environment, "--probe-timeout", "5", wrapper=PLUGIN, name=socket))

        yield stack, container


@pytest.mark.parametrize("run_dirs", [("first", "second"), ("run", "run")], ids=["own", "of_the_host"])
def test_containers_of_the_plugin_come_and_go(place: Place, shoal: DevCluster, run_dirs: tuple[str, str]) -> None:
    """A pod that outlives the plugin's container reads on when the next one is there.

    Where supervisors keep their notes may be a folder of the container or of the host.
    """
    target = place.target("a")
    with containers(place, shoal) as (stack, container):
        first = container(run_dirs[0])
        first.publish(target, {"dataset": "one", "subpath": "train"})
        pod = stack.enter_context(subprocess.Popen(POD))
        stack.callback(pod.kill)
        seen = Path(f"/proc/{pod.pid}/root{target}/0.bin")
        wait_for(lambda: Path(f"/proc/{pod.pid}/comm").read_text() == "sleep\n")
        assert seen.read_bytes() == FILES["train/0.bin"]
        first.kill()
        wait_for(lambda: _is_dead(target))
        second = container(run_dirs[1])
        wait_for(lambda: "bound again: 1 volumes" in place.log.read_text())
        assert files_in(target).keys() == {"0.bin", "1.bin"}
        assert seen.read_bytes() == FILES["train/0.bin"]
        second.unpublish(target)
        assert _nothing_is_left(place)
        assert not seen.parent.exists()


def test_a_mount_outlives_the_plugins_container_where_there_is_a_descriptor_store(
    place: Place, shoal: DevCluster
) -> None:
    """A container of its own holds what the other loses: no volume is bound again, and who asks meanwhile waits."""
    target = place.target("a")
    with containers(place, shoal) as (stack, container), ThreadPoolExecutor(1) as pool:
        environment = Driver.environment(place)
        store = subprocess.Popen(
            [sys.executable, "-m", "shoal_csi.fdstore"], env=environment, stderr=subprocess.PIPE, text=True
        )
        stack.enter_context(store)
        stack.callback(store.kill)
        assert store.stderr is not None and "serves at" in store.stderr.readline()
        first = container("run")
        first.publish(target, {"dataset": "one", "subpath": "train"})
        (mount,) = place.mounted()
        with Path(target, "1.bin").open("rb") as file:
            first.kill()
            waiting = pool.submit(os.statvfs, target)
            second = container("run")
            assert waiting.result(60).f_files > 0
            assert file.read() == FILES["train/1.bin"]
        assert place.mounted() == [mount]
        assert "bound again" not in place.log.read_text()
        second.unpublish(target)
        wait_for(lambda: _nothing_is_left(place))


def test_a_newer_container_takes_the_mounts_over_while_the_older_one_lives(place: Place, shoal: DevCluster) -> None:
    """As where a DaemonSet has maxSurge: each has a socket of its own, and only the run directory is both's."""
    target = place.target("a")
    with containers(place, shoal) as (_, container):
        old = container("run", "old.sock")
        old.publish(target, {"dataset": "one", "subpath": "train"})
        (mount,) = place.mounted()
        (record,) = _records(place)
        with Path(target, "1.bin").open("rb") as file:
            new = container("run", "new.sock")
            wait_for(lambda: "is taken over from another container" in place.log.read_text())
            wait_for(lambda: _is_served_elsewhere(place, record))
            old.kill()
            assert os.statvfs(target).f_files > 0
            assert file.read() == FILES["train/1.bin"]
        assert place.mounted() == [mount]
        assert "bound again" not in place.log.read_text()
        new.unpublish(target)
        wait_for(lambda: _nothing_is_left(place))


def _records(place: Place) -> list[Record]:
    paths = (path for path in (place.path / "run").iterdir() if path.is_dir())
    return [record for path in paths if (record := rundir.read(path)) is not None]


def _is_served_elsewhere(place: Place, before: Record) -> bool:
    (record,) = _records(place)
    return record.mount_namespace != before.mount_namespace and record.state == "serving"


def _is_dead(target: str) -> bool:
    try:
        os.statvfs(target)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


# The specification's own suite.


def test_csi_sanity(place: Place, real: Callable[[], Driver]) -> None:
    """All that a read-only driver declares. docs/csi.md names what the suite leaves out, and why."""
    binary = os.environ.get("CSI_SANITY")
    if not binary:
        pytest.skip("CSI_SANITY does not name the csi-sanity binary")
    parameters = place.path / "parameters.yaml"
    parameters.write_text(json.dumps({"dataset": "one", "writers": "read-only"}))
    command = [binary, f"--csi.endpoint={real().socket}", f"--csi.testvolumeparameters={parameters}", "--ginkgo.v"]
    command += [f"--csi.mountdir={place.pods}/sanity", f"--csi.stagingdir={place.path}/staging"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert _nothing_is_left(place)


def _at_once(calls: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result(csi.TIMEOUT_S * 2)
