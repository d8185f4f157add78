"""What is generated and committed is what generating it again gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("proto", ["shoal/wire/shoal.proto", "shoal_csi/csi.proto"])
def test_stubs_are_those_of_the_proto(tmp_path: Path, proto: str) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "client"), *outputs]
    subprocess.run([*command, str(ROOT / "client" / proto)], check=True)
    folder, stem = Path(proto).parent, Path(proto).stem
    made = sorted((tmp_path / folder).iterdir())
    assert [path.name for path in made] == [f"{stem}_pb2.py", f"{stem}_pb2.pyi", f"{stem}_pb2_grpc.py"]
    for path in made:
        assert path.read_text() == (ROOT / "client" / folder / path.name).read_text(), "run `make proto`"


def test_readme_names_what_is_there() -> None:
    """Documents that the README links to, and make targets that it tells people to type."""
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((docs/[^)]+)\)", readme):
        assert (ROOT / link).is_file(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
