"""Checkpoints of transformers' Trainer with DeepSpeed and of plain DeepSpeed loops become the folders that DeepSpeed's own
converter would make: equal fp32 weights by name, every stage, 1 and 2 ranks, tied or not, with frozen weights."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import made
from conftest import VOCABULARY
from safetensors.torch import load_file

from megatron_steel import cli
from megatron_steel.convert import sources
from megatron_steel.convert.hf import export
from megatron_steel.errors import SteelError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": VOCABULARY}  # fmt: skip


def _case(by, ranks, stage, precision, tied, kind="llama", **more):
    config = {**SIZES, "tie_word_embeddings": tied}
    return {"by": by, "ranks": ranks, "stage": stage, "precision": precision, "type": kind, "config": config, **more}


CASES = {
    "trainer-2": _case("trainer", 2, 2, "bf16", True),
    "trainer-3": _case("trainer", 2, 3, "bf16", False),
    "loop-0": _case("loop", 2, 0, "bf16", True, groups=2),
    "loop-3-frozen": _case("loop", 2, 3, "bf16", True, groups=2, frozen=["embed_tokens"]),
}
GRID = {
    f"loop-{stage}-{precision}-{ranks}": _case(
        "loop", ranks, stage, precision, tied=(stage + ranks) % 2 == 0, kind="qwen2", groups=1 + (precision == "bf16"),
        frozen=["embed_tokens", "layers.0"] if precision == "bf16" and stage else [],
    )
    for ranks in (1, 2) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16", "fp16")
} | {
    f"trainer-{stage}-{precision}-{ranks}": _case("trainer", ranks, stage, precision, tied=stage == 3)
    for ranks, stage, precision in ((1, 2, "bf16"), (1, 3, "fp32"), (2, 1, "bf16"), (2, 3, "fp16"))
} | {"loop-wrapped": _case("loop", 1, 2, "fp32", True, wrapped=True)}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with one folder a case, all made by the real engine."""
    return made("CASES", tmp_path_factory, tiny_tokenizer) / "foreign"


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tiny_tokenizer) -> Path:
    return made("GRID", tmp_path_factory, tiny_tokenizer) / "foreign"


@pytest.fixture
def trainers(theirs, tmp_path) -> Path:
    """A copy of a Trainer's output folder, free to be damaged."""
    return Path(shutil.copytree(theirs / "trainer-3", tmp_path / "out-of-trainer"))


def _source(folder: Path, case: dict) -> tuple[Path, Path | None]:
    return (folder, None) if case["by"] == "trainer" else (folder / "saved", folder / "model")


def _require_equal(out: Path, reference: Path, tied: bool, dtype=torch.float32) -> None:
    found, wanted = load_file(out / "model.safetensors"), torch.load(reference)
    assert set(wanted) - set(found) <= ({"lm_head.weight"} if tied else set())
    assert set(found) <= set(wanted)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].to(dtype)), name


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_deepspeed_finds(name, theirs, tmp_path, caplog):
    source, model = _source(theirs / name, CASES[name])
    with caplog.at_level("INFO", logger="megatron_steel"):
        out = export(source, tmp_path / "out", "float32", model=model)
    _require_equal(out, theirs / name / "reference.pt", CASES[name]["config"]["tie_word_embeddings"])
    assert ("known by what they round to" in caplog.text) == (name == "loop-0")
    assert "not hashed by the trainer" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").is_file()
    chosen = source / "checkpoint-2" / "generation_config.json"
    if chosen.is_file():
        assert (out / chosen.name).read_bytes() == chosen.read_bytes()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_weights_of_every_kind_are_verified(name, grid, tmp_path, capsys):
    case = GRID[name]
    folder = grid / name
    source, model = _source(folder, case)
    if case.get("wrapped"):
        with pytest.raises(SteelError, match=r"holds model\.model\.\S+ .*, without 'model\.' in front"):
            export(source, tmp_path / "out", "float32", model=model)
        return
    out = export(source, tmp_path / "out", "float32", verify=True, model=model)
    assert "verified in a fresh process" in capsys.readouterr().out
    _require_equal(out, folder / "reference.pt", case["config"]["tie_word_embeddings"])


