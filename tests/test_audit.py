"""The audit: exactly zero for causal parts, found out whatever the size of the weights, and figures equal to those by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY

from megatron_steel import audit_figures, audit_probe, cli
from megatron_steel.audit import examine, quick_audit, warning_of
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.recipe import Model

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
NATIVE = {
    "llama": SIZES, "qwen2": SIZES, "gemma3_text": {**SIZES, "head_dim": 8},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SIZES, "num_local_experts": 4},
}  # fmt: skip


def steel(ffn="raw", **changes):
    return build_model(SteelConfig(**{**SIZES, "FFN_type": ffn, "n_experts": 3, **changes}), 0)


def native(name):
    return build_model(build_config(Model(type=name, config=NATIVE[name])), 0)


def tokens(rows=2, length=24):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def guilty(report):
    return [(leak["what"], leak["part"], leak["layers"]) for leak in report["leaks"]]


# ---- the verdict


@pytest.mark.parametrize("mlp", ["raw", "senet"])
@pytest.mark.parametrize(("ffn", "causal"), [("raw", 1), ("softmoe_v1", 1), ("softmoe_v2", 0), ("softmoe_v3", 0)])
def test_every_ffn_type_is_told_apart_at_its_initial_weights(ffn, causal, mlp):
    report = quick_audit(steel(ffn, mlp_type=mlp))
    assert report["causal"] is bool(causal)
    readings = [p[w] for row in report["layers"] for p in row["parts"] for w in ("ordinary", "enlarged")]
    if causal:
        assert report["verdict"] == "causal: yes"
        assert warning_of(report) is None
        assert {v for r in [*readings, *report["whole_model"].values()] for v in r.values()} == {0.0}  # exactly
    else:
        assert report["verdict"] == f"NOT CAUSAL: {ffn} in layers 0-1 reads later tokens"
        assert guilty(report) == [(ffn, "mlp", [0, 1])]
        assert "NOT a language-model loss" in warning_of(report)
        alone = next(p for p in report["layers"][0]["parts"] if p["part"] == "mlp")
        assert min(alone[w]["perturbation"] for w in ("ordinary", "enlarged")) > 0.1


def test_what_a_whole_model_would_miss_at_initial_weights():
    """v3's FFN is so small there that nothing but rounding reaches the logits; alone it is as plain as day."""
    report = quick_audit(steel("softmoe_v3", mlp_type="senet", num_hidden_layers=1))
    assert report["whole_model"]["ordinary"]["perturbation"] < audit_probe.ROUNDING
    assert not report["causal"]


@pytest.mark.parametrize("name", NATIVE)
def test_library_classes_are_causal(name):
    report = quick_audit(native(name))
    assert report["causal"] is True
    assert report["layers"][0]["parts"][1]["enlarged"]["future_gradient"] == 0.0


def test_a_leak_behind_weights_of_zero_is_found():
    model = steel("softmoe_v3", mlp_type="raw")
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            torch.nn.init.zeros_(expert.down_proj.weight)
    report = quick_audit(model)
    mlp = report["layers"][0]["parts"][-1]
    assert (mlp["ordinary"]["perturbation"], mlp["ordinary"]["future_gradient"]) == (0.0, 0.0)
    assert guilty(report) == [("softmoe_v3", "mlp", [0, 1])]


def test_a_discrete_leak_has_no_gradient_and_is_found():
    """Expert choice: the half of the tokens with the highest score gets through, whoever comes later."""
    model = native("llama")

    def choose(module, args, output):
        score = args[0].sum(-1).detach()
        return output * (score >= score.median(dim=1, keepdim=True).values)[..., None]

    model.model.layers[1].mlp.register_forward_hook(choose)
    report = examine(model, tokens())
    mlp = next(p for p in report["layers"][1]["parts"] if p["part"] == "mlp")
    assert mlp["ordinary"]["future_gradient"] == 0.0
    assert guilty(report) == [("LlamaMLP", "mlp", [1])]


def test_code_of_a_layer_and_code_outside_the_layers_is_named():
    inside, outside = native("llama"), native("llama")
    inside.model.layers[1].register_forward_hook(lambda module, args, output: output + 1e-3 * output.flip(1))
    outside.model.norm.register_forward_hook(lambda module, args, output: output + 1e-3 * output.flip(1))
    assert guilty(examine(inside, tokens())) == [("LlamaDecoderLayer", "", [1])]
    report = quick_audit(outside)
    assert report["verdict"] == "NOT CAUSAL: LlamaForCausalLM outside its decoder layers reads later tokens"


def test_the_quick_audit_names_one_bad_layer_among_equals():
    """Equal layers are represented by the first; a leak elsewhere shows in the whole model and is then looked for."""
    model = native("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + 1e-3 * output.flip(1))
    assert guilty(quick_audit(model)) == [("LlamaMLP", "mlp", [1])]


def test_layers_that_cannot_be_run_alone_are_said_to_be_so():
    model = native("llama")
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity()] * 2)  # called, but not with anything of theirs
    model.model.forward = lambda input_ids, **kwargs: (model.model.embed_tokens(input_ids),)
    model.forward = lambda input_ids: (model.lm_head(model.model(input_ids)[0]),)
    report = quick_audit(model)
    assert report["causal"] is True
    assert report["verdict"].startswith("causal: yes (asked as a whole only")


