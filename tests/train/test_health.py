"""FFN share and expert gradients in TensorBoard equal what plain torch measures, under every sharding."""

import pytest
import torch
from foreign import write_foreign
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_steel import cli, preflight
from megatron_steel.data.order import next_batch
from megatron_steel.model import build
from megatron_steel.recipe import load_recipe

NAMES = ("ffn_share", "expert_gradient")
LAGGED = ("model.config.FFN_type=softmoe_causal", "model.config.causal_slots=lagged", "model.config.segment_length=8",
          "model.config.n_experts=3")  # fmt: skip
GPT2 = ("model={type: gpt2, config: {vocab_size: 128, n_embd: 32, n_inner: 63, n_layer: 2, n_head: 4, n_positions: 64, "
        "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}",)  # fmt: skip
BF16 = ("train.precision=bf16",)
LLAMA = ("model={type: llama, config: {vocab_size: 128, hidden_size: 32, intermediate_size: 63, num_hidden_layers: 2, "
         "num_attention_heads: 4}}",)  # fmt: skip


def _board(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"] if "/layer_" in tag}


def _plain(recipe, layers, ffn, experts):
    """Step 1 by torch alone: the whole batch at once. {tag: figure}."""
    plan = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, plan.train, recipe.train.steps, None)
    data = preflight.open_dataset(plan.train, order)
    model = build.build_model(plan.config, recipe.run.seed, None, recipe.model.trust_code)
    seen = {}
    for i, layer in enumerate(layers(model)):
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({("stream", i): out.detach()}))
        ffn(layer).register_forward_hook(lambda m, a, out, i=i: seen.update({("ffn", i): out.detach()}))
    numbers, _ = next_batch(order, recipe.train.global_batch_size)
    blocks = torch.stack([torch.from_numpy(data.tokens(int(n))) for n in numbers])
    logits = model(input_ids=blocks[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    found = {}
    for i, layer in enumerate(layers(model)):
        share = seen["ffn", i].double().square().mean().sqrt() / seen["stream", i].double().square().mean().sqrt()
        gradient = torch.cat([p.grad.flatten().double() for p in experts(layer)]).square().mean().sqrt()
        found |= {f"ffn_share/layer_{i:02d}": float(share), f"expert_gradient/layer_{i:02d}": float(gradient)}
    return found


def _steel(recipe):
    return _plain(
        recipe, lambda m: m.model.layers, lambda layer: layer.mlp, lambda layer: list(layer.mlp.experts.parameters())
    )


def _llama(recipe):
    return _plain(recipe, lambda m: m.model.layers, lambda layer: layer.mlp, lambda layer: list(layer.mlp.parameters()))


def _gpt2(recipe):
    return _plain(
        recipe, lambda m: m.transformer.h, lambda layer: layer.mlp, lambda layer: list(layer.mlp.parameters())
    )


def _foreign(recipe):
    return _plain(recipe, lambda m: m.blocks, lambda layer: layer.ffn, lambda layer: list(layer.ffn.parameters()))


def test_on_two_ranks_under_every_sharding_it_is_what_torch_measures(tiny_recipe, launch_many, tmp_path, metrics):
    """Accumulation: 2 ranks x 2 x 2 samples. GPT-2 has a bias of 63 numbers, which two ranks cannot share evenly."""
    code = write_foreign(tmp_path / "code", tmp_path / "ran")
    runs = {
        **{f"stage{s}": (_steel, [*LAGGED, f"deepspeed.config=zero{s}.json"]) for s in range(4)},
        "offload": (_steel, [*LAGGED, "deepspeed.config=zero3_offload.json"]),
        "again": (_steel, [*LAGGED, "train.activation_checkpointing=true"]),
        "llama": (_llama, [*LLAMA, "deepspeed.config=zero2.json"]),
        "gpt2": (_gpt2, [*GPT2]),
        **{f"bf16-{s}": (_steel, [*LAGGED, *BF16, f"deepspeed.config=zero{s}.json"]) for s in (0, 1, 3)},
        "foreign": (_foreign, [f"model.path={code}", "model.trust_code=true"]),
    }
    common = ["train.steps=1", "data.validation=null"]
    words = {name: [f"run.dir={tmp_path / name}", *common, *more] for name, (_, more) in runs.items()}
    launch_many(2, tiny_recipe, *words.values())
    for name, (plain, _) in runs.items():
        wanted = plain(load_recipe(str(tiny_recipe), words[name]))
        found = {tag: rows[1] for tag, rows in _board(tmp_path / name).items()}
        assert len(found) == 4
        assert found == pytest.approx(wanted, rel=0.02 if "bf16" in name else 1e-5), name
        row = metrics(tmp_path / name)[1]
        for figure in NAMES:
            of_layers = [value for tag, value in found.items() if tag.startswith(figure)]
            assert [row[f"{figure}_min"], row[f"{figure}_max"]] == pytest.approx([min(of_layers), max(of_layers)])
        assert not any("/layer_" in key for key in row)


@pytest.fixture
def train(tiny_recipe, tmp_path):
    """train(name, *overrides): a run in this process; returns its figures by layer."""

    def run(name: str, *overrides: str) -> dict:
        words = [f"run.dir={tmp_path / name}", "data.validation=null", *overrides]
        assert cli.main(["pretrain", str(tiny_recipe), *words]) == 0
        return _board(tmp_path / name)

    return run


def test_only_logging_steps_are_measured_and_each_alone(train):
    rare = train("rare", *LAGGED, "train.log_every_steps=4")
    often = train("often", *LAGGED, "train.micro_batch_size=8")
    for tag, rows in rare.items():
        assert sorted(rows) == [4, 6]
        assert [rows[4], rows[6]] == pytest.approx([often[tag][4], often[tag][6]], rel=1e-3)
        assert sorted(often[tag]) == [1, 2, 3, 4, 5, 6]


def test_the_published_ffn_shows_as_dead_and_is_no_zero(train):
    """Its output is a quartic form of small weights and unit vectors: the squares of these are 0 in fp32."""
    found = train("v3", "model.config.FFN_type=softmoe_v3", "model.config.initializer_range=0.000001", "train.steps=1")
    assert len(found) == 4
    for tag, rows in found.items():
        assert 0 < rows[1] < 1e-10, tag
