"""`prepare SOURCE --fetch DIR`: a corpus from its hub, whole or a sample, each file hashed into `DIR/fetch.json`.

1. The hub says what there is: size, licence and gate are printed before anything is downloaded.
2. Files come in the order of their names, a few at once; one that an earlier attempt began goes on where it ended.
3. A file that has arrived is compared with the hub's size and hash and entered into the manifest, which also holds the
   revision: the same command again keeps what is whole, and never mixes two revisions.

Must not know how a hub works (`data.hub`) or what a row looks like.
"""

import fnmatch
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data import hub
from megatron_steel.data.reserve import sha256
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
_AT_ONCE = 4


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is. Licence and gate are the hub's to say; `terms` is what its tag leaves out."""

    huggingface: str = ""
    modelscope: str = ""
    patterns: tuple[str, ...] = ("*.jsonl", "*.json", "*.parquet", "*.jsonl.gz", "*.json.gz", "*.jsonl.zst")
    terms: str = ""
    by_hand: str = ""
    """Where to get it when no hub has it."""


_OWN = "these are files of your own: name them as INPUT"
CORPORA = {
    "skypile": Corpus("Skywork/SkyPile-150B", "modelscope/SkyPile-150B", terms="Skywork Community License"),
    "wanjuan": Corpus(by_hand="https://opendatalab.com/OpenDataLab/WanJuan1_dot_0 (its own client; raw/nlp)"),
    "wiki-cn": Corpus("pleisto/wikipedia-cn-20230720-filtered"),
    "baidu-baike": Corpus("xuqinyang/BaiduBaike-5.63M", "fq980207/563w_baidubaike"),
    "baidu-qa": Corpus(by_hand="https://aistudio.baidu.com/datasetdetail/107726 (a login, by hand)"),
    "zhihu-kol": Corpus("wangrui6/Zhihu-KOL"),
    "belle-2m": Corpus("BelleGroup/train_2M_CN", terms="research only, says its card"),
    "belle-3.5m": Corpus("BelleGroup/train_3.5M_CN", terms="research only, says its card"),
    "moss": Corpus("YeungNLP/moss-003-sft-data"),
    "firefly": Corpus("YeungNLP/firefly-train-1.1M"),
    "starcoder": Corpus(
        "bigcode/starcoderdata", "swift/starcoderdata", ("cpp/*.parquet", "java/*.parquet", "python/*.parquet"),
        terms="each file keeps its own licence",
    ),
    "mnbvc": Corpus("liwu/MNBVC"),
    "redpajama": Corpus(
        "togethercomputer/RedPajama-Data-1T-Sample",
        terms="a sample of 1B tokens; the whole: wget -i https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt",
    ),
    "slimpajama": Corpus("cerebras/SlimPajama-627B", patterns=("train/*.jsonl.zst",)),
    "pile": Corpus("monology/pile-uncopyrighted", patterns=("train/*.jsonl.zst",), terms="without the copyrighted parts"),
    "dolma": Corpus(by_hand="the addresses listed in https://huggingface.co/datasets/allenai/dolma/tree/main/urls (wget -i)"),
    "text": Corpus(by_hand=_OWN), "messages": Corpus(by_hand=_OWN),
    "alpaca": Corpus(by_hand=_OWN), "sharegpt": Corpus(by_hand=_OWN),
}  # fmt: skip


