"""An export is fit to be published: a card that hubs read and that says what is known, a list of sums, no row too many."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCABULARY
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_steel import cli, preflight
from megatron_steel.checkpoint import commit
from megatron_steel.checkpoint.commit import Checkpoint
from megatron_steel.convert import card, card_facts, names, padding, shards
from megatron_steel.convert.hf import export
from megatron_steel.convert.upload import upload_commands
from megatron_steel.data.checksums import SUMS, write_checksums
from megatron_steel.data.segments import Member
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config
from megatron_steel.recipe import Model, from_dict

ROWS = 160  # VOCABULARY of them are tokens
SIZES = {"vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, tiny_data) -> Path:
    """A real run of two steps and two data sets; of the family whose head has another name in files."""
    root = tmp_path_factory.mktemp("publish")
    for suffix in (".bin", ".idx"):
        shutil.copyfile(tiny_data / f"train{suffix}", root / f"more{suffix}")
    tree = yaml.safe_load(tiny_recipe.read_text())
    tree["model"] = {"type": "gpt_neox", "config": SIZES}
    tree["data"]["train"] = [
        {"prefix": str(tiny_data / "train"), "weight": 3},
        {"prefix": str(root / "more"), "weight": 1},
    ]
    tree["data"]["validation"] = str(tiny_data / "validation")
    with (root / "more.bin").open("r+b") as stream:  # other data
        stream.write(b"\x63\0")
    tree["train"] |= {"steps": 3, "save_every_steps": 2, "eval_every_steps": 2}
    tree["deepspeed"]["config"] = "zero1.json"
    (root / "r.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["pretrain", str(root / "r.yaml"), f"run.dir={root}/my-run"]) == 0
    return root / "my-run"


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    return export(run / "checkpoints" / "step-00000002", tmp_path_factory.mktemp("whole") / "my model", "float32")


def sums_are_right(folder: Path) -> bool:
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, capture_output=True, text=True)
    listed = [line.rpartition(":")[0].lstrip("\\") for line in done.stdout.splitlines()]
    there = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / SUMS]
    assert sorted(listed) == sorted(there)
    return done.returncode == 0


def test_the_card_says_what_is_known_and_hubs_can_read_it(run, whole):
    text = (whole / "README.md").read_text()
    read = ModelCard.load(whole / "README.md")
    assert read.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["loss"] for row in metrics if row["step"] == 2 and "loss" in row)
    held_out = next(row["validation_loss"] for row in metrics if row["step"] == 2 and "validation_loss" in row)
    seconds = sum(row["seconds_step"] for row in metrics if "loss" in row and row["step"] <= 2)
    total = sum(tensor.numel() for tensor in load_file(whole / "model.safetensors").values())
    for fact in (
        "# my model", "Pretrained from scratch with megatron_steel 0.", "| architecture | `gpt_neox` |",
        f"| parameters | {total:,}, of which {total - 2 * ROWS * 16:,} are neither", "(float32) |",
        f"| padding | rows {VOCABULARY}..{ROWS - 1} of the vocabulary belong to no token |",
        "| training | 2 steps, 512 tokens |", "| the run's length | 3 steps: this is a checkpoint from its middle |",
        "8 sequences of 32 tokens (256 tokens a step)", "adamw, betas 0.9 and 0.95, eps 1e-08, weight decay 0.1 on matrices",
        "peak 0.01, cosine, 2 warm-up steps, 10% of the peak at the end", "| precision | fp32 |",
        "DeepSpeed ZeRO stage 1, world size 1", f"{512 / seconds:,.0f} tokens a second on average",
        "| train | 11,", "| 3 | 75.00% |", "| 1 | 25.00% |", "Held out for validation: validation.",
        f"| training loss | {loss:.4f} nats per token at step 2 (one batch) |",
        f"| validation loss | {held_out:.4f} nats per token at step 2 (perplexity {2.718281828459045 ** held_out:,.2f}) |",
        "| audit | causal: yes |", "model.path='my model' model.init_from='my model'",
        "megatron-steel export runs/my-run/checkpoints/step-00000002 'my model' --dtype float32\n",
        "trained on sequences of 32 tokens; the 64 of its configuration", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert fact in text, fact
    for unknown in ("None", "unknown", str(run.parent), "language:", "base_model", "--chat"):
        assert unknown not in text


def test_the_python_in_the_card_runs(whole, capsys):
    code = (whole / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {str(whole)!r}").replace("max_new_tokens=64", "max_new_tokens=2"), {})
    assert capsys.readouterr().out.strip()


def test_sha256sum_checks_every_file_and_finds_a_changed_one(whole, tmp_path):
    assert sums_are_right(whole)
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert not sums_are_right(folder)


def test_sums_of_odd_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a\\b\nc", "sub/钢 铁", " x"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("OK")) == (0, 3)


def test_padding_rows_are_cut_and_the_others_give_the_same_logits(run, whole, tmp_path, capsys):
    folder = export(run / "checkpoints" / "step-00000002", tmp_path / "cut", "float32", verify=True, cut_padding=True,
                    license_id="apache-2.0")  # fmt: skip
    said = capsys.readouterr().out
    assert "logits differ by at most 0 " in said
    assert "--cut-padding" not in said
    before, after = load_file(whole / "model.safetensors"), load_file(folder / "model.safetensors")
    vocabulary = {"gpt_neox.embed_in.weight", "embed_out.weight"}
    assert set(before) == set(after) >= vocabulary
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor[:VOCABULARY] if name in vocabulary else tensor), name
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        large, small = (AutoModelForCausalLM.from_pretrained(f)(ids, use_cache=False).logits for f in (whole, folder))
    assert small.shape[-1] == VOCABULARY
    assert (large[..., :VOCABULARY] - small).abs().max() <= 1e-6
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "apache-2.0"
    assert "32 rows that belonged to no token were cut off" in text
    assert "--dtype float32 --verify --cut-padding --license apache-2.0" in text
    assert sums_are_right(folder)


def test_it_ends_with_the_commands_to_publish(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"rows {VOCABULARY}..{ROWS - 1} of the vocabulary belong to no token" in said
    for line in ("choose a licence", f"hf upload ORG/out {tmp_path}/out", f"modelscope upload ORG/out {tmp_path}/out"):
        assert line in said
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), "upload", "--help"], capture_output=True, text=True
    )
    assert "REPO_ID [LOCAL_PATH]" in shown.stdout
    said = upload_commands("我的 model", licensed=True)
    assert "hf upload ORG/model '我的 model'" in said
    assert "choose" not in said


@pytest.mark.parametrize(
    ("folder", "name"),
    [("我的模型", "NAME"), ("我的-7b", "7b"), ("-lead", "lead"), ("trail-", "trail"), ("a--b", "a-b"), ("a..b", "a-b"), ("a-.b", "a-b"),
     (".hidden", "hidden"), ("x.git", "x"), ("a" * 95 + "-b", "a" * 95), ("zh 1.5b_v2", "zh-1.5b_v2")],
)  # fmt: skip
def test_the_hub_takes_the_name_of_the_repository(folder, name):
    said = upload_commands(f"out/{folder}", licensed=True)
    assert f"hf upload ORG/{name} " in said
    validate_repo_id(f"ORG/{name}")


@pytest.fixture
def moved(run, tmp_path) -> Path:
    """A checkpoint as on another machine: its recipe's tokenizer is not here."""
    step = Path(shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "step-00000002"))
    tree = json.loads((step / "manifest.json").read_text())
    tree["recipe"]["tokenizer"]["path"] = "not/here"
    (step / "manifest.json").write_text(json.dumps(commit.sealed(tree)))
    return step


