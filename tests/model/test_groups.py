"""Optimizer groups by name and shape, and weights that are drawn otherwise than their class does."""

import pytest
import torch
from torch import nn

from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model, prepare_for_training
from megatron_steel.model.groups import decay_groups, draw_again
from megatron_steel.recipe import Model

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def steel(**changes):
    return build_config(Model(type="steel", config=SIZES | changes))


def llama(**changes):
    return build_model(build_config(Model(type="llama", config=SIZES | changes)), seed=1)


def _names(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_decay_groups():
    model = build_model(steel(FFN_type="softmoe_v3", tie_word_embeddings=True), seed=1)
    decayed, others = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert {names[id(p)].rsplit(".", 2)[-2] for p in others["params"]} == {
        "q_proj", "k_proj", "v_proj", "mlp", "input_layernorm", "post_attention_layernorm", "norm",
    }  # biases, the scale of the router, norms  # fmt: skip
    together = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())  # each once, tied ones too
    (everything,) = decay_groups(model, 0.05, on="all")
    assert everything["weight_decay"] == 0.05
    assert len(everything["params"]) == len(together)


def test_decay_groups_remember_the_shape_of_cut_parameters():
    layer = nn.Linear(4, 4)
    layer.weight.data, layer.weight.ds_shape = torch.zeros(16), torch.Size([4, 4])
    layer.bias.requires_grad_(False)
    (group,) = decay_groups(layer, 0.1)
    assert group == {"params": [layer.weight], "weight_decay": 0.1}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_decay_or_not(tied):
    model = llama(tie_word_embeddings=tied)
    decayed, others = _names(model, decay_groups(model, 0.1, "matrices_without_embeddings"))
    assert "model.embed_tokens.weight" in others
    assert ("lm_head.weight" in decayed) == (not tied)  # an untied head is no embedding
    assert sorted(decayed + others) == sorted(name for name, _ in model.named_parameters())


def test_muon_gets_the_matrices_between_embeddings_and_head():
    model = prepare_for_training(llama(tie_word_embeddings=False))
    groups = decay_groups(model, 0.1, muon_lr_ratio=5.0)
    (muon,) = [group for group in groups if group.get("muon")]
    layers = [name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    assert sorted(_names(model, [muon])[0]) == sorted(layers)
    assert [group["lr_ratio"] for group in groups if group is not muon] == [1.0, 1.0]
    assert muon["lr_ratio"] == 5.0


def test_the_first_pattern_that_matches_decides():
    """MiniCPM's muP: matrices at lr / (h / 256), embeddings and norms at lr."""
    model = llama()
    groups = decay_groups(model, 0.1, lr_ratio={"*_proj.weight": 0.125, "*.layers.0.*": 0.5})
    found = {(g["weight_decay"], g["lr_ratio"]): names for g, names in zip(groups, _names(model, groups), strict=True)}
    assert sorted(found) == [(0.0, 0.5), (0.0, 1.0), (0.1, 0.125), (0.1, 1.0)]
    assert len(found[0.1, 0.125]) == 2 * 7
    assert found[0.0, 0.5] == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]


@pytest.mark.parametrize("where", ["optim.lr_ratio", "model.init_std"])
def test_a_pattern_that_matches_nothing_is_an_error(where):
    patterns, use = {"*.q_prj.weight": 0.1}, {"optim.lr_ratio": lambda *a: decay_groups(a[0], 0.1, lr_ratio=a[1])}
    with pytest.raises(SteelError, match=r"'\*\.q_prj\.weight' matches no parameter") as caught:
        use.get(where, draw_again)(llama(), patterns)
    assert caught.value.where == where
    assert "self_attn.q_proj.weight" in caught.value.remedy
    with pytest.raises(SteelError) as caught:
        use.get(where, draw_again)(llama(), {"*.q_prj.*": 0.1})
    assert "self_attn.q_proj.weight" in caught.value.remedy


def test_init_std_draws_these_weights_and_no_other():
    config = build_config(Model(type="llama", config=SIZES | {"vocab_size": 4096}))
    plain, drawn = (
        build_model(config, 1),
        build_model(config, 1, init_std={"*embed_tokens*": 0.1, "*.down_proj.*": 3.0}),
    )
    for (name, a), (_, b) in zip(plain.named_parameters(), drawn.named_parameters(), strict=True):
        std = 0.1 if "embed_tokens" in name else 3.0 if "down_proj" in name else None
        assert torch.equal(a, b) == (std is None), name
        assert std is None or float(b.detach().std()) == pytest.approx(std, rel=0.05)
    again = build_model(config, 1, init_std={"*embed_tokens*": 0.1, "*.down_proj.*": 3.0})
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), again.parameters(), strict=True))
