"""Recipes become configurations and models; what cannot be built is one clear error."""

import json

import pytest
import torch
import transformers

from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model, construct
from megatron_steel.recipe import Model

STEEL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = STEEL | {"num_key_value_heads": 2}


def steel(**changes):
    return build_config(Model(type="steel", config=STEEL | changes))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(type="steele"), r"model.type\n.*did you mean steel\?"),
        (Model(type="lama"), r"did you mean llama\?"),
        (Model(type="t6"), "no causal language model"),
        (Model(type="mt5"), "of those only t5 is proven"),
        (Model(type="steel", config={"hiden_size": 8}), r"model.config.hiden_size\n.*did you mean hidden_size\?"),
        (Model(type="llama", config={"hiden_size": 8}), r"model.config.hiden_size\n.*did you mean hidden_size\?"),
        (Model(type="steel", config={"FFN_type": "softmoe_v9"}), r"softmoe_v9.*\n.*model.config.FFN_type"),
        (Model(type="steel", config={"slots_per_expert": 0}), "model.config.slots_per_expert"),
        (Model(type="steel", config={"hidden_size": 30, "num_attention_heads": 4}), "model.config.hidden_size"),
        pytest.param(
            Model(type="llama", config={"hidden_size": 30, "num_attention_heads": 4}),
            "LlamaConfig refuses these values",
            marks=pytest.mark.skipif(
                int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 checks nothing"
            ),
        ),
        (
            Model(type="qwen3", config={"num_attention_heads": 4, "num_key_value_heads": 3}),
            r"model.config.num_key_value_heads\n.*divisor of 4",
        ),
        (Model(type="openelm", config={"head_dims": 8}), r"model.config.head_dims\n.*did you mean head_dim\?"),
        (Model(type="nanogtp"), r"did you mean nanogpt\?"),
        (Model(path="/nowhere"), "no readable config.json"),
        (Model(path="/nowhere", config={"hidden_size": 8}), "cannot change a model"),
    ],
)
def test_bad_model_sections(model, message):
    with pytest.raises(SteelError, match=message):
        build_config(model)


def test_values_that_only_the_model_finds_out_about_are_named():
    config = build_config(Model(type="llama", config=LLAMA | {"hidden_act": "swish7"}))
    with pytest.raises(SteelError, match=r"cannot be built from these values: KeyError: 'swish7'(.|\n)*model.config"):
        build_model(config, 1)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    assert build_config(Model(type="steel", config=STEEL), tokenizer_vocab_size=64).vocab_size == 64
    with pytest.raises(SteelError, match=r"65 entries and the model's vocabulary only 64"):
        build_config(Model(type="steel", config=STEEL), tokenizer_vocab_size=65)


def test_old_and_new_names_of_the_rotary_base():
    config = build_config(Model(type="llama", config=LLAMA | {"rope_theta": 123.0}))
    assert (getattr(config, "rope_parameters", None) or vars(config))["rope_theta"] == 123.0
    assert steel(rope_theta=5.0).rope_parameters["rope_theta"] == 5.0


def test_folder_with_a_known_class_and_with_steel(tmp_path):
    build_config(Model(type="llama", config=LLAMA)).save_pretrained(tmp_path / "llama")
    assert build_config(Model(path=str(tmp_path / "llama"))).model_type == "llama"
    steel(FFN_type="softmoe_v1").save_pretrained(tmp_path / "steel")
    config = build_config(Model(path=str(tmp_path / "steel")))
    assert (type(config).__module__, config.FFN_type) == ("megatron_steel.model.configuration_steel", "softmoe_v1")


FOREIGN = {
    "configuration_odd.py": "from transformers import PretrainedConfig\nclass OddConfig(PretrainedConfig):\n"
    "    model_type = 'odd'\n    def __init__(self, vocab_size=7, hidden_size=4, **k):\n"
    "        self.vocab_size, self.hidden_size = vocab_size, hidden_size\n        super().__init__(**k)\n",
    "modeling_odd.py": "import torch\nfrom transformers import PreTrainedModel\n"
    "from transformers.modeling_outputs import CausalLMOutput\nfrom .configuration_odd import OddConfig\n"
    "class OddForCausalLM(PreTrainedModel):\n    config_class = OddConfig\n    def __init__(self, config):\n"
    "        super().__init__(config)\n        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)\n"
    "        self.post_init()\n    def get_input_embeddings(self):\n        return self.embed\n"
    "    def forward(self, input_ids, **k):\n"
    "        return CausalLMOutput(logits=self.embed(input_ids) @ self.embed.weight.T)\n",
}


