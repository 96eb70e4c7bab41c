"""An imported model is the published one: every tensor equal, nothing missing, nothing extra, and training starts from it."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import VOCABULARY
from safetensors.torch import load_file, save_file

from megatron_steel import cli
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.configuration_steel import FFN_TYPES, MLP_TYPES, SteelConfig
from megatron_steel.model.own import OWN
from megatron_steel.recipe import Model

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "mlp_div_ratio": 2, "n_experts": 3,
         "slots_per_expert": 2, "rope_theta": 1e6}  # fmt: skip
PUBLISHED = {
    "architectures": ["SteelForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 64,
    "max_window_layers": 21, "rms_norm_eps": 1e-6, "sliding_window": 64, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.37.0", "use_cache": True, "use_sliding_window": False,
    "_attn_implementation": "sdpa",
}  # fmt: skip
FORMS = ("model.safetensors", "sharded safetensors", "pytorch_model.bin", "sharded bin")


def publish(folder, form=FORMS[0], dtype=torch.bfloat16, config=None, **fields):
    """A folder as the original publishes it, with random weights; returns them and the model that has them."""
    folder.mkdir(parents=True)
    fields = {**SIZES, "FFN_type": "softmoe_v3", "mlp_type": "senet", **fields}
    model = build_model(SteelConfig(**fields, max_position_embeddings=64), 4)
    tied = fields.get("tie_word_embeddings", False)
    tensors = {name: t.to(dtype) for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    write(folder, form, tensors)
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields, **(config or {})}))
    return tensors, model


def write(folder, form, tensors):
    parts = [tensors]
    if form.startswith("sharded"):
        names = sorted(tensors)
        parts = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    suffix, stem = ("bin", "pytorch_model") if "bin" in form else ("safetensors", "model")
    files = [f"{stem}.{suffix}"] if len(parts) == 1 else [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file) if suffix == "bin" else save_file(part, folder / file, {"format": "pt"})
    if len(parts) == 2:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def start(folder, init_from):
    return build_model(build_config(Model(path=str(folder))), 0, str(init_from)).eval()


def ids():
    return torch.arange(2 * 9).reshape(2, 9) % VOCABULARY


@pytest.mark.parametrize("mlp", MLP_TYPES)
@pytest.mark.parametrize("ffn", ["raw", "softmoe_v1", "softmoe_v2", "softmoe_v3"])
@torch.no_grad()
def test_tensors_are_equal_and_training_starts_from_them(ffn, mlp, tmp_path):
    assert ffn in FFN_TYPES
    form = FORMS[(FFN_TYPES.index(ffn) * 2 + MLP_TYPES.index(mlp)) % 4]
    tensors, model = publish(tmp_path / "in", form, FFN_type=ffn, mlp_type=mlp)
    import_hf(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(written[n].dtype == torch.bfloat16 and torch.equal(written[n], t) for n, t in tensors.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["FFN_type"], config["dtype"]) == ("steel", ffn, "bfloat16")
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_steel.SteelForCausalLM"
    for file in OWN["steel"].files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    model.load_state_dict(tensors)  # rounded to bf16, as published
    assert torch.equal(start(tmp_path / "out", tmp_path / "out")(ids()).logits, model.eval()(ids()).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_form_tied_and_untied(form, tied, tmp_path, capsys):
    tensors, _ = publish(tmp_path / "in", form, torch.float32, tie_word_embeddings=tied)
    assert cli.main(["import", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert f"{'tied' if tied else 'untied'} head" in captured.out
    assert "the published folder has no auto_map, tokenizer, generation_config.json" in captured.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) == (not tied)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_tied_head_that_is_written_out_must_be_the_embedding(tmp_path):
    tensors, _ = publish(tmp_path / "in", dtype=torch.float32, tie_word_embeddings=True)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "in" / FORMS[0])
    import_hf(tmp_path / "in", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "in" / FORMS[0])
    with pytest.raises(SteelError, match=r"lm_head\.weight that differs"):
        import_hf(tmp_path / "in", tmp_path / "other")


def test_tokenizer_and_generation_settings_travel_and_foreign_code_stays(tmp_path, tiny_tokenizer, capsys):
    publish(tmp_path / "in", config={"auto_map": {"AutoConfig": "configuration_steel.SteelConfig"}})
    shutil.copytree(tiny_tokenizer, tmp_path / "in", dirs_exist_ok=True)
    (tmp_path / "in" / "generation_config.json").write_text('{"top_p": 0.8}')
    (tmp_path / "in" / "modeling_steel.py").write_text("raise SystemExit('ran')")
    import_hf(tmp_path / "in", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (tiny_tokenizer / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_text() == '{"top_p": 0.8}'
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in OWN["steel"].files)
    assert cli.main(["generate", str(out), "--prompt", "w5 w9", "--max-new-tokens", "2"]) == 0


def _without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


PHI = "model.layers.1.mlp.phi"
PROBLEMS = {
    "missing": (lambda t: _without(t, PHI), rf"lacks {PHI}"),
    "unexpected": (
        lambda t: {**t, "model.layers.2.mlp.phi": t[PHI].clone()},
        r"holds unexpected model\.layers\.2\.mlp\.phi",
    ),
    "shape": (lambda t: {**t, PHI: t[PHI][:, :1].clone()}, rf"holds {PHI} as \(32, 1, 2\), the model has \(32, 3, 2\)"),
    "not finite": (lambda t: {**t, PHI: t[PHI] * float("nan")}, rf"{PHI} holds numbers that are not finite"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_tensor_that_is_not_the_models_is_named(problem, tmp_path, capsys):
    change, says = PROBLEMS[problem]
    tensors, _ = publish(tmp_path / "in")
    save_file(change(tensors), tmp_path / "in" / FORMS[0])
    with pytest.raises(SteelError, match=says):
        import_hf(tmp_path / "in", tmp_path / "new" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"FFN_type": "softmoe_v9"}, "FFN_type: 'softmoe_v9' is not one of"), ({"slots_per_expert": 0}, "slots_per_expert"),
        ({"num_attention_heads": 5}, "num_attention_heads"), ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)  # fmt: skip
def test_an_impossible_configuration_names_the_field(config, says, tmp_path):
    publish(tmp_path / "in", config=config)
    with pytest.raises(SteelError, match=says):
        import_hf(tmp_path / "in", tmp_path / "out")


def test_broken_folders(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    publish(tmp_path / "in")
    (tmp_path / "in" / FORMS[0]).unlink()
    with pytest.raises(SteelError, match="holds no weights"):
        import_hf(tmp_path / "in", tmp_path / "out")
    torch.save({"model.norm.weight": Evil()}, tmp_path / "in" / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(SteelError, match="the weights are unsafe: the file asks for "):
        import_hf(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    tree = json.loads((tmp_path / "in" / "config.json").read_text())
    del tree["mlp_div_ratio"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(SteelError, match="lacks mlp_div_ratio"):
        import_hf(tmp_path / "in", tmp_path / "out")
    with pytest.raises(SteelError, match="no Hugging Face folder"):
        import_hf(tmp_path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_the_original_settles_what_its_config_leaves_out(tmp_path):
    """Without num_key_value_heads and rope_theta the original has 32 heads and 10000."""
    publish(tmp_path / "in", hidden_size=128, num_attention_heads=32, num_key_value_heads=32, rope_theta=1e4)
    tree = json.loads((tmp_path / "in" / "config.json").read_text())
    for name in ("rope_theta", "num_key_value_heads"):
        del tree[name]
    (tmp_path / "in" / "config.json").write_text(json.dumps(tree))
    import_hf(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["num_key_value_heads"]) == (1e4, 32)


@pytest.mark.parametrize("name", ["llama", "qwen2", "steel"])
def test_any_native_folder_is_copied_and_trained_further(name, tmp_path, tiny_recipe, tiny_tokenizer):
    sizes = {k: SIZES[k] for k in list(SIZES)[:6]}
    model = build_model(build_config(Model(type=name, config=sizes)), 8).eval()
    model.save_pretrained(tmp_path / "in")
    shutil.copytree(tiny_tokenizer, tmp_path / "in", dirs_exist_ok=True)
    import_hf(tmp_path / "in", tmp_path / "out")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()
    with torch.no_grad():
        assert torch.equal(start(tmp_path / "out", tmp_path / "out")(ids()).logits, model(ids()).logits)
    if name == "llama":
        out = tmp_path / "out"
        settings = [f"run.dir={tmp_path / 'run'}", f"model.path={out}", f"model.init_from={out}", "train.steps=1"]
        assert cli.main(["pretrain", str(tiny_recipe), *settings, "optim.lr=1e-30", "train.eval_every_steps=1"]) == 0
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--dtype", "float32"]) == 0
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(again[n], t) for n, t in load_file(out / "model.safetensors").items())


def test_a_native_folder_with_a_tensor_missing_is_refused(tmp_path):
    model = build_model(build_config(Model(type="llama", config={k: SIZES[k] for k in list(SIZES)[:6]})), 8)
    model.save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    save_file(_without(tensors, "model.norm.weight"), tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SteelError, match=r"1 missing: model\.norm\.weight"):
        import_hf(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("layers", [None, [0, 1]], ids=["copied", "changed"])
def test_a_native_folder_with_a_number_that_is_none_is_refused(value, layers, tmp_path):
    model = build_model(build_config(Model(type="llama", config={k: SIZES[k] for k in list(SIZES)[:6]})), 8)
    with torch.no_grad():
        model.model.norm.weight[-1] = value
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(SteelError, match=r"model\.norm\.weight holds numbers that are not finite"):
        import_hf(tmp_path / "in", tmp_path / "out", layers=layers)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_audit_asks_for_the_import_first(tmp_path, capsys):
    publish(tmp_path / "in")
    assert cli.main(["audit", str(tmp_path / "in")]) == 78
    assert "megatron-steel import" in capsys.readouterr().err
