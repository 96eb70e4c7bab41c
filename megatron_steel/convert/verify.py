"""Proof that an export is the trained model: equal logits, computed by a process that does not know this package.

1. A few fixed token sequences are drawn, from the vocabulary size and a fixed seed.
2. A fresh interpreter in which `megatron_steel` cannot be imported loads the folder with transformers, in fp32.
3. Here the model is built from its configuration and filled from the source, each number rounded as in the export.
4. The logits may differ by 1e-5.

Both sides run on the CPU, one after the other: memory is that of one fp32 model.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_steel.convert.shards import converted
from megatron_steel.convert.sources import Trained
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_model
from megatron_steel.model.text_to_text import is_text_to_text

TOLERANCE = 1e-5
"""Largest absolute difference of two fp32 logits."""
_SEQUENCES, _LENGTH, _SEED = 3, 32, 20240917
_RELOAD = Path(__file__).with_name("reload_logits.py")


def verify_export(trained: Trained, folder: Path) -> float:
    """Compare an exported folder with the weights it came from, and print the largest difference of logits.

    Args:
        trained: the export's source, whatever its kind.
        folder: the Hugging Face folder.

    Returns: the largest absolute difference, in fp32.
    Raises:
        SteelError: the folder does not load without this package, lacks tensors, or its logits differ.
    """
    exported = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids_BT = fixed_tokens(exported["vocab_size"])
    reloaded_BTV = _reloaded_logits(folder, ids_BT, "auto_map" in exported)
    # An export without padding rows has fewer; those that it has must be the first.
    trained_BTV = _trained_logits(trained, exported["dtype"], ids_BT)[..., : exported["vocab_size"]]
    if reloaded_BTV.shape != trained_BTV.shape:
        shapes = tuple(reloaded_BTV.shape), tuple(trained_BTV.shape)
        raise _differs(f"logits of shape {shapes[0]} instead of {shapes[1]}", folder)
    difference = float((reloaded_BTV - trained_BTV).abs().max())
    if not difference <= TOLERANCE:  # NaN is a difference too
        raise _differs(f"logits that differ by {difference:.3g} (allowed: {TOLERANCE:g})", folder)
    print(
        f"verified in a fresh process: logits differ by at most {difference:.3g} from those of the trained weights in "
        f"{exported['dtype']} (allowed: {TOLERANCE:g})"
    )
    return difference


def fixed_tokens(vocab_size: int) -> torch.Tensor:
    """[3, 32] int64 token ids, the same for every call with one vocabulary size."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocab_size, (_SEQUENCES, _LENGTH), generator=generator)


def _reloaded_logits(folder: Path, ids_BT: torch.Tensor, own_code: bool) -> torch.Tensor:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "logits.safetensors"
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",  # both sides on the CPU
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{scratch}/modules",  # never an older copy of the code
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-I", str(_RELOAD), str(folder), str(result), json.dumps(ids_BT.tolist())]
        done = subprocess.run(
            [*command, "trust" if own_code else "native"],
            cwd=scratch, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise SteelError(f"the export does not load in a fresh process: {last}", folder,
                             "use the transformers version that trained it; if that is so, report this")  # fmt: skip
        return load_file(str(result))["logits"]


def _trained_logits(trained: Trained, dtype: str, ids_BT: torch.Tensor) -> torch.Tensor:
    model = build_model(trained.config, seed=0).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, weight in trained.weights():
            whole, at = state[name], 0
            rounded = getattr(torch, dtype) if whole.is_floating_point() else whole.dtype
            for piece in converted(name, weight.pieces, rounded, trained.checkpoint.path):
                whole.view(-1)[at : at + piece.numel()].copy_(piece)
                at += piece.numel()
        more = {"decoder_input_ids": ids_BT} if is_text_to_text(model.config) else {}
        return model(input_ids=ids_BT, use_cache=False, **more).logits


def _differs(how: str, folder: Path) -> SteelError:
    return SteelError(f"the export is not the trained model: it gives {how}", folder,
                      "do not use it; use the transformers version that trained the model, or report this")  # fmt: skip
