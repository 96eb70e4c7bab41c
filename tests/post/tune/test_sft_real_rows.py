"""Real rows, the real tokenizer, the real road: firefly and BELLE through sft-data, then sft; what the assistant says is learned."""

import json
import shutil

import pytest
import torch
import yaml
from tiny_tuning import SIZES, logged, run, token_mean, weights

from megatron_steel.model.build import build_model
from megatron_steel.model.configuration_steel import SteelConfig

pytestmark = [pytest.mark.slow, pytest.mark.shared]


def test_the_assistants_words_are_learned_from_real_rows(shared_data, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(shared_data / "qwen_tokenizer", model)
    config = SteelConfig(**SIZES, vocab_size=151936, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=151645,
                         pad_token_id=151643, FFN_type="softmoe_causal", n_experts=3)  # fmt: skip
    build_model(config, 3).to(torch.bfloat16).save_pretrained(model)
    samples = shared_data / "steel_samples"
    spec = {"kind": "sft", "tokenizer": str(model), "max_tokens": 160, "seed": 1, "heldout_ratio": 0.15,
            "sources": [{"type": "firefly", "files": [str(samples / "firefly/*.jsonl")], "rows": 24},
                        {"type": "alpaca", "files": [str(samples / "BELLE/train_2M_CN_sample.json")], "rows": 12},
                        {"type": "sharegpt", "files": [str(samples / "BELLE/train_3.5M_CN_sample.json")], "rows": 12}]}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert run("sft-data", tmp_path / "spec.yaml", "--output", tmp_path / "data") == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    before = token_mean(model, rows)
    assert run("sft", model, tmp_path / "data", "--output", tmp_path / "out", "--global-batch-size", 8, "per_device_train_batch_size=4",
               "learning_rate=1e-2", "num_train_epochs=3") == 0  # fmt: skip
    capsys.readouterr()
    after, losses = token_mean(tmp_path / "out", rows), logged(tmp_path / "out", "loss")
    with capsys.disabled():
        print(f"\nassistant-token loss of {len(rows)} held-out rows: {before:.3f} before, {after:.3f} after {len(losses)} steps; "
              f"of the first and the last batch {losses[0]:.3f}, {losses[-1]:.3f}")  # fmt: skip
    assert before == pytest.approx(11.93, abs=0.1)  # ln 151936
    assert after < before - 1.5
    assert losses[-1] < losses[0] - 2
    assert logged(tmp_path / "out", "eval_loss")[-1] == pytest.approx(after, rel=5e-3)  # the output is rounded to bf16
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "merges.txt").read_bytes() == (
        shared_data / "qwen_tokenizer" / "merges.txt"
    ).read_bytes()
