"""The reader against plain lists, every broken file against its message, and merge against one writer."""

import dataclasses
import fcntl
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data import manifest
from megatron_steel.data.indexed import Facts, IndexedDataset, IndexedWriter, best_dtype
from megatron_steel.data.manifest import load, trust, verify
from megatron_steel.data.merge import concatenate, merge
from megatron_steel.data.reserve import Busy, reserved
from megatron_steel.errors import SteelError

LENGTHS_AT = 34
CORPUS = [[1, 2, 3], [4], [], [5, 6], [], [7]]


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
    return prefix


def content(prefix):
    return [open(f"{prefix}.{kind}", "rb").read() for kind in ("bin", "idx")]


def patch(path, at, raw):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_documents_come_back(tmp_path, dtype):
    data = IndexedDataset(write(tmp_path / "d", CORPUS, dtype))
    assert (data.tokens, data.sequences, data.documents, data.dtype) == (7, 4, 6, np.dtype(dtype))
    assert [data.document(i).tolist() for i in range(6)] == CORPUS
    assert data.read(2, 5).tolist() == [3, 4, 5]
    assert data.read(2, 5).flags.writeable
    assert data.read(7, 7).tolist() == []


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200).filter(any), st.data())
def test_cuts_equal_a_walk_over_the_lengths(tmp_path_factory, lengths, pick):
    prefix = write(tmp_path_factory.mktemp("d") / "d", [list(range(n)) for n in lengths])
    data = IndexedDataset(prefix)
    begins, owner = [], []
    for number, length in enumerate(lengths):
        begins.append(len(owner))
        owner += [number] * length
    start = pick.draw(st.integers(0, len(owner) - 1))
    stop = pick.draw(st.integers(start, len(owner)))
    assert data.document_cuts(start, stop).tolist() == sorted({p for p in begins if start < p < stop})
    assert data.document_of(start) == owner[start]
    assert data.document_cuts(start, stop).dtype == np.int64


