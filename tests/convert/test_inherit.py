"""A model of chosen layers equals the larger one with the other layers taken out by hand."""

import json

import pytest
import torch
from published_models import FAMILIES, as_bin, as_shards, ids, load, tensors, write_model
from test_import import publish

from megatron_steel import cli
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.convert.inherit import layer_list, parse_layers
from megatron_steel.errors import SteelError


def reduced(model, layers):
    """The same model with its own list of layers cut and put in order by hand."""
    path, modules = layer_list(model)
    owner = model.get_submodule(path.rpartition(".")[0])
    setattr(owner, path.rpartition(".")[2], torch.nn.ModuleList(modules[i] for i in layers))
    for name in ("layer_types", "no_rope_layers"):  # forward reads these by place
        if getattr(model.config, name, None):
            setattr(model.config, name, [getattr(model.config, name)[i] for i in layers])
    if "num_layers" in model.config.attribute_map.values():
        model.config.num_layers = len(layers)
    elif "n_layer" in model.config.attribute_map.values():
        model.config.n_layer = len(layers)
    else:
        model.config.num_hidden_layers = len(layers)
    return model


ALWAYS = ("llama", "qwen2", "gpt_neox", "gpt2", "gemma2", "steel softmoe")


@pytest.mark.parametrize(
    "family",
    [
        f if f in ALWAYS else pytest.param(f, marks=pytest.mark.slow)
        for f in (*ALWAYS, *sorted({*FAMILIES} - {*ALWAYS}))
    ],
)
@torch.no_grad()
def test_chosen_layers_give_the_logits_of_the_model_cut_by_hand(family, tmp_path):
    model = write_model(tmp_path / "in", family)
    layers = [1, 3] if family in ("gemma2", "gpt_neo") else [0, 3]  # of one kind there, so no place repeats the pattern
    if family == "qwen2_moe":
        layers = [1, 2, 3]
    import_hf(tmp_path / "in", tmp_path / "out", layers=layers)
    new = load(tmp_path / "out")
    expected = reduced(model, layers)(input_ids=ids(), use_cache=False).logits
    assert (new(input_ids=ids(), use_cache=False).logits - expected).abs().max() <= 1e-6
    assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in load(tmp_path / "in").parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "steel softmoe"])
def test_all_layers_in_their_order_are_the_same_model(family, tmp_path):
    write_model(tmp_path / "in", family, dtype=torch.bfloat16)
    import_hf(tmp_path / "in", tmp_path / "out", layers=[0, 1, 2, -1])
    old, new = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    assert all(new[name].dtype == torch.bfloat16 and torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_layer_may_come_twice(family, tmp_path):
    """Depth up-scaling: layers 0, 1, 2 and then 1, 2, 3."""
    model = write_model(tmp_path / "in", family)
    assert cli.main(["import", str(tmp_path / "in"), str(tmp_path / "out"), "--layers=0,1,2,-3,-2,-1"]) == 0
    deeper = load(tmp_path / "out")
    by_hand = reduced(model, [0, 1, 2, 1, 2, 3])
    got, expected = (m(input_ids=ids(), use_cache=False).logits for m in (deeper, by_hand))
    assert (got - expected).abs().max() <= 1e-6


def test_lists_and_numbers_of_layers_follow(tmp_path):
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    write_model(tmp_path / "in", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert load(tmp_path / "in").config.layer_types == kinds
    import_hf(tmp_path / "in", tmp_path / "out", layers=[1, 2, 3])
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tree["num_hidden_layers"], tree["layer_types"], tree["max_window_layers"]) == (3, kinds[1:], 1)
    write_model(tmp_path / "moe", "qwen2_moe")
    import_hf(tmp_path / "moe", tmp_path / "fewer", layers=[2, 1])
    tree = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert (tree["num_hidden_layers"], tree["mlp_only_layers"]) == (2, [1])


@pytest.mark.parametrize("form", ["bin", "sharded bin", "shards"])
def test_every_form_of_weight_files(form, tmp_path):
    write_model(tmp_path / "in", "gpt2", dtype=torch.float16)
    expected = tensors(tmp_path / "in")
    as_shards(tmp_path / "in") if form == "shards" else as_bin(tmp_path / "in", 2 if "sharded" in form else 1)
    import_hf(tmp_path / "in", tmp_path / "out", layers=[2, 2])
    found = tensors(tmp_path / "out")
    for name, tensor in found.items():
        old = name.replace("h.0.", "h.2.").replace("h.1.", "h.2.")
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, expected[old])


def test_names_without_the_base_models_prefix(tmp_path):
    """As GPT-2 itself is published, masks in the files included."""
    write_model(tmp_path / "in", "gpt2")
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "in").items()}
    found |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(4)}
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(found, tmp_path / "in" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    import_hf(tmp_path / "in", tmp_path / "out", layers=[3, 0], vocab_size=None)
    new = load(tmp_path / "out").state_dict()
    assert torch.equal(new["transformer.h.0.mlp.c_fc.weight"], found["h.3.mlp.c_fc.weight"])
    assert torch.equal(new["transformer.h.1.mlp.c_fc.weight"], found["h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("ffn", ["raw", "softmoe_v3"])
@torch.no_grad()
def test_a_published_steel_llm(ffn, tmp_path):
    _, model = publish(tmp_path / "in", "sharded bin", torch.float32, FFN_type=ffn, num_hidden_layers=4)
    import_hf(tmp_path / "in", tmp_path / "out", layers=[0, -1])
    got = load(tmp_path / "out")(ids(), use_cache=False).logits
    assert (got - reduced(model.eval(), [0, 3])(ids(), use_cache=False).logits).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("layers", "says"),
    [("0,4", "there is no layer 4: the model has 4"), ("0,-5", "there is no layer -5"), ("", "is no list of layers"),
     ("0-3", "is no list of layers")],
)  # fmt: skip
def test_layers_that_are_not_there(layers, says, tmp_path, capsys):
    write_model(tmp_path / "in")
    assert cli.main(["import", str(tmp_path / "in"), str(tmp_path / "out"), f"--layers={layers}"]) == 78
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert parse_layers("3,-1") == [3, -1]


@pytest.mark.parametrize(
    ("family", "fields", "layers", "says"),
    [("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 3], "makes a layer depend on its number"),
     ("qwen2_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, [1, 3], "layer 1 cannot become layer 0")],
)  # fmt: skip
def test_a_layer_that_cannot_stand_elsewhere_is_named(family, fields, layers, says, tmp_path):
    write_model(tmp_path / "in", family, **fields)
    with pytest.raises(SteelError, match=says):
        import_hf(tmp_path / "in", tmp_path / "out", layers=layers)
    import_hf(tmp_path / "in", tmp_path / "first", layers=[0, 1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "in"]


def test_a_chosen_layer_that_the_files_lack(tmp_path):
    write_model(tmp_path / "in")
    found = {name: tensor for name, tensor in tensors(tmp_path / "in").items() if ".layers.2." not in name}
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(found, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(SteelError, match=r"hold no model\.layers\.2"):
        import_hf(tmp_path / "in", tmp_path / "out", layers=[2])
    import_hf(tmp_path / "in", tmp_path / "out", layers=[1, 3])  # that one is not needed
