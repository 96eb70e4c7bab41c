"""Small inputs and what became of them, for the tests of tokenizing."""

import json
from pathlib import Path

from megatron_steel.data.indexed import IndexedDataset


def lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)).encode()


def documents(prefix):
    data = IndexedDataset(prefix)
    assert data.documents == data.sequences
    return [data.document(i).tolist() for i in range(data.documents)]


def content(prefix):
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


def many(path, count=3000):
    """A jsonl file of several units; the i-th document is easy to know again."""
    path.write_bytes(lines([f"w{3 + i % 120} " * (1 + i % 7) for i in range(count)]))
    return path


def numbered(path, count=3000):
    """A jsonl file whose document i is known by its two words."""
    path.write_bytes(lines([f"w{3 + i % 100} w{3 + i // 100} " + "w4 " * (i % 9) for i in range(count)]))
    return path
