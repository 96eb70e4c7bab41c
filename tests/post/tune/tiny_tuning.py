"""Parts of the fine-tuning tests: tiny exports over single characters, rows, the verb in this process, what it logged."""

import json

import torch
from toy_models import write_letters

from megatron_steel import cli
from megatron_steel.data.chat_template import chatml_template
from megatron_steel.model.build import build_model
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.post.load import load
from megatron_steel.post.tune.mask import IGNORE, Supervision

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FFNS = {
    "dense": {"FFN_type": "raw"},
    "v1": {"FFN_type": "softmoe_v1", "n_experts": 3},
    "prefix": {"FFN_type": "softmoe_causal", "causal_slots": "prefix", "n_experts": 3},
    "lagged": {"FFN_type": "softmoe_causal", "causal_slots": "lagged", "segment_length": 16, "n_experts": 3},
    "v3": {"FFN_type": "softmoe_v3", "n_experts": 3},
}


def write_tiny(folder, kind: str = "dense", template: str | None = None, **fields):
    """An export whose tokens are characters: a Steel model of `FFNS`, or `llama`. Returns its folder, as a string."""
    _, words = write_letters(folder, template=chatml_template() if template is None else template)
    shared = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 512, "eos_token_id": words["<|im_end|>"],
              "pad_token_id": words["<pad>"], "initializer_range": 0.2, **fields}  # fmt: skip
    if kind == "llama":
        from transformers import LlamaConfig

        config = LlamaConfig(**shared)
        for file in folder.glob("*.py"):
            file.unlink()
    else:
        config = SteelConfig(**shared, **FFNS[kind])
    build_model(config, 5).save_pretrained(folder)
    return str(folder)


def conversation(*texts: str, system: str | None = None) -> dict:
    """Turns of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + turns}


def sums(count: int, first: int = 0) -> list[dict]:
    """Conversations of unlike lengths."""
    return [conversation(f"{i} + {i * i} = ?", "!" * (1 + i % 5) + str(i + i * i), *(("why?", "so.") if i % 3 == 0 else ()))
            for i in range(first, first + count)]  # fmt: skip


def preferences(count: int) -> list[dict]:
    return [{"prompt": [{"role": "user", "content": f"say {i}"}], "chosen": [{"role": "assistant", "content": "good " * (1 + i % 3)}],
             "rejected": [{"role": "assistant", "content": f"bad {i}"}]} for i in range(count)]  # fmt: skip


def write_rows(file, rows: list[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def logged(output, key: str) -> list[float]:
    log = json.loads((output / "result.json").read_text(encoding="utf-8"))["log"]
    return [line[key] for line in log if key in line]


def weights(output) -> dict:
    from safetensors.torch import load_file

    return {name: t for file in sorted(output.glob("*.safetensors")) for name, t in load_file(file).items()}


def farthest(one: dict, other: dict) -> float:
    """The largest difference between two sets of weights of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def token_mean(folder, rows):
    """The mean loss of what the assistant says, by transformers' own forward."""
    loaded = load(str(folder))
    total, count = 0.0, 0
    for ids, labels in Supervision(loaded.tokenizer, folder).encode([row["messages"] for row in rows]):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        said = torch.tensor(labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, said, ignore_index=IGNORE, reduction="sum"))
        count += int((said != IGNORE).sum())
    return total / count
