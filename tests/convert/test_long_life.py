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
from megatron_steel.convert import companions, names, shards
from megatron_steel.data.chat_template import TRAINING_FILE
from megatron_steel.data.prune_tokenizer import prune_tokenizer
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.modeling_steel import SteelForCausalLM
from megatron_steel.recipe import Model

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


SIZES = {"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 16}
HALF = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
FAMILIES = {
    "llama": {"rope_theta": 777.0, "num_key_value_heads": 2},
    "llama tied": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {"rope_theta": 777.0, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
              "max_window_layers": 1},
    "qwen2 tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": 777.0, "head_dim": 8, "num_key_value_heads": 2},
    "qwen3 tied": {"rope_parameters": YARN, "head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"rope_parameters": HALF},
    "gpt_neox tied": {"rope_parameters": HALF, "use_parallel_residual": False, "tie_word_embeddings": True},
    "granite": {"rope_theta": 777.0, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "granite tied": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "tie_word_embeddings": True},
    "steel": {"rope_theta": 777.0, "num_key_value_heads": 2},
    "steel tied": {"FFN_type": "softmoe_v1", "n_experts": 3, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Folders of every family with a trained tokenizer, and the logits of each model here."""
    root = tmp_path_factory.mktemp("families")
    text = "钢铁是怎样炼成的？The quick brown fox, 1984.\n\tdef f(x):\n"
    (root / "c.jsonl").write_text(json.dumps({"text": text * 50}) + "\n")
    train_tokenizer([root / "c.jsonl"], root / "tokenizer", 330)
    tokenizer, ids = load_tokenizer(root / "tokenizer"), torch.arange(3, 43).view(2, 20)
    for name, fields in FAMILIES.items():
        model_type, folder = name.split()[0], root / "models" / name.replace(" ", "-")
        folder.mkdir(parents=True)
        config = build_config(Model(type=model_type, config={**SIZES, **fields}))
        model, blueprint = build_model(config, 1).eval(), shards.blueprint_of(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            torch.save({"ids": ids, "logits": model(ids, use_cache=False).logits}, f"{folder}.pt")
        held = {key: value for key, value in model.state_dict().items() if key in blueprint.shapes}
        shapes = dict(names.published(model_type, blueprint.shapes.items()))
        shards.write_shards(
            names.published(model_type, held.items()), shapes, folder, dict.fromkeys(shapes, torch.float32), folder
        )
        companions.write_companions(folder, config, blueprint.architecture, "float32", tokenizer, root / "tokenizer")
    return root / "models"


STRANGER = """
import json, logging, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
said = []
log = logging.getLogger("transformers")
log.handlers, log.propagate = [logging.Handler()], False
log.handlers[0].emit = lambda record: said.append(record.getMessage())
log.setLevel(logging.WARNING)
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    known = torch.load(f"{folder}.pt")
    ids = known["ids"]
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        apart = float((model.eval()(ids, use_cache=False).logits - known["logits"]).abs().max())
    for how in ({}, {"do_sample": True}, {"do_sample": False}):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **how)
    model.save_pretrained(f"{sys.argv[2]}/{folder.name}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": "user", "content": "钢铁"}, {"role": "assistant", "content": " fox"}]
    marked = Path(folder, sys.argv[3]).read_text()
    masked = tokenizer.apply_chat_template(turns, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, mine in zip(masked["input_ids"], masked["assistant_masks"]) if mine]
    print(json.dumps({"name": folder.name, "apart": apart, "left": [len(report["missing_keys"]), len(report["unexpected_keys"])],
                      "said": said, "ends": model.generation_config.eos_token_id, "answer": tokenizer.decode(answer),
                      "same": tokenizer.apply_chat_template(turns, tokenize=False)
                      == tokenizer.apply_chat_template(turns, tokenize=False, chat_template=marked)}))
    said.clear()
"""


def test_every_family_is_the_same_model_there_and_nobody_complains(python, families, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{tmp_path}/m", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-I", "-c", STRANGER, str(families), str(tmp_path / "saved"), TRAINING_FILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == sorted(name.replace(" ", "-") for name in FAMILIES)
    for row in rows:
        assert row["apart"] <= 1e-5, row
        assert (row["left"], row["said"], row["ends"]) == ([0, 0], [], [2, 1]), row
        assert (row["answer"], row["same"]) == (" fox<|im_end|>", True), row