def test_the_quick_audit_leaves_no_trace():
    model = steel("softmoe_v1").train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    quick_audit(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_numbers_that_are_none_are_an_error_and_code_that_breaks_is_no_verdict():
    model = native("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(SteelError, match="not finite"):
        quick_audit(model)
    broken = native("llama")
    broken.forward = lambda *args, **kwargs: 1 / 0
    report = quick_audit(broken)
    assert report["causal"] is None
    assert "ZeroDivisionError" in warning_of(report)


# ---- the figures


@pytest.mark.parametrize(
    ("ffn", "equal"), [("raw", True), ("softmoe_v1", True), ("softmoe_v2", False), ("softmoe_v3", False)]
)
def test_decoding_and_padding_at_both_sizes_of_weights(ffn, equal):
    report = examine(steel(ffn), tokens())
    assert report["decoding"]["mode"] == ("cached" if equal else "recomputed")
    assert (report["decoding"]["enlarged"] < 1e-3) == equal
    assert (report["padding"]["enlarged"] < 1e-3) == equal
    if equal:  # fp32 rounding of logits with an RMS of 1
        assert report["decoding"]["difference"] < 1e-5
        assert report["padding"]["ordinary"] < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["raw", "softmoe_v2"])
def test_losses_are_those_by_hand(ffn):
    model, ids = audit_probe.enlarge(steel(ffn), 31).eval(), tokens()
    report = audit_figures.losses(model, ids, positions=1000)  # that is every position
    by_hand = [
        F.cross_entropy(model(row[None, : t + 1]).logits[0, -1], row[t + 1])
        for row in ids
        for t in range(ids.shape[1] - 1)
    ]
    assert report["positions"] == len(by_hand)
    assert report["prefix_only"] == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-5)
    assert report["teacher_forced"] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)
    assert report["teacher_forced_at_positions"] == pytest.approx(report["teacher_forced"], abs=1e-6)
    assert (abs(report["gap"]) < 1e-5) == (ffn == "raw")
    few = audit_figures.losses(model, ids, positions=5)
    assert few["positions"] == 10
    assert few["prefix_only"] - few["teacher_forced_at_positions"] == pytest.approx(few["gap"], abs=1e-5)


def test_health_is_that_by_hand():
    model, ids = steel("softmoe_v1").eval(), tokens(1)
    rows = audit_figures.health(model, ids)
    assert all(p.grad is None for p in model.parameters())
    kept = {}
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: kept.update(ffn=output))
    model.model.layers[1].register_forward_hook(lambda module, args, output: kept.update(layer=output))
    model(ids, labels=ids).loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.model.layers[1].mlp.parameters()])
    assert rows[1]["ffn_gradient"] == pytest.approx(float(gradients.pow(2).mean().sqrt()), rel=1e-4)
    assert rows[1]["ffn_share"] == pytest.approx(float((kept["ffn"].norm() / kept["layer"].norm()).detach()), rel=1e-4)
    assert rows[1]["attention_gradient"] > 0


# ---- the verb


def test_the_verb_writes_json_and_picture_for_a_folder_and_a_run(tiny_recipe, tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["train.steps=2", "model.config.FFN_type=softmoe_v3", "model.config.n_experts=2"]
    assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={run}", *settings]) == 0
    assert json.loads((run / "audit.json").read_text())["causal"] is False
    assert "softmoe_v3 lets every position see later tokens" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    reports = []
    for source in (run, tmp_path / "out"):
        words = ["audit", str(source), "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
        assert cli.main([*words, "--data", str(tiny_data / "validation")]) == 0
        assert capsys.readouterr().out.rstrip().endswith("NOT CAUSAL: softmoe_v3 in layers 0-1 reads later tokens")
        reports.append(json.loads((tmp_path / "a.json").read_text()))
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    run_says, folder_says = reports
    assert run_says["leaks"] == folder_says["leaks"]
    assert run_says["loss"].pop("data") == folder_says["loss"].pop("data") == str(tiny_data / "validation")
    assert run_says["loss"] == pytest.approx(folder_says["loss"], abs=1e-6)  # the same weights


def test_bad_input_is_named(tiny_recipe, tmp_path, capsys):
    steel().save_pretrained(tmp_path / "model")
    with IndexedWriter(tmp_path / "wide", np.uint16) as writer:
        writer.add_document(np.arange(100, 400, dtype=np.uint16))
    with IndexedWriter(tmp_path / "short", np.uint16) as writer:
        writer.add_document(np.arange(7, dtype=np.uint16))
    for words, says in (
        ([str(tmp_path / "nowhere")], "there is no model here"),
        ([str(tmp_path / "model"), "--data", str(tmp_path / "wide")], "outside the model's vocabulary of 128"),
        ([str(tmp_path / "model"), "--data", str(tmp_path / "short")], "too few"),
        ([str(tmp_path / "model"), "--data", str(tmp_path / "none")], "none"),
        ([str(tmp_path / "model"), "--json", str(tmp_path / "no" / "a.json")], "does not exist"),
    ):
        assert cli.main(["audit", *words]) == 78
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("segment", [32, 125, 256])
def test_a_lagged_mixture_is_asked_behind_its_first_segment(segment, monkeypatch):
    """A segment that reads itself, and not the one before, is found out however long segments are."""
    from megatron_steel.model import mixture_steel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "mlp_div_ratio": 4, "num_hidden_layers": 1, "vocab_size": 64,
             "num_attention_heads": 2, "n_experts": 2, "max_position_embeddings": 4096}  # fmt: skip
    kind = {"FFN_type": "softmoe_causal", "causal_slots": "lagged", "segment_length": segment}
    model = build_model(SteelConfig(**sizes, **kind), seed=0)
    assert quick_audit(model)["causal"] is True
    honest = torch.where

    # In the forward pass `where` chooses between learned slots and the means of the segment before.
    def leaking(condition, a, b):
        if b.dim() == 4 and b.shape[1] == condition.shape[1] and a.dim() == 2:
            b = torch.cat((b[:, 1:], b[:, -1:]), dim=1)
        return honest(condition, a, b)

    monkeypatch.setattr(mixture_steel.torch, "where", leaking)
    assert quick_audit(model)["causal"] is False
