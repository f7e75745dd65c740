"""What is installed is what is needed, and the pins are only pins."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


def test_wheel_holds_code_and_schemes(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"pockjax/__init__.py", "pockjax/configs/schemes/minilm.yaml"} <= names
    assert {name.split("/")[0] for name in names} == {"pockjax", wheel.name[:13] + ".dist-info"}


@pytest.mark.parametrize("name", ["dev", "demo", "oldest"])
def test_requirements_are_pins_with_hashes_alone(name):
    lines = (_ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pin = re.compile(r"[a-z0-9.-]+==[^ ]+( ; [^/\\]+)? \\")
    hashed = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert lines
    for line in lines:
        assert pin.fullmatch(line) or hashed.fullmatch(line), line


def test_demo_pins_are_among_the_dev_pins():
    dev, demo = (
        set(re.findall(r"^\S+==\S+", (_ROOT / "requirements" / f"{name}.txt").read_text(), re.M))
        for name in ("dev", "demo")
    )
    assert demo <= dev
