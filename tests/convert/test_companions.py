"""What lies beside the weights says the same to transformers 4.57 and 5.x, and the tokenizer stays the tokenizer."""

import json

import pytest
from conftest import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_steel.convert import companions
from megatron_steel.convert.shards import blueprint_of
from megatron_steel.data.chat_template import chatml_template
from megatron_steel.data.chatml import chatml
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.own import OWN
from megatron_steel.post.load import load
from megatron_steel.recipe import Model, from_dict

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def _written(folder, model_type, tokenizer, **config):
    sizes = {key: value for key, value in SIZES.items() if (model_type, key) != ("gpt_neox", "num_key_value_heads")}
    recipe = from_dict({
        "tokenizer": {"path": str(tokenizer)}, "model": {"type": model_type, "config": {**sizes, **config}},
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
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}},
         {"rotary_emb_base": 777.0, "rotary_pct": 0.5}),
        ("granite", {"rope_theta": 777.0}, {"rope_theta": 777.0}),
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer with ChatML's tokens and a template without marks."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.jsonl").write_text(json.dumps({"text": "钢铁是怎样炼成的？The quick brown fox, 1984.\n" * 50}) + "\n")
    train_tokenizer([folder / "c.jsonl"], folder / "tokenizer", 320)
    return folder / "tokenizer"


def test_a_template_with_marks_lies_beside_one_without_and_hides_nothing(trained, tmp_path):
    _written(tmp_path, "llama", trained, vocab_size=320)
    for file in trained.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "chat_template_training.jinja").read_text() == chatml_template()
    assert not (tmp_path / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == AutoTokenizer.from_pretrained(trained).chat_template


def test_a_tokenizer_without_a_template_gets_the_one_with_marks(trained, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in trained.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tree = json.loads((bare / "tokenizer_config.json").read_text())
    del tree["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(tree))
    (tmp_path / "out").mkdir()
    _written(tmp_path / "out", "llama", bare, vocab_size=320)
    assert not (tmp_path / "out" / "chat_template_training.jinja").exists()
    for file in bare.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    turns = [("user", "你好"), ("assistant", "好 ")]
    rows = [{"role": role, "content": content} for role, content in turns]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(rows, tokenize=False) == chatml(turns) + "<|im_end|>\n"


def test_where_no_template_fits_none_is_written(tiny_tokenizer, tmp_path):
    _written(tmp_path, "llama", tiny_tokenizer)
    assert not list(tmp_path.glob("*.jinja"))


def test_both_ends_of_chatml_end_a_text_and_nothing_is_said_about_sampling(trained, tmp_path):
    _written(tmp_path, "llama", trained, vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tree = json.loads((tmp_path / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tree == {"eos_token_id": ends, "pad_token_id": ends[1], "transformers_version": tree["transformers_version"]}
    read = GenerationConfig.from_pretrained(tmp_path)
    read.validate(strict=True)
    assert read.eos_token_id == ends


def test_what_ends_a_text_without_chatml_is_one_token(trained):
    plain = load_tokenizer(trained)
    object.__setattr__(plain, "special", {"</s>": 7})
    ids = {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": None}
    assert companions.generation_tree(ids, plain, "5") == {
        "eos_token_id": 7,
        "pad_token_id": 7,
        "transformers_version": "5",
    }
    assert companions.generation_tree({"eos_token_id": None}, None, "5") == {"transformers_version": "5"}


_ODD = dict.fromkeys(("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"))


_SMALL = {
    "nanogpt": {"n_layer": 2, "n_embd": 64, "n_head": 4},
    "openelm": {"num_transformer_layers": 2, "model_dim": 64, "head_dim": 8},
}


@pytest.mark.parametrize("kind", ["nanogpt", "openelm"])
def test_our_own_classes_travel_with_their_code(kind, tmp_path, tiny_tokenizer):
    """config.json names the code beside it and reads back as it was; AutoModel builds the class from these files alone."""
    built = build_config(Model(type=kind, config={"vocab_size": VOCABULARY, **_SMALL[kind]}))
    name = blueprint_of(built).architecture
    companions.write_companions(tmp_path, built, name, "bfloat16", load_tokenizer(tiny_tokenizer), tiny_tokenizer)
    assert {file.name for file in tmp_path.glob("*.py")} == set(OWN[kind].file_names)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert {k: v for k, v in again.to_dict().items() if k in built.to_dict() and "token_id" not in k} | _ODD == {
        k: v for k, v in built.to_dict().items() if "token_id" not in k
    } | _ODD
    theirs = AutoModelForCausalLM.from_config(again, trust_remote_code=True)
    assert [(n, p.shape) for n, p in theirs.named_parameters()] == [
        (n, p.shape) for n, p in build_model(built, 1).named_parameters()
    ]
