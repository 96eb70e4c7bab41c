"""Tiny models of many families, written into folders as they are published."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from megatron_steel.model.build import build_config, build_model
from megatron_steel.recipe import Model

_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": _LLAMA, "qwen2": _LLAMA, "mistral": _LLAMA, "granite": _LLAMA, "phi": _LLAMA, "gpt_neox": _NEOX,
    "qwen3": {**_LLAMA, "head_dim": 8}, "gemma": {**_LLAMA, "head_dim": 8}, "phi3": _LLAMA,
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8}, "smollm3": _LLAMA,
    "qwen2_moe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
                "max_position_embeddings": 64, "window_size": 4},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": 16,
            "max_position_embeddings": 64},
    "steel": {**_LLAMA, "FFN_type": "raw"},
    "steel softmoe": {**_LLAMA, "FFN_type": "softmoe_v3", "n_experts": 3},
    "steel causal": {**_LLAMA, "FFN_type": "softmoe_causal", "n_experts": 3, "causal_slots": "lagged", "segment_length": 8},
}  # fmt: skip
NO_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def write_model(folder, family="llama", vocab_size=128, dtype=torch.float32, tied=None, tokenizer=None, **fields):
    """Save a model with random weights, biases and norms included; returns it, in eval mode and in `dtype`."""
    tying = {} if tied is None else {"tie_word_embeddings": tied}
    config = {"vocab_size": vocab_size, **FAMILIES[family], **NO_IDS, **tying, **fields}
    model = build_model(build_config(Model(type=family.split()[0], config=config)), 3).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=draw) * 0.1
    model = model.to(dtype)
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return model


def load(folder):
    """As a run starts from it: by `model.path` and `model.init_from`."""
    return build_model(build_config(Model(path=str(folder))), 0, str(folder)).eval()


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def as_bin(folder, shards=1):
    """The same folder with pickled weights; tied ones share their memory, as torch.save leaves them."""
    found = tensors(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    if shards == 1:
        torch.save(found, folder / "pytorch_model.bin")
    else:
        split(
            folder,
            found,
            lambda part, file: torch.save(part, file),
            "pytorch_model-{}-of-00002.bin",
            "pytorch_model.bin",
        )


def as_shards(folder):
    found = tensors(folder)
    (folder / "model.safetensors").unlink()
    split(folder, found, lambda part, file: save_file(part, file, {"format": "pt"}), "model-{}-of-00002.safetensors",
          "model.safetensors")  # fmt: skip


def split(folder, found, save, pattern, whole):
    places = {}
    for number in (1, 2):
        part = {name: found[name] for name in sorted(found)[number - 1 :: 2]}
        file = pattern.format(f"{number:05d}")
        save(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def ids(vocab_size=128, length=24):
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
