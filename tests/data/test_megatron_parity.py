"""Against the real megatron-core: the same bytes from the same lists, and each reads the other's files.

`launch/test.sh` puts the package into <environment>/megatron-core; here it runs in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.merge import concatenate

PACKAGE = Path(sys.prefix) / "megatron-core"
pytestmark = pytest.mark.skipif(
    not (PACKAGE / "megatron" / "core").is_dir(),
    reason=f"megatron-core is not in {PACKAGE} (launch/test.sh installs it where it has a wheel)",
)

# Writes `theirs-u2`, `theirs-i4` and `theirs-merged` from documents.json; reads `ours-u2`, `ours-i4` back.
THEIRS = """
import json, sys
sys.path.append(sys.argv[1])
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
documents = json.load(open("documents.json"))
for name, dtype in (("u2", numpy.uint16), ("i4", numpy.int32)):
    builder = IndexedDatasetBuilder(f"theirs-{name}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"theirs-{name}.idx")
builder = IndexedDatasetBuilder("theirs-merged.bin", dtype=numpy.int32)
for _ in range(2):
    builder.add_index("theirs-i4")
builder.finalize("theirs-merged.idx")
read = {}
for name in ("u2", "i4"):
    data = IndexedDataset(f"ours-{name}")
    read[name] = [[int(i) for i in data[s]] for s in range(len(data))], [int(i) for i in data.document_indices]
json.dump(read, open("read.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 65500, n).tolist() for n in generator.integers(0, 400, 200)]
    documents[5] = documents[-1] = []
    (folder / "documents.json").write_text(json.dumps(documents))
    for name, dtype in (("u2", np.uint16), ("i4", np.int32)):
        with IndexedWriter(folder / f"ours-{name}", dtype) as writer:
            for ids in documents:
                writer.add_document(ids)
    concatenate([folder / "ours-i4"] * 2, folder / "ours-merged")
    command = [sys.executable, "-c", THEIRS, str(PACKAGE)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["u2", "i4", "merged"])
def test_the_bytes_are_theirs(folder, name):
    for kind in ("bin", "idx"):
        assert (folder / f"ours-{name}.{kind}").read_bytes() == (folder / f"theirs-{name}.{kind}").read_bytes()


@pytest.mark.parametrize("name", ["u2", "i4"])
def test_each_reads_the_others(folder, name):
    documents = json.loads((folder / "documents.json").read_text())
    theirs = IndexedDataset(folder / f"theirs-{name}")
    assert [theirs.document(i).tolist() for i in range(theirs.documents)] == documents
    sequences, boundaries = json.loads((folder / "read.json").read_text())[name]
    assert sequences == [ids for ids in documents if ids]
    assert boundaries == np.cumsum([0] + [bool(ids) for ids in documents]).tolist()