def fetch(
    source: str, folder: str | os.PathLike[str], hub_name: str = "huggingface", sample: str | None = None
) -> None:
    """Download a corpus into `folder`; the same command again goes on.

    Args:
        source: a name of `CORPORA`.
        hub_name: huggingface or modelscope.
        sample: as in "1GB": whole files in order, until their sum reaches it.

    Raises:
        SteelError: no such corpus, or not on that hub; terms to agree to; out of reach; no room; a file that does not
            match its hash; `folder` holds another corpus.
    """
    folder = Path(folder)
    limit = _bytes(sample) if sample is not None else None
    repository, corpus = _repository(source, hub_name)
    client = hub.open_hub(hub_name)
    old = _Manifest.read(folder, {"source": source, "hub": hub_name, "repository": repository})
    listing = client.listing(repository, old.tree.get("revision"))
    wanted = sorted((f for f in listing.files if _matches(f.name, corpus.patterns)), key=lambda file: file.name)
    if not wanted:
        raise SteelError("the repository holds no file of this corpus", listing.address, "has it moved? look there")
    chosen = _sample(wanted, limit)
    print(_summary(source, listing, corpus, wanted, chosen), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    old.tree |= {"revision": listing.revision, "licence": listing.licence, "gated": listing.gated}
    left = [file for file in chosen if not old.holds(file)]
    _check_room(folder, left)
    log.info("%d of %d files are here already", len(chosen) - len(left), len(chosen))
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        tasks = [pool.submit(_one, client, repository, listing.revision, file, folder) for file in left]
        for task, file in zip(tasks, left, strict=True):
            old.enter(file, task.result())
            log.info("%s: %s", file.name, _size(file.bytes))
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", folder, "mend it and repeat") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    print(f"{folder}: {len(chosen)} files, {_size(sum(file.bytes for file in chosen))}, whole")


class _Manifest:
    """`fetch.json`: what lies in the folder, written anew after every file."""

    def __init__(self, folder: Path, tree: dict[str, Any]):
        self._folder, self.tree = folder, tree
        self._files = {entry["name"]: entry for entry in tree.setdefault("files", [])}

    @classmethod
    def read(cls, folder: Path, identity: dict[str, str]) -> "_Manifest":
        path = folder / "fetch.json"
        if not path.exists():
            return cls(folder, dict(identity))
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            found = {key: tree[key] for key in identity}
            made = cls(folder, tree)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SteelError(f"this manifest cannot be read: {error}", path, "delete it, and repeat") from None
        if found != identity:
            raise SteelError(f"the folder holds {found['source']} of {found['repository']}", folder, "give another one")
        return made

    def holds(self, file: hub.Remote) -> bool:
        """Does the file lie here, with the size and hash of the manifest and of the hub?"""
        entry, path = self._files.get(file.name), self._folder / file.name
        if entry is None or entry["bytes"] != file.bytes or not path.is_file():
            return False
        return path.stat().st_size == file.bytes and sha256(path) == entry["sha256"] == (file.sha256 or entry["sha256"])

    def enter(self, file: hub.Remote, sha256: str) -> None:
        self._files[file.name] = asdict(file) | {"sha256": sha256}
        self.tree["files"] = [self._files[name] for name in sorted(self._files)]
        aside = self._folder / "fetch.json.partial"
        aside.write_text(json.dumps(self.tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self._folder / "fetch.json")


def _one(client: hub.Hub, repository: str, revision: str, file: hub.Remote, folder: Path) -> str:
    """Download one file; returns its hash. A file that is not what the hub lists goes, so that a repeat gets it anew."""
    target = folder / file.name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise SteelError(f"the hub names a file outside of the folder: {file.name}", folder, "do not trust that hub")
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.is_file() and target.stat().st_size == file.bytes  # whole, and killed before it was entered
    if not (whole and file.sha256 and sha256(target) == file.sha256):
        target.unlink(missing_ok=True)
        client.download(repository, revision, file, target)
    found, size = sha256(target), target.stat().st_size
    if size != file.bytes or found != (file.sha256 or found):
        target.unlink()
        what = f"{file.name} has {size} bytes and hash {found[:12]}, the hub says {file.bytes} and {file.sha256 or '?'}"
        raise SteelError(what, target, "repeat the command: the file was deleted and comes anew")
    return found


def _repository(source: str, hub_name: str) -> tuple[str, Corpus]:
    corpus = CORPORA.get(source)
    if corpus is None:
        raise SteelError(f"there is no source {source!r}", "prepare SOURCE", f"known are {', '.join(CORPORA)}")
    if found := getattr(corpus, hub_name):
        return found, corpus
    other = "huggingface" if hub_name == "modelscope" else "modelscope"
    remedy = corpus.by_hand if not getattr(corpus, other) else f"--hub {other} has it"
    raise SteelError(f"no address of {source} on {hub_name} is known", f"prepare {source} --fetch", remedy)


def _summary(
    source: str, listing: hub.Listing, corpus: Corpus, wanted: list[hub.Remote], chosen: list[hub.Remote]
) -> str:
    size, part = sum(file.bytes for file in wanted), sum(file.bytes for file in chosen)
    licence = "; ".join(filter(None, [listing.licence or "not stated", corpus.terms]))
    lines = [
        f"{source}: {listing.address} at {listing.revision[:12]}",
        f"size:    {_size(size)} in {len(wanted)} files"
        + (f"; now {_size(part)} in {len(chosen)} files" if part < size else ""),
        f"licence: {licence}",
        f"gate:    {'its terms must be agreed to there first' if listing.gated else 'none'}",
    ]
    return "\n".join(lines)


def _sample(files: list[hub.Remote], limit: int | None) -> list[hub.Remote]:
    chosen, total = [], 0
    for file in files:
        if limit is not None and total >= limit:
            break
        chosen.append(file)
        total += file.bytes
    return chosen


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    about = name.rpartition("/")[2].startswith("dataset_info")  # what `datasets` knows of the corpus
    return not about and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_room(folder: Path, left: list[hub.Remote]) -> None:
    begun = (Path(f"{folder / file.name}.part") for file in left)
    need = sum(file.bytes for file in left) - sum(path.stat().st_size for path in begun if path.is_file())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SteelError(
            f"{_size(need)} are to come, and {_size(free)} are free", folder, "free some, or --sample SIZE"
        )


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", size.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise SteelError(f"{size!r} is no size", "--sample", "as in 500MB or 1GB")
    return round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _size(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1000:.1f} kB"
