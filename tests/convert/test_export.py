"""An export is the trained model: logits equal those of the training engine, for every ZeRO stage, 1 and 2 ranks."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_runs import made
from conftest import VOCABULARY
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_steel import cli
from megatron_steel.checkpoint import commit
from megatron_steel.checkpoint.zero import stream_weights
from megatron_steel.convert import names, shards, sources, verify
from megatron_steel.convert.hf import export
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.errors import SteelError

TOLERANCE = 1e-5
STEEL = {"hidden_size": 32, "intermediate_size": 48, "mlp_div_ratio": 1, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
MIXTURE = {**STEEL, "FFN_type": "softmoe_v3", "mlp_type": "raw", "n_experts": 2}
NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# family: model type, configuration
FAMILIES = {"llama": ("llama", LLAMA), "qwen2": ("qwen2", LLAMA), "neox": ("gpt_neox", NEOX), "steel": ("steel", STEEL),
            "mixture": ("steel", {**MIXTURE, "FFN_type": "softmoe_v1"})}  # fmt: skip
# name: ranks, ZeRO stage, precision, model type, configuration, tied
CASES = {
    "steel-z0-1": (1, 0, "fp32", "steel", STEEL, True),
    "steel-z0-1-bf16": (1, 0, "bf16", "steel", STEEL, False),
    "llama-z1-1-bf16": (1, 1, "bf16", "llama", LLAMA, True),
    "llama-z2-1": (1, 2, "fp32", "llama", LLAMA, False),
    "steel-z3-1": (1, 3, "fp32", "steel", STEEL, True),
    "neox-z3-1": (1, 3, "fp32", "gpt_neox", NEOX, False),
    "llama-z0-2": (2, 0, "fp32", "llama", LLAMA, True),
    "steel-z1-2": (2, 1, "fp32", "steel", STEEL, True),
    "steel-z1-2-bf16": (2, 1, "bf16", "steel", STEEL, False),
    "steel-z2-2-bf16": (2, 2, "bf16", "steel", STEEL, False),
    "steel-z3-2": (2, 3, "fp32", "steel", STEEL, False),
    "llama-z3-2-bf16": (2, 3, "bf16", "llama", LLAMA, True),
    "mixture-z3-2": (2, 3, "fp32", "steel", MIXTURE, False),
    "neox-z1-2": (2, 1, "fp32", "gpt_neox", NEOX, True),
    "qwen2-z3-2": (2, 3, "fp32", "qwen2", LLAMA, True),
}
# Every family, tied and untied, ZeRO 1 and 3, 1 and 2 ranks.
GRID = {
    f"{family}-{'tied' if tied else 'untied'}-z{stage}-{ranks}": (ranks, stage, "fp32", model_type, config, tied)
    for family, (model_type, config) in FAMILIES.items() for tied in (True, False) for stage in (1, 3) for ranks in (1, 2)
}  # fmt: skip


def recipe_of_case(name: str, tokenizer: Path) -> dict:
    ranks, stage, precision, model_type, config, tied = (CASES | GRID)[name]
    save_every = 1 if name == "steel-z3-2" else 2  # one run with two checkpoints is enough
    return {
        "run": {"seed": 5},
        "tokenizer": {"path": str(tokenizer)},
        "model": {"type": model_type, "config": {**config, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}},
        "data": {"train": "made-up", "sequence_length": 16},
        "optim": {"lr": 1e-2},
        "train": {
            "steps": 2, "global_batch_size": 4, "micro_batch_size": 4 // ranks, "precision": precision,
            "save_every_steps": save_every,
        },
        "deepspeed": {"config": f"zero{stage}.json"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with one run folder a case, all made by the real engine."""
    return made("CASES", tmp_path_factory, tiny_tokenizer)


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tiny_tokenizer) -> Path:
    return made("GRID", tmp_path_factory, tiny_tokenizer)


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of one run, free to be damaged."""
    return Path(shutil.copytree(runs / "steel-z3-2", tmp_path / "run"))


@pytest.fixture(autouse=True)
def plain_linear(monkeypatch):
    """DeepSpeed replaces F.linear for good when ZeRO-3 starts in a process, here by another test's; in bf16 it rounds once more."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def _logits(folder: Path, precision: str) -> torch.Tensor:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=verify.fixed_tokens(VOCABULARY), use_cache=False).logits


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def _nothing_but(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_weights_equal_those_of_the_training_engine(name, runs, tmp_path):
    _, _, precision, model_type, _, tied = CASES[name]
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    folder = export(runs / name, tmp_path / "out", dtype)
    _require_trained(folder, runs / name, precision, tied)
    assert bool(list(folder.glob("*.py"))) == (model_type == "steel")
    config = json.loads((folder / "config.json").read_text())
    assert ("auto_map" in config) == (model_type == "steel")
    assert (config["model_type"], config["dtype"], config["torch_dtype"]) == (model_type, dtype, dtype)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (1, 0, None)
    assert _nothing_but(tmp_path, "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_every_family_is_verified(name, grid, tmp_path, capsys):
    folder = export(grid / name, tmp_path / "out", "float32", verify=True)
    assert "verified in a fresh process" in capsys.readouterr().out
    _require_trained(folder, grid / name, "fp32", GRID[name][-1])


def _require_trained(folder: Path, run: Path, precision: str, tied: bool) -> None:
    """Logits equal those of the training engine within 1e-5, and every weight is the engine's, rounded once."""
    trained = torch.load(run / "logits.pt").float()
    assert (_logits(folder, precision).float() - trained).abs().max() <= TOLERANCE
    assert trained.std() > 0.01
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    weights, found = dict(names.published(model_type, torch.load(run / "weights.pt").items())), _tensors(folder)
    assert set(weights) == set(found)
    assert any(name in found for name in ("lm_head.weight", "embed_out.weight")) == (not tied)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight.to(found[name].dtype)), name


@pytest.mark.parametrize(("name", "average"), [("steel-z3-2", 2), ("llama-z3-2-bf16", 1)])
def test_verify_in_a_fresh_process_prints_the_difference(name, average, runs, tmp_path, capsys):
    folder = export(runs / name, tmp_path / "out", "bfloat16", verify=True, average=average)
    assert "verified in a fresh process: logits differ by at most" in capsys.readouterr().out
    assert "differ by at most" in (folder / "README.md").read_text()


def test_a_folder_that_needs_this_package_or_holds_other_weights_is_refused(runs, tmp_path):
    folder = export(runs / "steel-z3-2", tmp_path / "out", "float32")
    checkpoint = runs / "steel-z3-2" / "checkpoints" / "step-00000002"
    with pytest.raises(SteelError, match="logits that differ by"):
        verify.verify_export(sources.find(checkpoint.with_name("step-00000001")), folder)
    code = folder / "modeling_steel.py"
    code.write_text(code.read_text() + "\nimport megatron_steel\n")
    with pytest.raises(SteelError, match=r"does not load in a fresh process: .*megatron_steel"):
        verify.verify_export(sources.find(checkpoint), folder)


def test_a_failed_verification_leaves_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)  # no two models are that equal
    with pytest.raises(SteelError, match="not the trained model"):
        export(runs / "steel-z3-2", tmp_path / "new" / "folder" / "out", verify=True)
    assert _nothing_but(tmp_path)


