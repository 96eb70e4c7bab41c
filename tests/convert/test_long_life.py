"""Exports live on without this package, in the oldest and the newest transformers that they promise: installed for the test.

`STEEL_TEST_ENVIRONMENTS` names a folder that keeps the environments (about 1.3 GB each); without it they are made anew.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_steel import cli
from megatron_steel.data.prune_tokenizer import prune_tokenizer
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.model.modeling_steel import SteelForCausalLM

pytestmark = pytest.mark.slow

KINDS = {
    "raw": {"FFN_type": "raw"}, "v1": {"FFN_type": "softmoe_v1"}, "v3": {"FFN_type": "softmoe_v3"},
    "prefix": {"FFN_type": "softmoe_causal", "causal_slots": "prefix"},
    "lagged": {"FFN_type": "softmoe_causal", "causal_slots": "lagged", "segment_length": 5},
}  # fmt: skip
CODE = ["configuration_steel.py", "experts_steel.py", "mixture_steel.py", "modeling_steel.py"]
OLDEST, NEWEST = "transformers==4.57.6", "transformers>=5,<6"


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny_recipe):
    """A folder of real exports, fp32, of models trained for a step from large weights, with what they give here."""
    root = tmp_path_factory.mktemp("long-life")
    for name, fields in KINDS.items():
        fields = {**fields, "n_experts": 3, "initializer_range": 0.2}
        words = [f"run.dir={root}/runs/{name}", "train.steps=1", "data.validation=null"]
        words += [f"model.config.{key}={value}" for key, value in fields.items()]
        assert cli.main(["pretrain", str(tiny_recipe), *words]) == 0
        assert cli.main(["export", f"{root}/runs/{name}", f"{root}/exports/{name}", "--dtype", "float32"]) == 0
        model = SteelForCausalLM.from_pretrained(root / "exports" / name).eval()
        ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            write = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
            torch.save({"ids": ids, "logits": model(ids, use_cache=False).logits, "text": model.generate(ids, **write),
                        "beams": model.generate(ids, num_beams=3, **write)}, root / "exports" / f"{name}.pt")  # fmt: skip
    return root / "exports"


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def python(request, tmp_path_factory):
    """The interpreter of an environment with torch and one transformers, and nothing of ours."""
    kept = os.environ.get("STEEL_TEST_ENVIRONMENTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("environments")
    folder = folder / ("oldest" if request.param == OLDEST else "newest")
    found = folder / "bin" / "python"
    if not found.is_file():
        venv.create(folder, with_pip=True, symlinks=True)
    torch_version = torch.__version__.partition("+")[0]
    install = [str(found), "-m", "pip", "install", "--quiet", "--upgrade", f"torch=={torch_version}", request.param]
    subprocess.run(install, check=True, timeout=1800, env={**os.environ, "PYTHONPATH": ""})
    return found


def test_exports_load_write_and_save_without_this_package(python, exports, tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": f"{tmp_path}/modules",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("load_elsewhere.py")
    done = subprocess.run(
        [str(python), "-I", str(script), str(exports)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == set(KINDS)
    for name, row in rows.items():
        print(row, file=sys.stderr)
        assert row["classes"] == ["SteelConfig", "SteelModel", "SteelForCausalLM"]
        assert row["foreign"], "the code in the folder was not the code that ran"
        assert row["left"] == [0, 0]
        for what in ("logits", "base", "eager", "saved"):
            assert row[what] <= 1e-5, (name, what)
        assert row["saved_files"] == CODE, name
        assert row["text"], name
        assert row["beams"], name
        if name != "v3":  # there each pass reads what earlier ones did not have
            assert row["cached"] <= 1e-5, name
            assert row["padded"], name


TOKENIZER = """
import json, sys
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = tokenizer.apply_chat_template([{"role": "user", "content": "钢铁"}], tokenize=False, add_generation_prompt=True)
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
print(json.dumps([ids, [tokenizer.decode(i) for i in ids], tokenizer.eos_token_id, chat]))
"""


def test_trained_and_pruned_tokenizers_give_the_same_ids(python, tmp_path):
    text = "钢铁是怎样炼成的？The quick brown fox, 1984.\n\tdef f(x):\n"
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text * 50}) + "\n")
    train_tokenizer([tmp_path / "c.jsonl"], tmp_path / "trained", 330)
    tokenize([tmp_path / "c.jsonl"], tmp_path / "trained", tmp_path / "c", workers=1)
    prune_tokenizer(tmp_path / "trained", [tmp_path / "c"], 310, tmp_path / "pruned")
    texts = [text, "<|im_start|>user\n𠮷野家<|im_end|>\n", "x  y"]
    for name in ("trained", "pruned"):
        ours, hf = load_tokenizer(tmp_path / name), AutoTokenizer.from_pretrained(tmp_path / name)
        chat = hf.apply_chat_template([{"role": "user", "content": "钢铁"}], tokenize=False, add_generation_prompt=True)
        done = subprocess.run([str(python), "-I", "-c", TOKENIZER, str(tmp_path / name), json.dumps(texts)],
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout) == [ours.encode_batch(texts), texts, ours.eos_id, chat]
