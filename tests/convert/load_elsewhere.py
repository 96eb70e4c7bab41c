"""What a stranger does with exports, run in an environment of its own: load_elsewhere.py FOLDER. One JSON line a model.

`FOLDER/NAME` are exports, `FOLDER/NAME.pt` what they gave where they were made.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

root = Path(sys.argv[1])
assert importlib.util.find_spec("megatron_steel") is None, "the package must not be within reach"
TRUST = {"trust_remote_code": True, "local_files_only": True}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


@torch.no_grad()
def by_cache(model, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, float]:
    """Greedy text of 9 tokens through `generate`, and how far its logits are from those of one full pass."""
    out = model.generate(
        ids,
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **inputs,
    )
    assert out.sequences.shape[1] == ids.shape[1] + 9
    mask = torch.cat((inputs.get("attention_mask", torch.ones_like(ids)), torch.ones(len(ids), 9, dtype=ids.dtype)), 1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(out.sequences, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    return out.sequences, apart(torch.stack(out.logits, 1), full[:, ids.shape[1] - 1 : -1])


for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    known = torch.load(root / f"{folder.name}.pt", weights_only=True)
    ids, pad = known["ids"], 4
    config = AutoConfig.from_pretrained(folder, **TRUST)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **TRUST)
    model.eval()
    base = AutoModel.from_pretrained(folder, **TRUST).eval()
    again = root.parent / f"saved-{transformers.__version__.replace('.', '_')}" / folder.name.replace("-", "_")
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, **TRUST).eval()
    text, cached = by_cache(model, ids)
    padded = torch.cat((torch.zeros(len(ids), pad, dtype=ids.dtype), ids), 1)
    mask = (torch.arange(padded.shape[1]) >= pad).long().expand(len(ids), -1)
    padded_text, _ = by_cache(model, padded, attention_mask=mask)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        beams = model.generate(ids, max_new_tokens=9, do_sample=False, num_beams=3, pad_token_id=0)
        eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **TRUST).eval()
        print(json.dumps({
            "name": folder.name, "transformers": transformers.__version__,
            "classes": [type(x).__name__ for x in (config, base, model)],
            "foreign": all(type(x).__module__.startswith("transformers_modules.") for x in (config, base, model, reloaded)),
            "left": [len(report["missing_keys"]), len(report["unexpected_keys"])],
            "logits": apart(logits, known["logits"]),
            "base": apart(model.lm_head(base(ids, use_cache=False).last_hidden_state), known["logits"]),
            "eager": apart(eager(ids, use_cache=False).logits, known["logits"]),
            "saved": apart(reloaded(ids, use_cache=False).logits, known["logits"]),
            "saved_files": sorted(p.name for p in again.glob("*.py")),
            "cached": cached,
            "text": torch.equal(text, known["text"]), "beams": torch.equal(beams, known["beams"]),
            "padded": torch.equal(padded_text[:, pad:], text),
        }), flush=True)  # fmt: skip
