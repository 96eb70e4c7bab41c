"""Commit protocol: whole or not there; the newest whole one is found by content, not by name or pointer."""

import json
import os
import shutil

import pytest

from megatron_steel.checkpoint import commit
from megatron_steel.errors import SteelError


def _write(folder, step, content=b"weights"):
    def fill(aside):
        (aside / commit.ENGINE).mkdir()
        (aside / commit.ENGINE / "shard.pt").write_bytes(content * 100)
        (aside / commit.ENGINE / "meta.pt").write_bytes(str(step).encode())

    return commit.write(folder, step, fill, {"tokens": step * 10})


def test_a_published_checkpoint_verifies_and_says_what_it_is(tmp_path):
    path = _write(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    found = commit.verify(path)
    assert (found.step, found.manifest["tokens"]) == (7, 70)
    assert sorted(found.manifest["files"]) == ["engine/meta.pt", "engine/shard.pt"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_newest_is_by_number_and_ignores_pointers_and_leftovers(tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        _write(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000005")
    (tmp_path / ".step-00000200.tmp").mkdir()
    found, passed_over = commit.newest_whole(tmp_path)
    assert found.step == 100_000_000
    assert passed_over == []


def _flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "one bit": (lambda p: _flip(p / "engine/shard.pt"), "content of engine/shard.pt has changed"),
    "one byte less": (
        lambda p: os.truncate(p / "engine/shard.pt", 699),
        "shard.pt is 699 bytes, the manifest says 700",
    ),
    "empty": (lambda p: os.truncate(p / "engine/meta.pt", 0), "meta.pt is 0 bytes"),
    "missing": (lambda p: (p / "engine/meta.pt").unlink(), "meta.pt is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest"),
    "cut manifest": (lambda p: os.truncate(p / "manifest.json", 40), "manifest cannot be read"),
    "foreign manifest": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(kind, tmp_path):
    _write(tmp_path, 1)
    newest = _write(tmp_path, 2)
    damage, says = DAMAGE[kind]
    damage(newest)
    found, passed_over = commit.newest_whole(tmp_path)
    assert found.step == 1
    assert len(passed_over) == 1
    assert says in str(passed_over[0])
    assert str(newest) in str(passed_over[0])


def test_a_manifest_cannot_reach_outside(tmp_path):
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {"../../etc/passwd": {"size": 1, "sha256": ""}}
    (path / "manifest.json").write_text(json.dumps(commit.sealed(manifest)))
    with pytest.raises(SteelError, match="outside the checkpoint"):
        commit.verify(path)


def test_a_failed_write_leaves_nothing_under_a_final_name(tmp_path):
    _write(tmp_path, 1)

    def fail(aside):
        (aside / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(SteelError, match="No space left on device"):
        commit.write(tmp_path, 2, fail, {})
    assert commit.newest_whole(tmp_path)[0].step == 1
    _write(tmp_path, 2)  # and the same step can be written again
    assert commit.newest_whole(tmp_path)[0].step == 2


def _prune(*arguments, **named):
    commit.delete(commit.hide_old(*arguments, **named))


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = _write(tmp_path, 3)
    (path / "engine/shard.pt").unlink()
    _write(tmp_path, 3)
    assert commit.newest_whole(tmp_path)[0].step == 3
    _prune(tmp_path, 2, newest=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_prune_keeps_the_newest_and_never_fewer_than_two(keep, left, tmp_path):
    for step in range(1, 6):
        _write(tmp_path, step)
    _prune(tmp_path, keep, newest=5)
    assert [int(p.name[5:]) for p in commit.published(tmp_path)] == left
    assert not list(tmp_path.glob(".*"))


def test_a_moved_checkpoint_is_still_whole(tmp_path):
    path = _write(tmp_path / "here", 4)
    shutil.copytree(path, tmp_path / "there" / path.name)
    assert commit.newest_whole(tmp_path / "there")[0].step == 4


def test_prune_never_counts_damaged_checkpoints_of_later_steps(tmp_path):
    for step in (3, 6, 9):
        _write(tmp_path, step)
    for step in (6, 9):
        _flip(tmp_path / commit.name_of(step) / "engine/shard.pt")
    assert commit.newest_whole(tmp_path)[0].step == 3
    for step in (4, 5):
        _write(tmp_path, step)
        _prune(tmp_path, 2, newest=step)
        assert commit.newest_whole(tmp_path)[0].step == step
    assert [int(p.name[5:]) for p in commit.published(tmp_path)] == [4, 5, 6, 9]


def test_a_changed_manifest_is_found(tmp_path):
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "tokens": 11}))
    with pytest.raises(SteelError, match="manifest has been changed"):
        commit.verify(path)


def test_a_full_disk_in_torch_save_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_PAUSES", (0.0, 0.0))
    tries = []

    def fail(aside):
        tries.append((aside / "half").write_bytes(b"x"))
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with pytest.raises(SteelError, match=r"could not be written: \[enforce fail"):
        commit.write(tmp_path, 1, fail, {})
    assert len(tries) == 3
    assert list(tmp_path.iterdir()) == []
    assert commit.newest_whole(tmp_path) == (None, [])


def test_every_nth_is_never_deleted(tmp_path):
    for step in range(1, 12):
        _write(tmp_path, step)
        _prune(tmp_path, 2, newest=step, keep_every=3)
    assert [int(p.name[5:]) for p in commit.published(tmp_path)] == [3, 6, 9, 10, 11]


@pytest.mark.parametrize("kind", ["one byte less", "missing", "no manifest", "cut manifest"])
def test_one_that_has_lost_something_is_not_counted_as_kept(kind, tmp_path):
    for step in (1, 2, 3):
        _write(tmp_path, step)
    DAMAGE[kind][0](tmp_path / commit.name_of(2))
    _prune(tmp_path, 2, newest=3)
    whole = [path for path in commit.published(tmp_path) if commit._is_measured(path)]
    assert [int(p.name[5:]) for p in whole] == [1, 3]
    _write(tmp_path, 4)
    _prune(tmp_path, 2, newest=4)
    assert [int(p.name[5:]) for p in commit.published(tmp_path)] == [3, 4]


def test_no_room_is_said_with_the_numbers_before_anything_is_written(tmp_path):
    def never(aside):
        pytest.fail("it began to write")

    with pytest.raises(
        commit.NotWritten, match=r"it needs \S+ GiB \(1,125,899,906,842,624 bytes\), \S+ GiB \([\d,]+ bytes\) are free"
    ):
        commit.write(tmp_path, 1, never, {}, expected_bytes=2**50)
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path, 1)
    assert commit.expected_size(tmp_path, 2**50) == commit.verify(commit.published(tmp_path)[0]).bytes == 701
    commit.write(tmp_path, 2, lambda aside: None, {}, expected_bytes=2**50)  # now known to be small


def test_each_rank_hashes_what_it_wrote_and_rank_0_the_rest(tmp_path):
    def fill(aside):
        for name in ("mine", "nobodys"):
            (aside / name).write_bytes(name.encode())
        return [aside / "mine"]

    commit.write(tmp_path, 1, fill, {})
    assert sorted(commit.verify(tmp_path / commit.name_of(1)).manifest["files"]) == ["mine", "nobodys"]


def test_a_half_deleted_folder_does_not_stand_in_the_way_of_going_back(tmp_path):
    for step in (1, 2, 3):
        _write(tmp_path, step)
    left = tmp_path / ".step-00000003.deleted"  # what a deletion that failed has left
    left.mkdir()
    (left / "shard.pt").touch()
    commit.discard_after(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_folder_that_has_gone_is_a_warning_about_space(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="megatron_steel"):
        commit.warn_of_space(tmp_path / "run" / "checkpoints", 1, checkpoints=2)
    assert "it cannot be told how much room is left" in caplog.text