def test_foreign_code_needs_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, code in FOREIGN.items():
        (folder / name).write_text(code)
    auto = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto, "vocab_size": 9}))
    with pytest.raises(SteelError, match=r"brings its own code(.|\n)*model.trust_code=true"):
        build_config(Model(path=str(folder)))
    config = build_config(Model(path=str(folder), trust_code=True))
    model = build_model(config, seed=1)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 9)


def test_a_seed_is_a_model_and_the_caller_s_randomness_is_left_alone():
    torch.manual_seed(99)
    state = torch.get_rng_state()
    models = [build_model(steel(), seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}
    assert {p.device.type for p in models[0].parameters()} == {"cpu"}


def test_weights_are_fp32_even_where_the_folder_says_bfloat16(tmp_path):
    config = build_config(Model(type="llama", config=LLAMA))
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    model = build_model(build_config(Model(path=str(tmp_path))), seed=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["steel", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_init_from_takes_every_weight(tmp_path, kind, tied):
    config = build_config(Model(type=kind, config=LLAMA | {"tie_word_embeddings": tied}))
    source = build_model(config, seed=1)
    source.save_pretrained(tmp_path)
    model = build_model(config, seed=2, init_from=str(tmp_path))
    for (name, a), (_, b) in zip(source.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_init_from_refuses_other_tensors(tmp_path):
    build_model(steel(), seed=1).save_pretrained(tmp_path)
    with pytest.raises(SteelError, match="mismatched: "):
        build_model(steel(vocab_size=65), seed=1, init_from=str(tmp_path))
    with pytest.raises(SteelError, match=r"missing: model.layers.2"):
        build_model(steel(num_hidden_layers=3), seed=1, init_from=str(tmp_path))
    with pytest.raises(SteelError, match=r"unexpected: model.layers.1"):
        build_model(steel(num_hidden_layers=1), seed=1, init_from=str(tmp_path))
    with pytest.raises(SteelError, match="no Hugging Face model"):
        build_model(steel(), seed=1, init_from=str(tmp_path / "nowhere"))


def test_two_matrices_cannot_start_a_tied_model(tmp_path):
    """transformers would leave them apart without a word, and the run could neither resume nor be exported."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    untied = build_config(Model(type="llama", config={**sizes, "tie_word_embeddings": False}))
    build_model(untied, 1).save_pretrained(tmp_path)
    tied = build_config(Model(type="llama", config={**sizes, "tie_word_embeddings": True}))
    with pytest.raises(SteelError, match="two different matrices"):
        build_model(tied, 1, init_from=str(tmp_path))


@pytest.mark.parametrize("field", ["rope_theta", "partial_rotary_factor"])
def test_a_rotary_field_that_the_class_would_not_use_is_refused(field):
    neox = {**STEEL, field: 0.125}
    with pytest.raises(
        SteelError, match=rf"GPTNeoXConfig takes {field} and does not use it\n.*model.config.{field}\n.*rope_parameters"
    ):
        build_config(Model(type="gpt_neox", config=neox))
    told = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    config = build_config(Model(type="gpt_neox", config={**STEEL, "rope_parameters": told}))
    assert config.rope_parameters == told
    assert (
        build_config(Model(type="llama", config={**LLAMA, "rope_theta": 5000.0})).rope_parameters["rope_theta"]
        == 5000.0
    )


def test_what_fails_on_a_real_device_is_not_blamed_on_the_values():
    """Out of memory, too, is a RuntimeError of torch; on the meta device there is nothing but the values."""
    config = build_config(Model("llama", LLAMA | {"vocab_size": -5}))
    with pytest.raises(SteelError, match="cannot be built from these values"), torch.device("meta"):
        construct(config, torch.float32)
    with pytest.raises(RuntimeError, match="negative dimension"):
        construct(config, torch.float32)
