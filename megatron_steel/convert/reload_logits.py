"""Run as a script by `verify`, alone: load an exported folder as a stranger would and write its logits.

    python -I reload_logits.py FOLDER RESULT.safetensors TOKENS_AS_JSON trust|native

Imports transformers and nothing of this package, which it makes impossible to import.
"""

import json
import sys
from typing import Any


class _NotHere:
    """First on the import path: an installed `megatron_steel` does not exist for this process."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "megatron_steel":
            raise ModuleNotFoundError(f"No module named {name!r} (an export must load without it)")
        return None


def main(folder: str, result: str, tokens: str, code: str) -> None:
    sys.meta_path.insert(0, _NotHere)  # type: ignore[arg-type]
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: Any = {"trust_remote_code": code == "trust", "local_files_only": True}
    two_sided = AutoConfig.from_pretrained(folder, **settings).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **settings)
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise SystemExit(f"{kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:4]}")
    ids = torch.tensor(json.loads(tokens))
    more = {"decoder_input_ids": ids} if two_sided else {}  # both sides get the same tokens
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False, **more).logits
    save_file({"logits": logits.float().contiguous()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
