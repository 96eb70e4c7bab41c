"""Safetensors files that are written piece by piece are those that the library writes from memory, byte for byte."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_steel.checkpoint.zero import Weight
from megatron_steel.convert import shards
from megatron_steel.errors import SteelError

GENERATOR = torch.Generator().manual_seed(1)
KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MIXED = {
    "z.weight": torch.randn(5, 7, generator=GENERATOR),
    "a.weight": torch.randn(3, 4, 2, generator=GENERATOR).bfloat16(),
    "钢.half": torch.randn(9, generator=GENERATOR).half(),
    "counts": torch.arange(5),
    "small": torch.arange(3, dtype=torch.uint8),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "eight": torch.randn(4, generator=GENERATOR).to(torch.float8_e4m3fn),
}


def _shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _same_bytes(folder, tensors):
    save_file(tensors, str(folder / "library.safetensors"), metadata={"format": "pt"})
    return (folder / "model.safetensors").read_bytes() == (folder / "library.safetensors").read_bytes()


def test_a_file_of_every_dtype_is_the_librarys_and_reads_back(tmp_path):
    (file,) = shards.write_shards(
        reversed(MIXED.items()), _shapes(MIXED), tmp_path, {n: t.dtype for n, t in MIXED.items()}, tmp_path
    )
    assert _same_bytes(tmp_path, MIXED)
    for name, tensor in load_file(file).items():
        assert tensor.dtype == MIXED[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), MIXED[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_pieces_of_any_length_in_any_order_give_the_same_file(dtype, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_PIECE", 2)
    tensors = {f"w{i}": torch.randn(i + 2, 3, generator=GENERATOR) for i in range(6)} | {
        "n": torch.tensor([1 << 40, 3])
    }
    dtypes = dict.fromkeys(tensors, getattr(torch, dtype)) | {"n": torch.int64}
    pieces = ((name, Weight(tuple(t.shape), t.reshape(-1).split(piece))) for name, t in reversed(tensors.items()))
    shards.write_pieces(pieces, _shapes(tensors), tmp_path, dtypes, tmp_path)
    assert _same_bytes(tmp_path, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})


def test_shards_are_cut_in_the_models_order_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    tensors = {name: torch.randn(10, generator=GENERATOR) for name in "edcba"}
    files = shards.write_shards(
        reversed(tensors.items()), _shapes(tensors), tmp_path, dict.fromkeys(tensors, torch.float32), tmp_path
    )
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = []
    for file in files:
        with safe_open(str(file), "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held.append(sorted(opened.keys()))
            assert all(torch.equal(opened.get_tensor(name), tensors[name]) for name in opened.keys())  # noqa: SIM118
    assert held == [["d", "e"], ["b", "c"], ["a"]]
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"] == {n: file.name for file, names in zip(files, held, strict=True) for n in names}


def test_every_16_bit_number_is_rounded_as_torch_rounds_and_what_is_none_is_refused(tmp_path):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    numbers = torch.cat([((bits << 16) + low).view(torch.float32) for low in (0, 0x7FFF, 0x8000, 0x8001)])
    numbers = numbers[numbers.bfloat16().isfinite()]
    shards.write_shards([("w", numbers)], {"w": tuple(numbers.shape)}, tmp_path, {"w": torch.bfloat16}, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], numbers.bfloat16())
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 3_000_000):
            tensor = torch.zeros(3_000_001)
            tensor[place] = bad
            with pytest.raises(SteelError, match="w holds numbers that are not finite"):
                shards.write_shards([("w", tensor)], {"w": (3_000_001,)}, tmp_path, {"w": torch.float16}, tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["module.a.w"], r"holds module\.a\.w .*; there it is a\.w, without 'module\.' in front"),
        (["w"], r"holds w .*; there it is a\.w, with 'a\.' in front"),
        (["a.w", "a.w"], r"holds a\.w .*, which the model does not have \(or has once\)"),
        (["a.w"], r"lacks b\.w \(2,\)"),
    ],
)
def test_names_that_are_not_the_models_are_named(names, says, tmp_path):
    with pytest.raises(SteelError, match=says):
        shards.write_shards(
            [(n, torch.ones(2)) for n in names],
            {"a.w": (2,), "b.w": (2,)},
            tmp_path,
            dict.fromkeys(("a.w", "b.w"), torch.float32),
            tmp_path,
        )


@pytest.mark.parametrize("piece", [1, 4, 6, 7, 100])
@pytest.mark.parametrize("rows", [0, 2, 5])
def test_first_rows_are_the_first_rows_however_the_tensor_is_cut(rows, piece):
    tensor = torch.randn(5, 3, generator=GENERATOR)
    cut = Weight((5, 3), tensor.view(-1).split(piece)).first_rows(rows)
    assert cut.shape == (rows, 3)
    assert torch.equal(torch.cat([torch.zeros(0), *cut.pieces]).view(cut.shape), tensor[:rows])
