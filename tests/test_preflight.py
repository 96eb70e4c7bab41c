"""What is refused before anything is built: the same data twice, and data that changed since the checkpoint."""

import shutil

import numpy as np
import pytest

from megatron_steel import cli, preflight
from megatron_steel.checkpoint.commit import Checkpoint
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.manifest import trust
from megatron_steel.data.segments import Member
from megatron_steel.errors import SteelError
from megatron_steel.recipe import load_recipe


def _copy(prefix, to):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", f"{to}{suffix}")
    return to


def test_the_same_content_under_two_names_is_refused_and_held_out_is_a_warning(
    tiny_recipe, tiny_data, tmp_path, capsys
):
    a, b = tiny_data / "train", _copy(tiny_data / "train", tmp_path / "other-name")
    run = ["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/run", "--dry-run"]
    assert cli.main([*run, f"data.train=[{{prefix: {a}, weight: 1}}, {{prefix: {b}, weight: 2}}]"]) == 78
    message = capsys.readouterr().err
    assert f"the same data twice: {a} and {b} have equal content" in message
    assert "give it a larger weight" in message
    assert cli.main([*run, f"data.train={a}", f"data.validation={b}"]) == 0
    assert "data.validation is also trained on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def trained(tiny_recipe, tiny_data, tmp_path):
    """(recipe, checkpoint of its step 2, the prefix it trained on)."""
    mine = str(_copy(tiny_data / "train", tmp_path / "mine"))
    recipe = load_recipe(str(tiny_recipe))
    (member,) = members = _members(mine)
    order = preflight.plan_order(recipe, members, 6, None).after(16)
    data = [{"digest": member.digest, "tokens": member.tokens, "name": "mine", "prefix": mine}]
    return recipe, Checkpoint(tmp_path, {"step": 2, "order": order.to_json(), "data": data}), mine


def _members(*prefixes):
    return [Member(str(p), trust(p).digest, trust(p).tokens) for p in prefixes]


def _change(prefix, keep_size):
    raw = np.fromfile(f"{prefix}.bin", np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(raw[::-1] if keep_size else raw[:5000])
    return len(raw)


@pytest.mark.parametrize("keep_size", [True, False])
def test_content_that_changed_since_the_checkpoint_is_refused_by_file(keep_size, trained, tiny_data):
    recipe, checkpoint, mine = trained
    tokens = _change(mine, keep_size)
    for members in (_members(mine), _members(tiny_data / "validation", mine)):
        with pytest.raises(
            SteelError, match=f"the content of {mine} has changed since the checkpoint at step 2"
        ) as caught:
            preflight.plan_order(recipe, members, 6, checkpoint)
        assert f"{tokens:,} tokens with digest" in caught.value.what
        assert caught.value.where == f"{mine}.bin, {mine}.idx"
        assert "give the new data another name" in caught.value.remedy


def test_a_moved_file_whose_content_changed_is_refused_by_name_and_size(trained, tmp_path):
    recipe, checkpoint, mine = trained
    del checkpoint.manifest["data"][0]["prefix"]  # an older checkpoint
    (tmp_path / "elsewhere").mkdir()
    moved = _copy(mine, tmp_path / "elsewhere" / "mine")
    assert preflight.plan_order(recipe, _members(moved), 6, checkpoint).next_sample == 16
    _change(moved, keep_size=True)
    with pytest.raises(SteelError, match="has changed since the checkpoint"):
        preflight.plan_order(recipe, _members(moved), 6, checkpoint)


def test_new_data_may_come_beside_or_instead(trained, tiny_data, tmp_path):
    """Under other names; or under the same one, where the old content is still listed or no longer drawn from."""
    recipe, checkpoint, mine = trained
    kept, more = _copy(mine, tmp_path / "kept"), tiny_data / "validation"
    _change(mine, keep_size=False)
    instead = preflight.plan_order(recipe, _members(more), 6, checkpoint)
    assert preflight.plan_order(recipe, _members(kept, mine), 6, checkpoint).next_sample == 16
    later = Checkpoint(tmp_path, checkpoint.manifest | {"order": instead.after(8).to_json()})
    assert preflight.plan_order(recipe, _members(mine), 9, later).next_sample == 24