def test_several_sequences_a_document(tmp_path):
    """Megatron's sentence-split data: a document of two sequences is one document."""
    lengths, offsets, boundaries = [2, 1, 3], [0, 4, 6], [0, 2, 3]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 3)
    (tmp_path / "d.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    (tmp_path / "d.idx").write_bytes(header + struct.pack("<3i3q3q", *lengths, *offsets, *boundaries))
    data = IndexedDataset(tmp_path / "d")
    assert [data.document(i).tolist() for i in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert data.document_cuts(0, 6).tolist() == [3]
    assert concatenate([tmp_path / "d"], tmp_path / "copy").sequences == 3
    assert content(tmp_path / "copy") == content(tmp_path / "d")


def test_outside_the_stream_is_an_index_error(tmp_path):
    data = IndexedDataset(write(tmp_path / "d", CORPUS))
    for start, stop in ((-1, 2), (0, 8), (3, 2)):
        with pytest.raises(IndexError):
            data.read(start, stop)
    with pytest.raises(IndexError):
        data.document(6)
    with pytest.raises(IndexError):
        data.document_of(7)


def test_a_worker_gets_its_own_files(tmp_path):
    data = IndexedDataset(write(tmp_path / "d", CORPUS))
    copy = pickle.loads(pickle.dumps(data))
    data.close()
    assert copy.read(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_file_cut_while_open_is_an_error_not_a_crash(tmp_path):
    data = IndexedDataset(write(tmp_path / "d", CORPUS))
    os.truncate(tmp_path / "d.bin", 4)
    with pytest.raises(SteelError, match=r"cut after it was opened[^$]*d\.bin"):
        data.read(0, 7)


def test_dtype_rule():
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32
    assert best_dtype(None) == np.int32


BROKEN = {
    "no bin": (lambda p: os.remove(p / "d.bin"), r"d\.bin is missing"),
    "no idx": (lambda p: os.remove(p / "d.idx"), r"d\.idx is missing"),
    "cut bin": (lambda p: os.truncate(p / "d.bin", 12), "tokens are truncated: 12 bytes, the index needs 14"),
    "long bin": (lambda p: os.truncate(p / "d.bin", 16), "longer than its index says"),
    "odd bin": (lambda p: os.truncate(p / "d.bin", 13), "13 bytes are no whole number of uint16 tokens"),
    "empty bin": (lambda p: os.truncate(p / "d.bin", 0), "empty: it holds no token"),
    "cut idx": (lambda p: os.truncate(p / "d.idx", 100), "index is truncated: 4 sequences and 7 document boundaries"),
    "cut header": (lambda p: os.truncate(p / "d.idx", 20), "not even a header"),
    "long idx": (lambda p: os.truncate(p / "d.idx", 139), "index is too long"),
    "multimodal": (lambda p: os.truncate(p / "d.idx", 142), "multimodal"),
    "magic": (lambda p: patch(p / "d.idx", 0, b"TNTIDX\0\0\0"), "not a Megatron index"),
    "version": (lambda p: patch(p / "d.idx", 9, b"\x02"), "version 2"),
    "dtype 6": (lambda p: patch(p / "d.idx", 17, b"\x06"), "code 6 means floats"),
    "dtype 7": (lambda p: patch(p / "d.idx", 17, b"\x07"), "code 7 means floats"),
    "dtype 9": (lambda p: patch(p / "d.idx", 17, b"\x09"), "code 9 is unknown"),
    "huge count": (lambda p: patch(p / "d.idx", 18, b"\xff" * 8), "index is truncated"),
    "zero boundaries": (lambda p: (patch(p / "d.idx", 26, bytes(8)), os.truncate(p / "d.idx", 82)), "no token"),
    "last length": (lambda p: patch(p / "d.idx", LENGTHS_AT + 12, b"\x02"), "tokens are truncated"),
    "last length negative": (lambda p: patch(p / "d.idx", LENGTHS_AT + 12, b"\xff" * 4), "impossible entries"),
    "last boundary": (
        lambda p: patch(p / "d.idx", 130, b"\x03"),
        "the documents span the sequences 0 to 3, not 0 to 4",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_at_open(tmp_path, name):
    write(tmp_path / "d", CORPUS)
    assert os.path.getsize(tmp_path / "d.idx") == 138
    breaking, message = BROKEN[name]
    breaking(tmp_path)
    with pytest.raises(SteelError, match=message) as caught:
        IndexedDataset(tmp_path / "d")
    assert str(tmp_path / "d.") in caught.value.where


DEEP = {
    "length": (lambda p: patch(p / "d.idx", LENGTHS_AT, b"\x02"), "sequence 1 points to byte 6; the lengths say 4"),
    "negative length": (lambda p: patch(p / "d.idx", LENGTHS_AT + 4, b"\xff" * 4), r"sequence 1 has a negative length \(-1\)"),
    "pointer": (lambda p: patch(p / "d.idx", LENGTHS_AT + 16 + 8, b"\xff" * 7), "sequence 1 points to byte"),
    "boundary": (lambda p: patch(p / "d.idx", 90, b"\x09"), "does not rise from 0 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_damage_inside_the_index_is_found_by_the_full_check(tmp_path, name):
    write(tmp_path / "d", CORPUS)
    breaking, message = DEEP[name]
    breaking(tmp_path)
    for check in (trust, verify, lambda prefix: concatenate([prefix], tmp_path / "out")):
        with pytest.raises(SteelError, match=message):
            check(tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_wild_pointers_met_while_training_are_named(tmp_path):
    write(tmp_path / "d", CORPUS)
    patch(tmp_path / "d.idx", LENGTHS_AT + 16 + 8, b"\xff" * 7)
    with pytest.raises(SteelError, match=r"begin[^$]*d\.idx"):
        IndexedDataset(tmp_path / "d").document_cuts(0, 7)


@pytest.mark.parametrize("ids", [[70000], [-1], np.array([3, -2])])
def test_ids_that_do_not_fit_leave_nothing(tmp_path, ids):
    with pytest.raises(SteelError, match=r"document 1 \(counted from 0\) holds token id"):
        write(tmp_path / "d", [[1], ids])
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    before = content(write(tmp_path / "d", CORPUS))

    def fail():
        with IndexedWriter(tmp_path / "d", np.uint16) as writer:
            writer.add_document([9])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(tmp_path / "d") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(SteelError, match="no token to write"):
        write(tmp_path / "d", [[], []])
    assert list(tmp_path.iterdir()) == []


WRITES = """
import sys
from megatron_steel.data.indexed import IndexedWriter
with IndexedWriter(sys.argv[1], "u2") as writer:
    writer.add_document([1, 2, 3])
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path):
    command = [sys.executable, "-c", WRITES, str(tmp_path / "d")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(Busy, match="another process is writing"):
            write(tmp_path / "d", [[9] * 5000])
        process.communicate()
    assert process.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    with IndexedDataset(tmp_path / "d") as data:
        assert data.document(0).tolist() == [1, 2, 3]
    write(tmp_path / "d", [[9]])  # the lock has gone with its file


def test_a_lock_on_a_file_that_was_taken_away_is_no_lock(tmp_path, monkeypatch):
    lock, flock = tmp_path / "d.lock", fcntl.flock
    gone = []

    def too_late(file, how):
        if not gone:  # its holder ends between the open and the lock
            gone.append(lock.unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with reserved(tmp_path / "d"):
        assert lock.exists()
        with pytest.raises(Busy), reserved(tmp_path / "d"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_reserved_output_is_not_merged_into(tmp_path):
    write(tmp_path / "a", CORPUS)
    with reserved(tmp_path / "all"), pytest.raises(Busy, match="another process is writing"):
        merge([tmp_path / "a"], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_a_copy_with_other_times_keeps_its_tokenizer_in_a_merge(tmp_path):
    for name, fingerprint in (("a", "x"), ("b", "x"), ("c", "y")):
        facts = trust(write(tmp_path / name, [*CORPUS, [ord(name)]]))
        facts = Facts(**{field.name: getattr(facts, field.name) for field in dataclasses.fields(Facts)})
        manifest.write(tmp_path / name, facts, {"fingerprint": fingerprint}, [{"name": f"{name}.jsonl"}])
        os.utime(tmp_path / f"{name}.bin", ns=(1, 1))
    with pytest.raises(SteelError, match="made with different tokenizers"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "all")
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert merged.tokenizer == {"fingerprint": "x"}
    assert [entry["name"] for entry in merged.provenance] == ["a.jsonl", "b.jsonl"]


def test_merge_equals_one_writer(tmp_path):
    pieces = [CORPUS, [[300]], [[], [1, 1], []]]
    parts = [write(tmp_path / f"p{i}", documents) for i, documents in enumerate(pieces)]
    merged = merge(parts, tmp_path / "all")
    whole = write(tmp_path / "whole", [ids for piece in pieces for ids in piece])
    assert content(tmp_path / "all") == content(whole)
    assert (merged.documents, merged.tokens, merged.max_token_id, merged.max_token_document) == (10, 10, 300, 6)
    assert load(tmp_path / "all") == merged
    assert verify(tmp_path / "all").digest == trust(whole).digest == merged.digest


def test_merge_refuses_the_same_content_twice(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, CORPUS)
    for prefixes in (["a", "b"], ["a", "a"]):
        with pytest.raises(SteelError, match="a has the same content") as caught:
            merge([tmp_path / name for name in prefixes], tmp_path / "all")
        assert caught.value.where == f"{tmp_path}/{prefixes[1]}"
    assert not list(tmp_path.glob("all*"))


def test_merge_refuses_mixed_dtypes(tmp_path):
    parts = [write(tmp_path / "a", CORPUS), write(tmp_path / "b", CORPUS, np.int32)]
    with pytest.raises(SteelError, match=r"different dtypes: uint16 in .*a, int32 in .*b"):
        merge(parts, tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_merge_refuses_to_write_over_its_input(tmp_path):
    before = content(write(tmp_path / "a", CORPUS))
    with pytest.raises(SteelError, match="output is one of the inputs"):
        merge([tmp_path / "a"], tmp_path / "x" / ".." / "a")
    with pytest.raises(SteelError, match="nothing to merge"):
        merge([], tmp_path / "b")
    with pytest.raises(SteelError, match="the output is a folder"):
        merge([tmp_path / "a"], f"{tmp_path}/")
    assert content(tmp_path / "a") == before


def test_merge_refuses_negative_ids(tmp_path):
    write(tmp_path / "a", [[1], [2, 3]], np.int32)
    patch(tmp_path / "a.bin", 8, struct.pack("<i", -5))
    with pytest.raises(SteelError, match=r"document 1 \(counted from 0\) holds the negative token id -5"):
        merge([tmp_path / "a"], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))
