"""fp32 weights without names find their owners by what they round to, or stay out: never a wrong one."""

from pathlib import Path

import pytest
import torch

from megatron_steel.checkpoint.unnamed import weights_of_stage0

GENERATOR = torch.Generator().manual_seed(4)
SHAPES = {"embed": (7, 4), "a.weight": (4, 4), "a.norm": (4,), "b.weight": (4, 4), "b.norm": (4,), "bias": (3,)}


@pytest.fixture
def masters():
    found = {name: torch.randn(*shape, generator=GENERATOR) for name, shape in SHAPES.items()}
    found["a.norm"], found["b.norm"] = torch.full((4,), 1.0001), torch.full((4,), 0.9999)  # twins once rounded
    return found


def _state(masters, optimizer, dtype):
    module = {name: master.to(dtype) for name, master in masters.items()}
    module["head"] = module["embed"]  # tied
    module["counts"] = torch.arange(3)
    return {"module": module, "buffer_names": ["counts"], "optimizer": optimizer}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flat", [True, False])
def test_each_is_its_owners_and_twins_are_taken_as_the_model_held_them(flat, dtype, masters, caplog):
    decayed = [masters[name] for name in ("embed", "a.weight", "b.weight")]
    others = [masters[name] for name in ("a.norm", "b.norm", "bias")]
    groups = {"fp32_groups": [decayed[::-1], others]}  # any order
    if flat:
        groups = {"fp32_groups_flat": [torch.cat([t.flatten() for t in group]) for group in (decayed, others)]}
    state = _state(masters, groups, dtype)
    with caplog.at_level("INFO", logger="megatron_steel"):
        found = weights_of_stage0(state, Path("here"))
    assert list(found) == list(SHAPES)
    for name, tensor in found.items():
        wanted = state["module"][name] if name.endswith("norm") else masters[name]
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name
    assert "4 of 6 tensors are known by what they round to, 2 are taken in" in caplog.text


@pytest.mark.parametrize("how", ["another order", "padded", "other numbers", "none"])
def test_a_flat_group_that_does_not_fit_is_left_aside(how, masters):
    weights = list(masters.values())
    flat = torch.cat([t.flatten() for t in (weights[::-1] if how == "another order" else weights)])
    if how == "padded":
        flat = torch.cat([flat, torch.ones(3)])
    optimizer = {"fp32_groups_flat": [flat + (how == "other numbers")]} if how != "none" else None
    state = _state(masters, optimizer, torch.bfloat16)
    found = weights_of_stage0(state, Path("here"))
    for name in SHAPES:
        assert torch.equal(found[name], state["module"][name]), name
