"""JSON arrays: all of the file or an error that names the line, wherever the buffer ends."""

import io
import json

import pytest

from megatron_steel.data import readers
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError

BAD_ARRAYS = {
    "two arrays": ("a.json", b'[{"text": "w3"}]\n[{"text": "w4"}]\n', 1, "text behind its 1 elements"),
    "lines of arrays": ("a.jsonl", b'["w3"]\n["w4"]\n', 1, "text behind its 1 elements"),
    "far behind": ("a.json", b'[\n{"text": "w3"}\n]' + b"\n" * (3 << 20) + b"x", 3, "text behind its 1 elements"),
    "too deep": ("a.json", b'[{"text": "w3"},\n' + b"[" * 200_000 + b"]" * 200_000 + b"]", 2, "element 2 .*recursion"),
    "no comma": ("a.json", b'[{"text": "w3"}\n{"text": "w4"}{"text": "w5"}]', 2, "element 2 .*no comma"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_array_that_is_not_all_of_the_file_is_named(tmp_path, tiny_tokenizer, name):
    file, raw, line, message = BAD_ARRAYS[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(SteelError, match=message) as caught:
        tokenize([tmp_path / file], tiny_tokenizer, tmp_path / "out", workers=1)
    assert caught.value.where == f"{tmp_path}/{file}:{line}"
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_an_array_is_read_alike_wherever_the_buffer_ends(tmp_path, monkeypatch):
    texts = ["a", "\u94a2\U0001f642", '"\\', "]},{[", "x" * 70]
    values = [*({"n": [1.5e300, -0.25, True, None], "text": text} for text in texts), -1.5e300, True, "s", [[]], 12]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1) + " \n")  # ASCII: escapes, pairs of them
    (unit,) = readers.units(tmp_path / "a.json", 1 << 20)
    for size in (*range(1, 90), 1 << 20):
        monkeypatch.setattr(readers, "_READ", size)
        rows = list(readers.rows(unit, "text"))
        assert [row.text for row in rows] == texts + [None] * 5
        kinds = [row.problem for row in rows[5:]]
        assert kinds == [f"a JSON {kind}, not an object" for kind in ("float", "bool", "str", "list", "int")]


@pytest.mark.parametrize(("element", "limit"), [(b'{"text": oops}', 64 << 20), (b'{"text": "never closed', 1 << 14)])
def test_a_malformed_element_does_not_draw_the_file_into_memory(monkeypatch, element, limit):
    class Watched(io.BytesIO):
        def close(self):
            if not self.closed:
                seen.append(self.tell())
            super().close()

    seen = []
    filler = b", 12345" * 200_000
    monkeypatch.setattr(readers, "_READ", 1 << 12)
    monkeypatch.setattr(readers, "_MAX_ELEMENT", limit)
    monkeypatch.setattr(readers, "_open", lambda path: Watched(b"[" + element + filler + b"]"))
    with pytest.raises(SteelError, match="element 1 of its JSON array"):
        list(readers.rows(readers.Unit("a.json", "array", 0, 1, 1), "text"))
    assert max(seen) < 1 << 17 < len(filler)
