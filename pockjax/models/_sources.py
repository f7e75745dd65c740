"""From what a user gives as `weights` to a file or folder on this machine."""

import os
from pathlib import Path

from pockjax import hub
from pockjax._extras import require

HUGGING_FACE = "hf://"


def locate(
    weights: str | os.PathLike[str],
    *,
    file: str | None = None,
    progress: hub.Progress | None = None,
) -> Path:
    """Find weights, downloading them if need be.

    Args:
        weights: A file, a folder, a name from `pockjax.hub.sources()`, or
            "hf://organisation/name", where "@revision" and "/file" may follow.
        file: Which file of a folder, source or repository is wanted, unless `weights` says;
            None for the folder itself.
        progress: Called now and then during a download.

    Raises:
        FileNotFoundError: There is no such file or folder.
        HubError: The weights could not be downloaded.
        ValueError: Not a repository's address.
    """
    given = os.fspath(weights)
    if given.startswith(HUGGING_FACE):
        return _hugging_face(given, file)
    if given in hub.sources():
        path = hub.fetch(given, progress=progress)
    else:
        path = Path(given).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"{given!r} is neither a file or folder, nor a source of pockjax.hub (those are: "
                f"{', '.join(sorted(hub.sources()))}), nor an address such as hf://org/name"
            )
    if path.is_dir() and file is not None:
        path = path / file
        if not path.is_file():
            raise FileNotFoundError(f"{given!r} holds no file {file!r}")
    return path


def _hugging_face(address: str, file: str | None) -> Path:
    """Fetch through `huggingface_hub`, which has its own cache, mirrors and access tokens."""
    organisation, _, rest = address.removeprefix(HUGGING_FACE).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    if not organisation or not name:
        raise ValueError(f"{address!r} is not of the form hf://organisation/name[@revision][/file]")
    library = require("huggingface_hub", "hf")
    where = {"repo_id": f"{organisation}/{name}", "revision": revision or None}
    try:
        if inside or file:
            return Path(library.hf_hub_download(filename=inside or file, **where))
        # Weights, settings and vocabularies: not every other format of the same weights.
        kept = ["*.json", "*.safetensors", "*.txt"]
        return Path(library.snapshot_download(allow_patterns=kept, **where))
    except (OSError, ValueError) as error:
        # The library's own errors are of these two kinds.
        raise hub.HubError(f"{address} could not be fetched: {error}") from error
