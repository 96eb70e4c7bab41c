"""Write the quickstart's corpus: the shipped bilingual samples, and this interpreter's own library and documentation.

python tools/quickstart_corpus.py DIR      makes DIR/samples.jsonl and DIR/python.jsonl
"""

import json
import os
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import megatron_steel

LIBRARY_BYTES = 4_000_000


def library_texts():
    """Documentation topics (English), then source files in a fixed order, about LIBRARY_BYTES in all."""
    yield from pydoc_data.topics.topics.values()
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text.encode())
        if total > LIBRARY_BYTES:
            return
        yield text


def write(path, texts):
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text.strip())
    os.replace(aside, path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    shipped = sorted((Path(megatron_steel.__file__).parent / "samples").glob("*.jsonl"))
    rows = [json.loads(line) for path in shipped for line in path.read_text(encoding="utf-8").splitlines()]
    write(folder / "samples.jsonl", [row["text"] for row in rows])
    write(folder / "python.jsonl", library_texts())
