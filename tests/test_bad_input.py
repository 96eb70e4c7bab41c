"""Bad input: one clear message, the right exit code, nothing half-written. Through the real verbs."""

import os
import struct

import numpy as np
import pytest

from megatron_steel import cli
from megatron_steel.data.indexed import IndexedWriter


@pytest.fixture
def fails(tiny_recipe, capsys, tmp_path, monkeypatch):
    """fails(text, *overrides): pretrain exits 78, says `text`, and leaves no run folder."""

    def run(says: str, *overrides: str) -> None:
        folder = tmp_path / "run"
        code = cli.main(["pretrain", str(tiny_recipe), f"run.dir={folder}", *overrides])
        message = capsys.readouterr().err
        assert code == 78, message
        assert says in message, message
        assert "where:" in message
        assert "do:" in message
        assert "Traceback" not in message
        assert not folder.exists()

    return run


def _copy(tiny_data, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"t{suffix}").write_bytes((tiny_data / f"train{suffix}").read_bytes())
    return tmp_path / "t"


def test_unknown_recipe_key(fails):
    fails("did you mean train.steps?", "train.stepz=3")


def test_impossible_batch(fails):
    fails("global batch of 7 samples cannot be cut", "train.global_batch_size=7")


def test_a_deepspeed_key_that_the_recipe_owns(fails, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}')
    fails("sets 'optimizer', which the recipe decides", f"deepspeed.config={tmp_path}/ds.json")


def test_missing_data(fails, tmp_path):
    fails("nowhere", f"data.train={tmp_path}/nowhere")


def test_no_weights_to_start_from(fails, tmp_path):
    fails("there is no Hugging Face model to start from", f"model.init_from={tmp_path}/nowhere")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(fails, tiny_data, tmp_path, suffix):
    prefix = _copy(tiny_data, tmp_path)
    os.truncate(f"{prefix}{suffix}", os.path.getsize(f"{prefix}{suffix}") - 3)
    fails(f"t{suffix}", f"data.train={prefix}")


@pytest.mark.parametrize("code", [6, 7])
def test_float_dtype_codes(fails, tiny_data, tmp_path, code):
    prefix = _copy(tiny_data, tmp_path)
    raw = bytearray((tmp_path / "t.idx").read_bytes())
    raw[17] = code
    (tmp_path / "t.idx").write_bytes(raw)
    fails(f"{code}", f"data.train={prefix}")


def test_an_id_outside_the_vocabulary_names_the_document(fails, tmp_path):
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        for last in (1, 128, 2):
            writer.add_document(np.array([*range(3, 90), last], np.uint16))
    fails("document 1", f"data.train={tmp_path}/t")


def test_empty_data(fails, tmp_path):
    (tmp_path / "t.bin").touch()
    (tmp_path / "t.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))  # no sequence, boundary 0
    fails("empty", f"data.train={tmp_path}/t")


def test_sequence_longer_than_the_data(fails):
    fails("sequence longer than the data", "data.sequence_length=60000", "model.config.max_position_embeddings=60000")


def test_validation_that_is_too_short(fails, tmp_path):
    with IndexedWriter(tmp_path / "v", np.uint16) as writer:
        writer.add_document(np.arange(3, 40, dtype=np.uint16))
    fails("sequence longer than the data", f"data.validation={tmp_path}/v")


def test_a_sequence_longer_than_the_models_positions(fails):
    fails("do not fit a model of 16 positions", "model.config.max_position_embeddings=16")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ("[1]", "no object"),
        ('{"zero_optimisation": {"stage": 3}}', "did you mean zero_optimization?"),
        ('{"zero_optimization": {"stage": "three"}}', "zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 3, "reduce_buckets": 1}}', "zero_optimization.reduce_buckets"),
    ],
)
def test_a_deepspeed_file_that_makes_no_sense(fails, tmp_path, tree, says):
    (tmp_path / "ds.json").write_text(tree)
    fails(says, f"deepspeed.config={tmp_path}/ds.json")


def test_a_run_folder_that_is_a_file(tiny_recipe, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/file"]) == 78
    assert "the run folder cannot be written" in capsys.readouterr().err


def test_an_unknown_model_field_names_the_nearest(fails):
    fails("hidden_size", "model.config.hiden_size=3")


def test_a_missing_tokenizer(fails, tmp_path):
    fails("tokenizer", f"tokenizer.path={tmp_path}/none")


def test_a_prompt_that_is_too_long(fails):
    fails("a prompt of 2 tokens and 31 more", "train.sample_prompts=[w5 w6]", "train.sample_tokens=31")


def test_another_job_in_the_same_folder_is_refused(tiny_recipe, capsys, tmp_path):
    from megatron_steel.train import lock

    held = lock.take(tmp_path)
    assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path}"]) == 78
    assert f"another job trains in this folder (process {os.getpid()} " in capsys.readouterr().err
    held.close()


def test_all_ranks_leave_together_with_one_message(tiny_recipe, launch, tmp_path):
    done = launch(2, tiny_recipe, f"run.dir={tmp_path}/run", "data.sequence_length=60000",
                  "model.config.max_position_embeddings=60000", expect=78)  # fmt: skip
    assert (done.stdout + done.stderr).count("sequence longer than the data") == 1


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="a GPU runs it")
def test_a_kernel_that_cannot_run_here(fails):
    fails("attention by flex cannot run here: it needs a CUDA device", "kernels.attention=flex")
