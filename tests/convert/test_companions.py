"""What lies beside the weights says the same to transformers 4.57 and 5.x, and the tokenizer stays the tokenizer."""

import json

import pytest
from conftest import VOCABULARY
from transformers import AutoConfig

from megatron_steel.convert import companions
from megatron_steel.convert.shards import blueprint_of
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.model.build import build_config
from megatron_steel.post.load import load
from megatron_steel.recipe import from_dict

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def _written(folder, model_type, tokenizer, **config):
    recipe = from_dict({
        "tokenizer": {"path": str(tokenizer)}, "model": {"type": model_type, "config": {**SIZES, **config}},
        "data": {"train": "x", "sequence_length": 8}, "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    })  # fmt: skip
    built = build_config(recipe.model)
    name = blueprint_of(built).architecture
    loader = companions.write_companions(folder, built, name, "bfloat16", load_tokenizer(tokenizer), tokenizer)
    return json.loads((folder / "config.json").read_text()), built, loader


SCALED = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "older"),
    [
        ("llama", {"rope_theta": 777.0}, {"rope_theta": 777.0}),
        ("llama", {"rope_parameters": SCALED}, {
            "rope_theta": 5e3, "rope_scaling": {k: v for k, v in SCALED.items() if k != "rope_theta"},
        }),
        ("phi", {"rope_theta": 777.0, "partial_rotary_factor": 0.25}, {"rope_theta": 777.0, "partial_rotary_factor": 0.25}),
        ("steel", {"rope_theta": 777.0}, {"rope_theta": 777.0, "FFN_type": "raw"}),
        ("qwen3", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_config_json_has_both_forms_and_reads_back_as_it_was(model_type, config, older, tmp_path, tiny_tokenizer):
    tree, built, loader = _written(tmp_path, model_type, tiny_tokenizer, **config)
    assert {key: tree[key] for key in older} == older
    assert loader == "AutoTokenizer"
    assert {"architectures", "transformers_version", "dtype", "torch_dtype"} <= set(tree)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).to_dict()
    for key, value in built.to_dict().items():
        if (
            key not in ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")
            and "token_id" not in key
        ):
            assert again[key] == value, key


def test_a_model_type_that_misleads_autotokenizer_is_told_and_generation_is_not_misled(
    tmp_path, tiny_tokenizer, caplog
):
    with caplog.at_level("WARNING", logger="megatron_steel"):
        _, built, loader = _written(tmp_path, "qwen2", tiny_tokenizer)
    assert loader == "PreTrainedTokenizerFast"
    assert "load the export's with PreTrainedTokenizerFast" in caplog.text
    from megatron_steel.model.build import build_model

    build_model(built, 1).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert load(str(tmp_path)).tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_a_sentencepiece_model_travels_and_is_said_to_be_no_hf_tokenizer(tmp_path, caplog):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the quick brown fox number {i} jumps" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tok"), vocab_size=80, model_type="bpe", minloglevel=2
    )
    (tmp_path / "out").mkdir()
    with caplog.at_level("INFO", logger="megatron_steel"):
        tree, _, loader = _written(tmp_path / "out", "steel", tmp_path / "tok.model")
    assert loader is None
    assert "no Hugging Face tokenizer" in caplog.text
    assert (tmp_path / "out" / "tok.model").read_bytes() == (tmp_path / "tok.model").read_bytes()
    assert (tree["eos_token_id"], tree["pad_token_id"]) == (2, None)
