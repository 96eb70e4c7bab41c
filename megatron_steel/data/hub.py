"""Two hubs behind one face: what a repository holds, and one of its files, going on where an earlier attempt ended.

Hugging Face: `HF_ENDPOINT`, `HF_TOKEN` and the login that `hf auth login` left are honoured. The library's own
downloads begin a file anew after a kill (each attempt has a file of its own), so its `http_get` writes into ours.
ModelScope: its light client `modelscope-hub`, imported when asked for; `MODELSCOPE_ENDPOINT` is honoured.
Must not know corpora or manifests.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_steel.errors import SteelError


@dataclass(frozen=True)
class Remote:
    """A file of a repository."""

    name: str
    """Its path in the repository."""
    bytes: int
    sha256: str | None
    """None where the hub does not say (small files that are not in its large-file store)."""


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    revision: str
    licence: str
    """As the hub tags it; empty where it does not."""
    gated: bool
    address: str
    """Where a person reads about it and agrees to its terms."""
    files: list[Remote]


class Hub(Protocol):
    """What `data.fetch` needs of a hub."""

    def listing(self, repository: str, revision: str | None) -> Listing:
        """Raises SteelError: unknown, or out of reach."""

    def download(self, repository: str, revision: str, remote: Remote, target: Path) -> None:
        """Write the file, using what an earlier attempt left at `target`.part. Raises SteelError."""


def open_hub(name: str) -> Hub:
    """`huggingface` or `modelscope`. Raises SteelError where the client is not installed."""
    return ModelScope() if name == "modelscope" else HuggingFace()


class HuggingFace:
    """Data sets of the Hugging Face hub, or of a mirror of it."""

    def __init__(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        self._api = HfApi()

    def listing(self, repository: str, revision: str | None) -> Listing:
        try:
            info = self._api.dataset_info(repository, revision=revision, files_metadata=True)
        except Exception as error:
            raise self._failed(repository, error) from None
        files = [
            Remote(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or []
        ]
        licence = info.card_data.get("license") if info.card_data else None
        licence = ", ".join(licence) if isinstance(licence, list) else licence or ""
        return Listing(info.sha or "main", licence, bool(info.gated), self._address(repository), files)

    def download(self, repository: str, revision: str, remote: Remote, target: Path) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        part = Path(f"{target}.part")
        url = hf_hub_url(repository, remote.name, repo_type="dataset", revision=revision)
        try:
            with open(part, "ab") as file:
                if file.tell() > remote.bytes:
                    file.truncate(0)
                have = file.seek(0, 2)
                http_get(url, file, resume_size=have, headers=build_hf_headers(), expected_size=remote.bytes)
        except OSError as error:
            if not type(error).__module__.startswith(("huggingface_hub", "httpx")) and error.errno:
                raise  # the disk's, not the hub's
            raise self._failed(repository, error) from None
        except Exception as error:
            raise self._failed(repository, error) from None
        part.replace(target)

    def _failed(self, repository: str, error: Exception) -> SteelError:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__name__ == "GatedRepoError" or status in (401, 403):
            remedy = f"agree to its terms at {self._address(repository)}, then `hf auth login` or set HF_TOKEN"
        else:
            remedy = "repeat the command: it goes on where it stopped (a mirror: set HF_ENDPOINT)"
        return SteelError(f"the hub did not give it: {first}", self._address(repository), remedy)

    def _address(self, repository: str) -> str:
        return f"{self._api.endpoint}/datasets/{repository}"


class ModelScope:
    """Data sets of ModelScope."""

    def __init__(self) -> None:
        try:
            from modelscope_hub import HubApi
        except ImportError:
            remedy = "pip install modelscope-hub (or megatron-steel[modelscope])"
            raise SteelError("the ModelScope client is not installed", "--hub modelscope", remedy) from None
        self._api: Any = HubApi()

    def listing(self, repository: str, revision: str | None) -> Listing:
        try:
            info = self._api.get_repo(repository, "dataset")
            found = self._api.list_repo_files(repository, "dataset", revision=revision)
        except Exception as error:
            raise self._failed(repository, error) from None
        files = [Remote(file.path, file.size, file.sha256) for file in found if not file.is_dir]
        gated = bool(info.gated or info.login_required)
        return Listing(revision or "master", info.license or "", gated, _modelscope_address(repository), files)

    def download(self, repository: str, revision: str, remote: Remote, target: Path) -> None:
        folder = Path(str(target).removesuffix(remote.name))
        try:
            self._api.download_file(
                repository, "dataset", remote.name, revision=revision, local_dir=folder, file_size=remote.bytes
            )
        except Exception as error:
            raise self._failed(repository, error) from None

    def _failed(self, repository: str, error: Exception) -> SteelError:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = "repeat the command: it goes on where it stopped (MODELSCOPE_API_TOKEN where a login is needed)"
        return SteelError(f"the hub did not give it: {first}", _modelscope_address(repository), remedy)


def _modelscope_address(repository: str) -> str:
    return f"https://modelscope.cn/datasets/{repository}"