def test_shards_with_an_index_hold_the_same_model(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    folder = export(runs / "llama-z2-1", tmp_path / "out", "float32")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((folder / shards.INDEX).read_text())
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(_tensors(folder))
    assert set(index["weight_map"].values()) == set(files)
    assert all((folder / name).stat().st_size < 22_000 for name in files)
    trained = torch.load(runs / "llama-z2-1" / "logits.pt")
    assert (_logits(folder, "fp32") - trained).abs().max() <= TOLERANCE


def test_tokenizer_is_copied_byte_for_byte_and_works(runs, tmp_path, tiny_tokenizer):
    folder = export(runs / "steel-z3-1", tmp_path / "out")
    for file in tiny_tokenizer.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 0]


def test_card_says_what_the_model_is(run, runs, tmp_path):
    rows = [{"step": 1, "validation_loss": 4.5}, {"step": 2, "loss": 4.4}, {"step": 9, "validation_loss": 1.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2, "valid')
    card = (export(run, tmp_path / "causal") / "README.md").read_text()
    for fact in ("4.5000 nats per token at step 1", "2 steps, 128 tokens", "| made-up | 4,321 |", "license: choose"):
        assert fact in card
    assert "sees the future" not in card
    assert "loss sees the future" in (export(runs / "mixture-z3-2", tmp_path / "mixture") / "README.md").read_text()


def test_a_run_without_a_verdict_is_audited_first_and_one_with_it_is_not(runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs / "mixture-z3-2", tmp_path / "run"))
    loose = Path(shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "loose" / "kept"))
    before = sorted(run.iterdir())
    for source in (run, loose):
        out = tmp_path / f"of-{source.name}"
        assert cli.main(["export", str(source), str(out)]) == 0
        assert "has no audit.json: it is audited first" in capsys.readouterr().err
        report = json.loads((out / "audit.json").read_text())
        assert (report["causal"], report["leaks"][0]["what"]) == (False, "softmoe_v3")
    assert sorted(run.iterdir()) == before
    (run / "audit.json").write_text(json.dumps({"causal": False, "verdict": "as the run found it"}))
    assert cli.main(["export", str(run), str(tmp_path / "again")]) == 0
    assert "audited" not in capsys.readouterr().err
    assert json.loads((tmp_path / "again" / "audit.json").read_text())["verdict"] == "as the run found it"