def test_a_run_is_exported_where_its_tokenizer_lies_elsewhere(moved, whole, tmp_path, tiny_tokenizer):
    with pytest.raises(SteelError, match="is not there") as error:
        export(moved, tmp_path / "out", "float32")
    assert "--tokenizer DIR_OR_MODEL" in str(error.value)
    out = tmp_path / "out"
    command = ["export", str(moved), str(out), "--dtype", "float32", "--tokenizer", str(whole)]  # beside a config.json
    assert cli.main(command) == 0
    for file in ("model.safetensors", "config.json", *(file.name for file in tiny_tokenizer.iterdir())):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def test_another_tokenizer_is_refused(moved, tmp_path, tiny_tokenizer):
    other = Path(shutil.copytree(tiny_tokenizer, tmp_path / "other"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"v5"'))
    for place, what in ((other, "another tokenizer than the run was trained with"), (tmp_path, "holds no tokenizer"),
                        (tmp_path / "nothing", "no such tokenizer")):  # fmt: skip
        with pytest.raises(SteelError, match=what) as error:
            export(moved, tmp_path / "out", tokenizer=place)
        assert str(place) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Apache 2.0", "MIT", "", "a: b", "x\n"])
def test_a_licence_that_no_hub_knows_is_refused_first(name, tmp_path):
    with pytest.raises(SteelError, match="no licence as the hubs name them"):
        export(tmp_path / "nothing", tmp_path / "out", license_id=name)


@pytest.mark.parametrize(
    ("kind", "tied", "cut"),
    [
        ("llama", True, {"model.embed_tokens.weight"}),
        ("llama", False, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("phi", False, {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}),
        ("steel", False, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt2", True, {"transformer.wte.weight"}),
    ],
)
def test_what_is_cut_in_each_kind_of_model(kind, tied, cut, tiny_tokenizer):
    sizes = {k: v for k, v in SIZES.items() if kind != "gpt2" or k == "vocab_size"}
    config = build_config(Model(type=kind, config={**sizes, "tie_word_embeddings": tied}))
    tokenizer = load_tokenizer(tiny_tokenizer)
    smaller = padding.without_padding(config, tokenizer)
    before, after = shards.blueprint_of(config).shapes, shards.blueprint_of(smaller).shapes
    padding.require_cuttable(before, after)
    assert {name for name in before if before[name] != after[name]} == cut
    assert all(after[name] == (VOCABULARY, *before[name][1:]) for name in cut)
    assert padding.padding_rows(config, tokenizer) == range(VOCABULARY, ROWS)
    assert not padding.padding_rows(smaller, tokenizer)
    assert config.vocab_size == ROWS
    assert [i for i in (smaller.bos_token_id, smaller.eos_token_id) if i is not None and i >= VOCABULARY] == []


def test_what_cannot_be_cut_is_named(tiny_tokenizer):
    config = build_config(Model(type="llama", config={**SIZES, "vocab_size": VOCABULARY - 1}))
    with pytest.raises(SteelError, match="nobody knows the tokenizer"):
        padding.without_padding(config, None)
    with pytest.raises(SteelError, match="has 128 tokens and the model 127 rows"):
        padding.without_padding(config, load_tokenizer(tiny_tokenizer))
    for whole, cut in (({"a": (4, 2)}, {"a": (4, 1)}), ({"a": (4, 2)}, {"b": (4, 2)}), ({"a": (4, 2)}, {"a": (5, 2)})):
        with pytest.raises(SteelError, match="vocabulary is more than rows: a"):
            padding.require_cuttable(whole, cut)


def test_files_of_gpt_neox_have_the_name_that_all_others_know(whole):
    exported = load_file(whole / "model.safetensors")
    assert "embed_out.weight" in exported
    assert "lm_head.weight" not in exported
    pairs = [("lm_head.weight", 1), ("x", 2)]
    assert list(names.published("gpt_neox", pairs)) == [("embed_out.weight", 1), ("x", 2)]
    assert list(names.published("llama", pairs)) == pairs


RECIPE = from_dict({
    "tokenizer": {"path": "/home/me/tok"}, "model": {"type": "llama"}, "run": {"dir": "/home/me/runs/r"},
    "data": {"train": "/home/me/x", "sequence_length": 8}, "optim": {"lr": 1e-3},
    "train": {"tokens": 10**9, "global_batch_size": 4, "micro_batch_size": 1},
}).to_dict()  # fmt: skip


def a_card(tmp_path, manifest, report=None, metrics=(), dtype="bfloat16", **model):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-9").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 1, "lo')
    if report:
        (tmp_path / "audit.json").write_text(json.dumps(report))
    (tmp_path / "config.json").write_text("{}")
    config = build_config(Model(type="llama", config={**SIZES, **model}))
    made = card.Made(config, shards.blueprint_of(config).shapes, dtype, None, range(0), 0, None, None)
    card.write_card(tmp_path, "m", Checkpoint(run / "checkpoints" / "step-9", {"step": 9, **manifest}), made)
    text = (tmp_path / "README.md").read_text()
    ModelCard(text)
    return text


def test_a_card_of_almost_nothing_invents_nothing(tmp_path):
    text = a_card(tmp_path, {})
    for word in (
        "None",
        "## Its data",
        "scratch",
        "tokens |",
        "| time",
        "megatron-steel pretrain",
        "perplexity",
        "Trained with",
    ):
        assert word not in text
    assert "from a checkpoint of another trainer" in text
    assert "| training | 9 steps |" in text
    assert "| validation loss | not measured |" in text


def test_a_loss_that_sees_the_future_has_no_perplexity_and_an_honest_one_is_told(tmp_path):
    report = {"causal": False, "verdict": "NOT CAUSAL: x | y", "loss": {"prefix_only": 5.25, "data": "/home/me/d"}}
    rows = [{"step": 9, "validation_loss": 2.0}, {"step": 10, "validation_loss": 1.0}, {"step": 9, "loss": 1.0}]
    text = a_card(tmp_path, {"recipe": RECIPE}, report, rows, tie_word_embeddings=True)
    assert "loss sees the future" in text
    assert "| validation loss | 2.0000 nats per token at step 9 |" in text
    assert "5.2500 nats per token on d |" in text
    assert "/home/me" not in text
    assert r"NOT CAUSAL: x \| y" in text
    assert "| time" not in text  # no line says how long a step took


def test_the_mean_of_checkpoints_says_whose_losses_these_are(tmp_path):
    text = a_card(tmp_path, {"recipe": RECIPE, "averaged_steps": [8, 9]}, None, [{"step": 9, "loss": 2.0}])
    assert "that of the mean is not measured" in text
    assert "megatron-steel export runs/r m --average 2 --dtype bfloat16" in text


def test_metrics_that_lie_beside_another_trainers_checkpoint_are_not_its(tmp_path):
    assert "training loss" not in a_card(tmp_path, {}, None, [{"step": 9, "loss": 2.0}])


def test_a_mixture_names_what_a_token_passes():
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = build_config(Model(type="mixtral", config=sizes))
    shapes = shards.blueprint_of(config).shapes
    rows = dict(card_facts.architecture(config, shapes, "bfloat16"))
    experts = 3 * 4 * 16 * 24
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert f"{total:,}, of which" in rows["parameters"]
    assert f"{total - experts // 2:,} are active for a token" in rows["parameters"]


@pytest.mark.parametrize(
    ("start", "base"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/c/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B"),
        ("runs/mine", None), ("/data/llama", None), ("../llama", None), ("a/b/c", None), ("~/llama", None),
    ],
)  # fmt: skip
def test_the_base_model_is_named_where_the_hub_knows_it(start, base, tmp_path, run):
    manifest = json.loads(next((run / "checkpoints").glob("step-*/manifest.json")).read_text())
    manifest["recipe"]["model"]["init_from"] = start
    text = a_card(tmp_path, manifest)
    assert ModelCard(text).data.base_model == base
    assert f"Trained further from `{base or Path(start).name}` with" in text


def test_a_length_that_changed_gives_no_shares():
    assert card_facts.data_sets({"data": [{"name": "a", "tokens": 10, "digest": "x"}], "order": {"segments": []}}) == [
        ("a", "10", "", "")
    ]


def test_data_sets_of_one_name_keep_their_own_weights_and_are_told_apart():
    sets = [{"prefix": f"/d/{place}", "name": "train", "tokens": 10} for place in ("zh/train", "en/train")]
    other = {"prefix": "/d/code", "name": "code", "tokens": 10}
    given = [{"prefix": "/d/zh/train", "weight": 3}, {"prefix": "/d/en/train", "weight": 1}, {"prefix": "/d/code"}]
    manifest = {"data": [*sets, other], "recipe": {"data": {"train": given, "validation": [*given[:2]]}}}
    rows = card_facts.data_sets(manifest)
    assert [(name, weight) for name, _, weight, _ in rows] == [("zh/train", "3"), ("en/train", "1"), ("code", "")]
    assert card_facts.validation_sets(manifest) == "zh/train, en/train"
    for entry in (*sets, other):  # as older checkpoints
        del entry["prefix"]
    assert [row[2] for row in card_facts.data_sets(manifest)] == ["", "", ""]


@pytest.mark.parametrize(
    ("given", "length"),
    [({"steps": 3}, 3), ({"tokens": 257}, 2), ({"tokens": 513}, 3), ({"epochs": 2.0}, None), ({"epochs": 0.001}, 2)],
    ids=str,
)
def test_the_runs_length_is_told_however_it_was_given(given, length, run):
    manifest = json.loads((run / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    manifest["recipe"]["train"] |= {"steps": None, "tokens": None, "epochs": None, **given}
    # The arithmetic is preflight's, which no room of this layer can import.
    recipe = from_dict(manifest["recipe"])
    members = [Member(e["prefix"], e["digest"], e["tokens"], None) for e in manifest["data"]]
    wanted = preflight.total_steps(recipe, members, Checkpoint(run, manifest))
    assert length in (None, wanted)
    told = dict(card_facts.training(manifest, [])).get("the run's length")
    assert told == (f"{wanted:,} steps: this is a checkpoint from its middle" if wanted > 2 else None)
