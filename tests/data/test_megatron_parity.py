"""Against the real megatron-core: the same bytes from the same lists and from the same texts; each reads the other's files.

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
from megatron_steel.data.tokenize import tokenize

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


# Megatron-core's own tokenizer class and builder on the lines of rows.jsonl, joined as `preprocess_data.py --append-eod`
# does; the tool itself is not in the package and is run by tools/benchmarks/data/tokenize_vs_megatron.py.
THEIR_TOKENIZER = """
import json, sys
sys.path.append(sys.argv[1])
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
tokenizer = MegatronTokenizer.from_pretrained(sys.argv[2], metadata_path={"library": "huggingface"})
builder = IndexedDatasetBuilder("theirs.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
for line in open("rows.jsonl", encoding="utf-8"):
    ids = tokenizer.tokenize(json.loads(line)["text"])
    ids += [tokenizer.eod] if ids else []
    builder.add_document(ids, [len(ids)] if ids else [])
builder.finalize("theirs.idx")
"""


@pytest.mark.shared
@pytest.mark.parametrize("empty", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_bytes_are_theirs_on_real_texts(tmp_path, shared_data, empty):
    """Special strings in some texts; where texts are empty, `.bin` alone is equal, and `.idx` but for their boundaries."""
    (source,) = (shared_data / "steel_samples" / "sky").iterdir()
    texts = [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines()[:60]]
    texts[3] = f"<|im_start|>user\n{texts[3]}<|im_end|>\n<|endoftext|>e\u0301 \r\n\0 <|im_end"
    texts[5:6] = ["", texts[5], ""] if empty else ["<|im_end|>"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = tokenize([tmp_path / "rows.jsonl"], shared_data / "qwen_tokenizer", tmp_path / "ours", workers=1)
    command = [sys.executable, "-c", THEIR_TOKENIZER, str(PACKAGE), str(shared_data / "qwen_tokenizer")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert made.provenance[0]["special"] == (1 if empty else 2)
    if not empty:
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
        return
    ours, theirs = IndexedDataset(tmp_path / "ours"), IndexedDataset(tmp_path / "theirs")
    assert theirs.documents == ours.documents + 2 == len(texts)
    assert np.array_equal(ours.offsets(0, ours.sequences), theirs.offsets(0, theirs.sequences))
    assert np.array_equal(ours.lengths(0, ours.sequences), theirs.lengths(0, theirs.sequences))