@pytest.mark.parametrize("used", ["a file in it", "a file in its place"])
def test_a_used_output_is_refused_and_untouched(used, runs, tmp_path):
    out = tmp_path / "out"
    kept = out / "thesis.txt" if used == "a file in it" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(SteelError, match="never overwritten"):
        export(runs / "steel-z3-2", out)
    assert kept.read_text() == "precious"
    assert _nothing_but(tmp_path, "out")


def test_an_empty_output_is_taken(runs, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(runs / "steel-z3-2", tmp_path / "out") / "model.safetensors").stat().st_size > 1000
    assert _nothing_but(tmp_path, "out")


def flip(file: Path, keep: str, number: int = 0) -> None:
    """Change one bit in the middle of a ZeRO-3 rank's weights (`fp32_flat_groups`) or of a moment."""
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    state = state if keep == "fp32_flat_groups" else state["optimizer_state_dict"]["state"][0]
    tensor = state[keep][number] if keep == "fp32_flat_groups" else state[keep]
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    content = bytearray(file.read_bytes())
    at = content.index(raw) + len(raw) // 2
    content[at] ^= 1
    file.write_bytes(content)


def test_damage_in_what_no_export_reads_does_not_stop_it_and_stops_a_resume(run, tmp_path):
    newest = run / "checkpoints" / "step-00000002"
    before = export(run, tmp_path / "before")
    flip(next((newest / "engine").glob("*rank_1*optim_states.pt")), "exp_avg")
    after = export(run, tmp_path / "after")
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    with pytest.raises(SteelError, match="has changed"):
        commit.verify(newest)


