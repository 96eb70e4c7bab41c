"""A Steel model with plain SwiGLU layers is a Qwen2 under another name: the documented lines relabel it."""

import pytest
import torch
from tiny_exports import CLASSES, documented, run_documented
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_steel.convert.companions import config_tree
from megatron_steel.model.build import build_model
from megatron_steel.model.configuration_steel import SteelConfig

TOLERANCE = 1e-5


def _steel_folder(folder, **choices):
    import json

    config = SteelConfig(**{**CLASSES["steel-raw"], "initializer_range": 0.1, "vocab_size": 128, **choices})
    model = build_model(config, 3).eval()
    model.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config_tree(config, "SteelForCausalLM", "float32", ids)))
    return model


@pytest.mark.parametrize(
    "choices",
    [{}, {"tie_word_embeddings": True}, {"mlp_div_ratio": 1}, {"num_key_value_heads": 4, "rope_theta": 5e3}],
    ids=str,
)
def test_steel_with_plain_layers_loads_as_qwen2_with_equal_logits(choices, tmp_path):
    steel = _steel_folder(tmp_path, **choices)
    run_documented(documented("Qwen2ForCausalLM", **{"exports/steel-as-qwen2": str(tmp_path)}))
    assert not list(tmp_path.glob("*.py"))
    qwen, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(qwen) is Qwen2ForCausalLM
    assert not any(report.values())
    ids = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = steel(ids).logits, qwen.eval()(ids).logits
    assert want.abs().max() > 1
    assert (want - got).abs().max() < TOLERANCE


@pytest.mark.parametrize("choices", [{"mlp_type": "senet"}, {"FFN_type": "softmoe_v1"}], ids=str)
def test_other_steel_models_are_not_relabelled(choices, tmp_path):
    _steel_folder(tmp_path, **choices)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(AssertionError, match="no native class"):
        run_documented(documented("Qwen2ForCausalLM", **{"exports/steel-as-qwen2": str(tmp_path)}))
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "choices", [{"FFN_type": "softmoe_causal"}, {"FFN_type": "softmoe_v3"}, {"FFN_type": "raw"}], ids=str
)
def test_mixtures_over_the_sequence_refuse_vllm(choices, monkeypatch):
    """vLLM sets its own attention and keeps the cache: slots would silently be those of the newest token alone."""
    config = SteelConfig(**{**CLASSES["steel-raw"], "vocab_size": 128, **choices})
    model = build_model(config, 3).eval()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "vllm"
    ids = torch.ones(1, 8, dtype=torch.long)
    if choices["FFN_type"] == "raw":
        assert model(ids).logits.shape == (1, 8, 128)
        return
    with pytest.raises(ValueError, match="cannot run in vLLM"):
        model(ids)
