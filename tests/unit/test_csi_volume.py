"""What a CSI volume's attributes mean, and what is refused."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal_csi import capability, volume
from shoal_csi import csi_pb2 as pb
from shoal_csi.mount_table import MountTable
from shoal_csi.volume import Volume

DIGEST = "0123456789abcdef" * 2
Mode = pb.VolumeCapability.AccessMode.Mode
READERS = (Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY)
WRITERS = tuple(mode for mode in Mode.values() if mode not in (*READERS, Mode.UNKNOWN))

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True)
parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda part: part not in (".", "..")
)
volumes = st.builds(
    Volume,
    names,
    st.one_of(st.just(""), st.just(volume.NEWEST), st.text("0123456789abcdef", min_size=4, max_size=32)),
    st.lists(parts).map("/".join),
    st.booleans(),
)


def can(mode: int, *flags: str) -> pb.VolumeCapability:
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags),
        access_mode=pb.VolumeCapability.AccessMode(mode=Mode.Name(mode)),
    )


@given(volumes)
def test_attributes_describe_a_volume_and_back(each: Volume) -> None:
    assert volume.parse(each.context()) == each


@given(volumes, st.text(max_size=128))
def test_id_fits_and_says_the_dataset(each: Volume, name: str) -> None:
    made = volume.volume_id(name, each)
    assert len(made.encode()) <= volume.MAX_STRING_BYTES
    assert volume.dataset_of(made) == each.dataset


@given(st.lists(st.tuples(st.text(max_size=20), volumes), unique=True, max_size=20))
def test_ids_differ_where_name_or_parameters_do(asked: list[tuple[str, Volume]]) -> None:
    assert len({volume.volume_id(name, each) for name, each in asked}) == len(asked)


def test_id_is_the_same_for_ever() -> None:
    """A claim that was made by another version is still that claim."""
    each = volume.parse({"dataset": "imagenet", "subpath": "train"})
    assert volume.volume_id("pvc-1", each) == "shoal-v1.imagenet.7abc27be7f2aeaab10327ecf823b8c5c"


@given(st.text())
def test_foreign_ids_are_of_no_dataset(text: str) -> None:
    assert volume.dataset_of(text) is None


def test_what_kubernetes_adds_is_no_attribute() -> None:
    added = {
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.name": "trainer-0",
        "storage.kubernetes.io/csiProvisionerIdentity": "1700000000-1-csi.shoal.io",
    }
    assert volume.parse({"dataset": "d", **added}) == Volume("d")


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({}, "add the attribute 'dataset'"),
        ({"dataset": ""}, "add the attribute 'dataset'"),
        ({"dataset": "Upper"}, "'Upper' is no dataset name"),
        ({"dataset": "d", "subPath": "x"}, "'subPath' is no attribute of a Shoal volume: dataset, snapshot, subpath"),
        ({"dataset": "d", "snapshot": "latest"}, "'latest' is no snapshot: write 'newest' or"),
        ({"dataset": "d", "snapshot": "abc"}, "'abc' is no snapshot"),
        ({"dataset": "d", "snapshot": DIGEST + "0"}, "is no snapshot"),
        ({"dataset": "d", "subpath": "a/../b"}, "'a/../b' is no folder of a dataset"),
        ({"dataset": "d", "subpath": "a//b"}, "'a//b' is no folder of a dataset"),
        ({"dataset": "d", "subpath": "."}, "'.' is no folder of a dataset"),
        ({"dataset": "d", "subpath": "a\0b"}, "is no folder of a dataset"),
        ({"dataset": "d", "writers": "true"}, "'true': write one of refuse, read-only"),
    ],
)
def test_what_cannot_be_is_refused_by_name(attributes: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence.replace("(", r"\(")):
        volume.parse(attributes)


def test_slashes_around_a_subpath_say_nothing() -> None:
    assert volume.parse({"dataset": "d", "subpath": "/a/b/"}).subpath == "a/b"
    assert volume.parse({"dataset": "d", "subpath": "/"}).subpath == ""


@pytest.mark.parametrize("mode", READERS)
def test_readers_are_served(mode: int) -> None:
    assert capability.first_refusal([can(mode)], Volume("d")) == ""


@pytest.mark.parametrize("mode", WRITERS)
def test_writers_are_told_what_to_write_instead(mode: int) -> None:
    refusal = capability.refusal(can(mode), Volume("d"))
    assert Mode.Name(mode) in refusal
    for remedy in ("ReadOnlyMany", "readOnly: true", "writers: read-only"):
        assert remedy in refusal
    assert capability.refusal(can(mode), None) == refusal
    assert capability.refusal(can(mode), Volume("d"), is_readonly=True) == ""
    assert capability.refusal(can(mode), Volume("d", admits_writers=True)) == ""


def test_one_refusal_of_several_is_enough() -> None:
    asked = [can(Mode.MULTI_NODE_READER_ONLY), can(Mode.MULTI_NODE_MULTI_WRITER)]
    assert "MULTI_NODE_MULTI_WRITER" in capability.first_refusal(asked, Volume("d"))


def test_block_devices_and_groups_are_refused() -> None:
    mode = can(Mode.MULTI_NODE_READER_ONLY).access_mode
    block = pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=mode)
    assert "no block device" in capability.refusal(block, Volume("d"), is_readonly=True)
    grouped = pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(volume_mount_group="5"), access_mode=mode)
    assert "mount group" in capability.refusal(grouped, Volume("d"))


def test_half_a_capability_is_malformed() -> None:
    with pytest.raises(InvalidRequest, match="no access type"):
        capability.check(pb.VolumeCapability(access_mode=can(Mode.MULTI_NODE_READER_ONLY).access_mode))
    with pytest.raises(InvalidRequest, match="no access mode"):
        capability.check(pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume()))
    with pytest.raises(InvalidRequest, match="no access mode"):
        capability.check(can(Mode.UNKNOWN))


def test_mount_options_that_are_known_become_flags() -> None:
    plain = capability.mount_flags(can(Mode.MULTI_NODE_READER_ONLY))
    asked = can(Mode.MULTI_NODE_READER_ONLY, "noexec", "ro", "noatime")
    assert capability.refusal(asked, Volume("d")) == ""
    assert capability.mount_flags(asked) & plain == plain == capability.flags_of(["ro", "nosuid", "nodev", "relatime"])
    assert capability.mount_flags(asked) == capability.flags_of(["ro", "nosuid", "nodev", "noexec", "noatime"]) != plain
    assert capability.is_as_wanted(["ro", "nosuid", "nodev", "noatime"], plain)
    assert not capability.is_as_wanted(["ro", "nosuid", "nodev", "noexec"], plain)
    assert not capability.is_as_wanted(["ro", "nosuid", "nodev", "noexec"], capability.mount_flags(asked))
    assert "'rw'" in capability.refusal(can(Mode.MULTI_NODE_READER_ONLY, "rw"), Volume("d"))


@given(st.text(string.printable.replace("/", "") + "\\äÄ\u2028", min_size=1))
def test_paths_of_the_mount_table_are_unescaped(name: str) -> None:
    escaped = "".join(f"\\{ord(each):03o}" if each in " \t\n\\" else each for each in name)
    table = MountTable.parse(f"36 35 0:52 /{escaped} /mnt/{escaped} ro,nosuid shared:1 - fuse.shoal {escaped} rw\n")
    mount = table.at(f"/mnt/{name}")
    assert mount is not None
    assert (mount.device, mount.root, mount.source, mount.kind) == ("0:52", f"/{name}", name, "fuse.shoal")
    assert mount.options == {"ro", "nosuid"}
    assert table.under("/mnt") == table.of_device("0:52") == [mount]
    assert table.under(f"/mnt/{name}") == []


def test_the_last_of_stacked_mounts_is_seen() -> None:
    line = "36 35 0:{} / /mnt/x ro - fuse s rw"
    table = MountTable.parse("\n".join([line.format(1), line.format(2)]))
    mount = table.at("/mnt/x")
    assert mount is not None and mount.device == "0:2"


def test_mounts_are_read_from_mountinfo() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt/with\\040space rw,noatime master:1 - ext3 /dev/root rw\n"
        "37 36 0:50 / /m ro,nosuid - fuse.shoal shoal:set@ab ro,user_id=0\n"
    )
    table = MountTable.parse(text)
    first, second = table.at("/mnt/with space"), table.at("/m")
    assert first is not None and second is not None
    assert table.of_kind("fuse.shoal") == [second]
    assert (first.root, first.kind, first.options) == ("/mnt1", "ext3", {"rw", "noatime"})
    assert (second.device, second.kind, second.source) == ("0:50", "fuse.shoal", "shoal:set@ab")