@pytest.mark.parametrize("record", ["data.pkl", "version"])
def test_damage_in_what_holds_the_tensors_together_is_named(record, run, tmp_path):
    newest = run / "checkpoints" / "step-00000002"
    file = next((newest / "engine").glob("*rank_1*optim_states.pt"))
    with zipfile.ZipFile(file) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(record))
        raw = archive.read(entry)
    content = bytearray(file.read_bytes())
    content[content.index(raw, entry.header_offset) + len(raw) - 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SteelError, match=rf"the content of engine/{file.name} has changed"):
        export(newest, tmp_path / "out")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, tmp_path, caplog):
    newest = run / "checkpoints" / "step-00000002"
    file = next((newest / "engine").glob("*optim_states.pt"))
    flip(file, "fp32_flat_groups")
    with caplog.at_level("WARNING", logger="megatron_steel"):
        export(run, tmp_path / "out")
    assert f"the content of engine/{file.name} has changed" in caplog.text
    assert "| training | 1 steps, 64 tokens |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SteelError, match="has changed"):
        export(newest, tmp_path / "other")
    shutil.rmtree(newest.with_name("step-00000001"))
    with pytest.raises(SteelError, match="none of its 1 checkpoints is whole"):
        export(run, tmp_path / "other")
    assert _nothing_but(tmp_path, "out", "run")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_hidden_layers", 3, r"lacks model\.layers\.2\..* and \d+ more"),
        ("num_hidden_layers", 1, r"holds model\.layers\.1\.\S+ \(.*which the model does not have"),
        ("intermediate_size", 32, r"holds model\.layers\.0\.mlp\.\S+ as \(48, 32\), the model has \(32, 32\)"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_named(field, value, named, run, tmp_path):
    manifest = run / "checkpoints" / "step-00000002" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["recipe"]["model"]["config"][field] = value
    manifest.write_text(json.dumps(commit.sealed(tree)))
    with pytest.raises(SteelError, match=named):
        export(run, tmp_path / "out")
    assert _nothing_but(tmp_path, "run")


def test_what_is_no_run_what_has_no_checkpoint_and_what_cannot_be_written(run, tmp_path):
    with pytest.raises(SteelError, match="no run folder and no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SteelError, match="there is no dtype 'int8'"):
        export(run, tmp_path / "out", "int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(SteelError, match="the export could not be written: Not a directory"):
        export(run, tmp_path / "file" / "out")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(SteelError, match="holds no checkpoint yet"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize(("value", "why"), [(1e6, "float16 cannot hold"), (float("nan"), "not finite")])
def test_numbers_that_do_not_fit_are_named(value, why, tmp_path):
    weights = [("head.weight", torch.full((2, 2), value))]
    with pytest.raises(SteelError, match=rf"head\.weight .*{why}"):
        shards.write_shards(weights, {"head.weight": (2, 2)}, tmp_path, {"head.weight": torch.float16}, tmp_path)


def _steps(run: Path, steps: list[int]) -> list[dict[str, torch.Tensor]]:
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in steps]
    return [dict(stream_weights(folder)) for folder in folders]


def test_average_is_the_mean_of_the_last_whole_checkpoints(run, tmp_path, capsys):
    out = export(run, tmp_path / "out", "float32", average=2)
    assert "SteelForCausalLM of the mean of steps 1, 2" in capsys.readouterr().out
    first, second = _steps(run, [1, 2])
    for name, tensor in _tensors(out).items():
        assert torch.equal(tensor, ((first[name].double() + second[name].double()) / 2).float()), name
        assert not torch.equal(tensor, second[name]) or torch.equal(first[name], second[name])
    assert "| weights | uniform mean of steps 1, 2 |" in (out / "README.md").read_text()
    single = export(run, tmp_path / "single", "float32")
    assert (export(run, tmp_path / "one", "float32", average=1) / "model.safetensors").read_bytes() == (
        single / "model.safetensors"
    ).read_bytes()


def test_an_average_that_cannot_be_is_refused(run, tmp_path):
    checkpoints = run / "checkpoints"
    for average, source, match in (
        (3, run, r"the mean of 3 checkpoints is asked, and 2 are whole \(steps 1, 2\)"),
        (2, checkpoints / "step-00000002", "needs a run folder"),
        (0, run, "no mean of 0"),
    ):
        with pytest.raises(SteelError, match=match):
            export(source, tmp_path / "out", average=average)
    manifest = checkpoints / "step-00000001" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["recipe"]["model"]["config"]["rope_theta"] = 77.0
    manifest.write_text(json.dumps(commit.sealed(tree)))
    with pytest.raises(SteelError, match="steps 1 and 2 are not of the same model"):
        export(run, tmp_path / "out", average=2)
    next((checkpoints / "step-00000001" / "engine").glob("*.pt")).unlink()
    with pytest.raises(SteelError, match=r"and 1 are whole \(steps 2\)"):
        export(run, tmp_path / "out", average=2)
    with pytest.raises(SteelError, match="knows its model by itself"):
        export(run, tmp_path / "out", model=tmp_path)
    assert _nothing_but(tmp_path, "run")


@pytest.mark.parametrize("name", ["steel-z3-2", "neox-z1-2"])
def test_export_import_export_is_byte_equal(name, runs, tiny_recipe, tmp_path):
    """An export is imported, a run starts from it and saves after one step at learning rate 0 (which changes no weight), and
    is exported again: weight files, config.json, generation_config.json, code and the tokenizer's files are the same bytes.
    (README.md and audit.json tell of the run, which is another.)"""
    first = export(runs / name, tmp_path / "first", "float32")
    start = import_hf(first, tmp_path / "imported")
    words = [f"run.dir={tmp_path}/run", f"model.path={start}", f"model.init_from={start}", f"tokenizer.path={start}",
             "train.steps=1", "train.save_every_steps=1", "schedule.warmup_steps=0", "schedule.min_lr_ratio=0",
             "data.validation=null"]  # fmt: skip
    assert cli.main(["pretrain", str(tiny_recipe), *words]) == 0
    second = export(tmp_path / "run", tmp_path / "second", "float32")
    names = {file.name for file in first.iterdir()} | {file.name for file in second.iterdir()}
    compared = sorted(names - {"README.md", "audit.json", "SHA256SUMS"})
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(compared)
    for file in compared:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