def test_the_command_takes_the_folder_and_the_tag_and_audits(theirs, tmp_path, capsys):
    saved, model = theirs / "loop-3-frozen" / "saved", theirs / "loop-3-frozen" / "model"
    tag = next(path for path in saved.iterdir() if path.is_dir())
    for source in (saved, tag):
        out = tmp_path / f"of-{source.name}"
        assert cli.main(["export", str(source), str(out), "--model", str(model)]) == 0, capsys.readouterr().err
        _require_equal(out, theirs / "loop-3-frozen" / "reference.pt", True, torch.bfloat16)
        assert json.loads((out / "audit.json").read_text())["causal"] is True


def test_the_newest_whole_checkpoint_is_taken(trainers, tmp_path, caplog):
    assert export(trainers / "checkpoint-1", tmp_path / "first").is_dir()
    next((trainers / "checkpoint-2" / "global_step2").glob("*rank_1*optim_states.pt")).unlink()
    with caplog.at_level("WARNING", logger="megatron_steel"):
        out = export(trainers, tmp_path / "out")
    assert "passed over a checkpoint: the folder holds 1 optimizer files of 2" in caplog.text
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "first" / "model.safetensors").read_bytes()
    assert sources.find(trainers).checkpoint.step == 1
    with pytest.raises(SteelError, match="1 optimizer files of 2"):
        export(trainers / "checkpoint-2", tmp_path / "other")
    shutil.rmtree(trainers / "checkpoint-1")
    with pytest.raises(SteelError, match="1 optimizer files of 2"):
        export(trainers, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_can_be_brought(trainers, tmp_path, tiny_tokenizer, caplog):
    newest = trainers / "checkpoint-2"
    for file in (*newest.glob("tokenizer*"), *trainers.glob("tokenizer*")):
        file.unlink()
    assert sources.find(newest).tokenizer is None
    assert "--tokenizer may bring it" in caplog.text
    out = export(newest, tmp_path / "out", tokenizer=tiny_tokenizer)
    assert (out / "tokenizer.json").read_bytes() == (tiny_tokenizer / "tokenizer.json").read_bytes()


class _Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def _place_of_weights(shard: Path) -> int:
    flat = torch.load(shard, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"][0]
    return shard.read_bytes().index(flat.contiguous().view(torch.uint8).numpy().tobytes())


def test_what_is_missing_damaged_or_unsafe_is_named(trainers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = trainers / "checkpoint-2"
    states = newest / "global_step2"

    def refused(match: str, source: Path = newest, **options) -> None:
        with pytest.raises(SteelError, match=match):
            export(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused("only the checkpoints of a run of megatron_steel can be averaged", average=2)
    (newest / "latest").write_text("../../elsewhere")
    refused("the pointer is unsafe")
    (newest / "latest").write_text("global_step9")
    refused("its folder of DeepSpeed's files is missing or empty")
    (newest / "latest").unlink()
    refused("no DeepSpeed checkpoint here")
    (newest / "latest").write_text("global_step2")
    config = (newest / "config.json").read_text()
    (newest / "config.json").unlink()
    refused("says nothing of its model")
    (newest / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused(r"it lacks model\.layers\.2\.")
    (newest / "config.json").write_text(config)
    shard = next(states.glob("*rank_1*optim_states.pt"))
    whole = shard.read_bytes()
    content = bytearray(whole)
    content[_place_of_weights(shard) + 5] ^= 1
    shard.write_bytes(content)
    refused("damaged: weights are not as they were written")
    shard.write_bytes(whole)
    rank1 = states / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    content = rank1.read_bytes()
    rank1.unlink()
    refused("holds 1 files of model states, and 2 of optimizer states")
    rank1.write_bytes(content[: len(content) // 2])
    refused("unsafe or damaged")
    torch.save({"module": _Canary()}, rank1)
    refused("unsafe: it asks for posix.mkdir")
    rank1.write_bytes(pickle.dumps(_Canary()))
    refused("unsafe or damaged")
    assert not (tmp_path / "canary").exists()
    for file in states.glob("*optim_states.pt"):
        file.unlink()
    refused("no DeepSpeed model states|are missing")
    refused("no run folder and no checkpoint", tmp_path / "nothing")
