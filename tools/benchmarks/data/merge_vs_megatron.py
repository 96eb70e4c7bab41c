"""Merging data sets and writing an index beside Megatron-LM: `merge_datasets.py` and `_IndexWriter`, the same bytes.

    python tools/benchmarks/data/merge_vs_megatron.py --megatron CHECKOUT --megatron-python PYTHON
        [--documents 5000000] [--tokens 16] [--parts 4] [--pairs 5] [--json FILE]

CHECKOUT is Megatron-LM's repository; PYTHON an interpreter that can import it. Documents are short (--tokens is the
mean), so that the index and not the disk is measured. Rows:

- merging: the commands `merge` and `tools/merge_datasets.py`, start-up included; and the two calls alone, in
  processes that have imported what they need;
- writing the index of all documents from an array of lengths, in such processes. Theirs gets it as the list that its
  builder keeps; ours also syncs and hashes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers

OURS = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.merge import merge
folder = Path(sys.argv[1])
lengths = np.load(folder / "lengths.npy")
boundaries = np.arange(1, len(lengths) + 1)
parts = sorted(str(path)[:-4] for path in (folder / "parts").glob("*.idx"))
def index():
    with IndexedWriter(folder / "ours-index", np.uint16) as writer:
        writer.add_sequences(lengths)
        writer.add_boundaries(boundaries)
        writer.add_tokens(bytes(2))  # a data set without a token is none
def merging():
    merge(parts, folder / "ours")
jobs = {"index": index, "merge": merging}
"""

THEIRS = """
import json, os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, _IndexWriter
folder = Path(sys.argv[1])
lengths = numpy.load(folder / "lengths.npy").tolist()
documents = list(range(len(lengths) + 1))
parts = sorted(str(path)[:-4] for path in (folder / "parts").glob("*.idx"))
def index():
    with _IndexWriter(str(folder / "theirs-index.idx"), numpy.uint16) as writer:
        writer.write(lengths, None, documents)
def merging():
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=IndexedDataset(parts[0]).index.dtype)
    for part in parts:
        builder.add_index(part)
    builder.finalize(str(folder / "theirs.idx"))
jobs = {"index": index, "merge": merging}
"""

SERVE = """
for line in sys.stdin:
    os.sync()
    began = time.perf_counter()
    jobs[line.strip()]()
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--megatron-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--tokens", type=int, default=16, help="of a document, on average")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    facts = {**peers.machine(), **{key: getattr(asked, key) for key in ("documents", "tokens", "parts")}}
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="merge-") as folder:
        make_parts(asked, Path(folder))
        results = measure(asked, Path(folder))
    peers.publish(results, facts, asked.json)


def make_parts(asked: argparse.Namespace, folder: Path) -> None:
    """Data sets as `tokenize` leaves them, but for the manifest: Megatron's merge takes a folder of pairs alone."""
    import numpy as np

    sys.path.insert(0, str(peers.ROOT))
    from megatron_steel.data.indexed import IndexedWriter
    from megatron_steel.data.manifest import trust

    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 2 * asked.tokens, asked.documents).astype(np.int32)
    np.save(folder / "lengths.npy", lengths)
    (folder / "parts").mkdir()
    (folder / "manifests").mkdir()
    for number, part in enumerate(np.array_split(lengths, asked.parts)):
        with IndexedWriter(folder / "parts" / f"{number:03d}", np.uint16) as writer:
            writer.add_documents(draw.integers(0, 65_000, int(part.sum())).astype(np.uint16), part)
        trust(folder / "parts" / f"{number:03d}")
        for path in (folder / "parts").glob("*.json"):
            path.rename(folder / "manifests" / path.name)


def measure(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    parts = sorted(str(path)[:-4] for path in (folder / "parts").glob("*.idx"))

    def ours() -> dict[str, float]:
        return peers.timed([sys.executable, "-m", "megatron_steel.cli", "merge", *parts, "--output", folder / "ours"])

    def theirs() -> dict[str, float]:
        tool = [asked.megatron_python.absolute(), "tools/merge_datasets.py", "--input", folder / "theirs-parts"]
        return peers.timed([*tool, "--output-prefix", folder / "theirs"], asked.megatron.resolve())

    # Ours reads manifests beside the pairs; theirs stops at a file that is no pair. Hard links give each its folder.
    (folder / "theirs-parts").mkdir()
    for path in (folder / "parts").iterdir():
        (folder / "theirs-parts" / path.name).hardlink_to(path)
    for path in (folder / "manifests").iterdir():
        path.rename(folder / "parts" / path.name)
    print("comparing the bytes", flush=True)
    ours()
    theirs()
    peers.same_bytes(folder / "ours", folder / "theirs")
    print("commands", flush=True)
    million = f"{asked.documents / 1e6:g} million documents"
    results = [peers.compared(f"`merge_datasets.py`, {million}", peers.alternating(asked.pairs, ours, theirs), ">= 10")]
    with (
        Server(asked.megatron_python.absolute(), THEIRS, folder, asked.megatron.resolve()) as their_calls,
        Server(sys.executable, OURS, folder, peers.ROOT) as our_calls,
    ):
        for name, what in (("merge", "the same without start-up"), ("index", f"`_IndexWriter`, {million}")):
            print(what, flush=True)
            our_calls.ask(name)
            their_calls.ask(name)
            rows = peers.alternating(asked.pairs, lambda n=name: our_calls.ask(n), lambda n=name: their_calls.ask(n))
            results.append(peers.compared(what, rows, ">= 10"))
    check_index(folder)
    return results


def check_index(folder: Path) -> None:
    ours, theirs = ((folder / f"{side}-index.idx").read_bytes() for side in ("ours", "theirs"))
    if ours != theirs:
        raise SystemExit("the two indexes differ: the last row means nothing")


class Server:
    """A process that has imported one side and runs its jobs by name."""

    def __init__(self, python: Any, code: str, folder: Path, cwd: Path):
        command = [str(python), "-W", "ignore", "-c", code + SERVE, str(folder), str(cwd)]
        self._process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, text=True)  # fmt: skip

    def ask(self, name: str) -> dict[str, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit(f"the process for {name!r} ended")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


if __name__ == "__main__":
    main()
