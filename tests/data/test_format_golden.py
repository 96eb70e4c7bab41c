"""Bytes written by hand from the specification of the format, against the reader and the writer."""

import numpy as np

from megatron_steel.data.indexed import IndexedDataset, IndexedWriter

# Two documents, [1, 2, 3] and [65535], as u16.
BIN = bytes.fromhex("0100 0200 0300 ffff")
IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX\0\0
    "0100000000000000"  # version 1
    "08"  # dtype code: u16
    "0200000000000000"  # 2 sequences
    "0300000000000000"  # 3 document boundaries
    "03000000 01000000"  # lengths
    "0000000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000"  # boundaries
)


def test_the_writer_writes_these_bytes(tmp_path):
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([65535])
    assert (tmp_path / "d.bin").read_bytes() == BIN
    assert (tmp_path / "d.idx").read_bytes() == IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_the_reader_reads_these_bytes(tmp_path):
    (tmp_path / "d.bin").write_bytes(BIN)
    (tmp_path / "d.idx").write_bytes(IDX)
    data = IndexedDataset(tmp_path / "d")
    assert (data.tokens, data.sequences, data.documents, data.dtype) == (4, 2, 2, np.dtype("u2"))
    assert data.read(0, 4).tolist() == [1, 2, 3, 65535]
    assert [data.document(i).tolist() for i in range(2)] == [[1, 2, 3], [65535]]
    assert data.document_cuts(0, 4).tolist() == [3]
