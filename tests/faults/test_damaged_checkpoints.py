"""Damage is named, with the file and the reason, and the checkpoint before it is taken; pointers are not believed."""

import os
import random
import shutil

import pytest
from stub_run import curve, starts

from megatron_steel.checkpoint import commit
from megatron_steel.errors import SteelError

FILES = (
    "engine/mp_rank_00_model_states.pt",
    "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "manifest.json",
    "zero_to_fp32.py",
)


@pytest.fixture(scope="module")
def stub(stub_server):
    stub = stub_server.below("damaged_checkpoints")
    stub.run(stub.root / "golden", steps=14)
    stub.run(stub.root / "whole", steps=10)  # checkpoints 5 and 10
    return stub


def copy(stub, name):
    shutil.copytree(stub.root / "whole", stub.root / name)
    return stub.root / name


def newest_of(folder):
    return folder / "checkpoints" / "step-00000010"


def test_these_are_all_the_files(stub):
    found = sorted(
        str(p.relative_to(newest_of(stub.root / "whole"))) for p in commit._files(newest_of(stub.root / "whole"))
    )
    assert found == sorted(FILES)


def damage(file, how, aim):
    size = file.stat().st_size
    if how == "cut":
        os.truncate(file, aim.randrange(size))
        return
    with open(file, "r+b") as stream:
        stream.seek(at := aim.randrange(size))
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << aim.randrange(8))]))


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("name", FILES)
def test_twenty_damages_of_every_file_are_named(stub, name, how):
    original = (newest_of(stub.root / "whole") / name).read_bytes()
    folder = copy(stub, "damaged")
    try:
        for seed in range(20):
            file = newest_of(folder) / name
            file.write_bytes(original)
            damage(file, how, random.Random(seed))
            found, (problem,) = commit.newest_whole(folder / "checkpoints")
            assert found.step == 5
            assert name in str(problem)  # in the sentence, or as the place
            assert str(newest_of(folder)) in problem.where
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["cut", "flip", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_one_before_by_itself_and_says_why(stub, name, how):
    folder = copy(stub, f"run-{how}-{name.replace('/', '-')}")
    file = newest_of(folder) / name
    if how == "deleted":
        file.unlink()
    else:
        damage(file, how, random.Random(1))
    stub.run(folder, steps=14)
    said = (folder / "log.txt").read_text()
    assert "passed over a checkpoint: the checkpoint" in said
    assert str(newest_of(folder)) in said
    assert (name in said) or how == "deleted"  # without its manifest the folder itself is named
    assert starts(folder) == [0, 5]
    assert curve(folder) == curve(stub.root / "golden")
    assert commit.verify(newest_of(folder)).step == 10  # written anew in the place of the damaged one


def test_two_ranks_agree_on_the_one_before(stub):
    folder = stub.root / "ranks"
    for steps in (10, 12):
        if steps == 12:
            (newest_of(folder) / "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
        assert [stub.wait(pid) for pid in stub.start_ranks(folder, 2, steps=steps)] == [0, 0]
    assert [starts(folder, rank) for rank in (0, 1)] == [[0, 5], [0, 5]]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing" in (folder / "log.txt").read_text()


def test_when_none_is_whole_the_run_does_not_start_over_by_itself(stub):
    folder = copy(stub, "none")
    for path in commit.published(folder / "checkpoints"):
        (path / FILES[0]).unlink()
    stub.run(folder, 78, steps=14)
    assert "none of the 2 checkpoints is whole" in (folder / "log.txt").read_text()
    assert starts(folder) == [0]


POINTERS = {
    "empty": "",
    "garbage": "\x00\xff nonsense",
    "dangling": "step-00000099",
    "above": "../../elsewhere",
    "absolute": "/etc/passwd",
    "the older one": "step-00000005",
}


@pytest.mark.parametrize("text", POINTERS.values(), ids=POINTERS.keys())
def test_no_pointer_is_believed(stub, text, request):
    folder = copy(stub, f"pointer-{list(POINTERS.values()).index(text)}")
    for place in (folder / "checkpoints", newest_of(folder), newest_of(folder) / "engine"):
        (place / "latest").write_text(text, encoding="utf-8")
    found, passed_over = commit.newest_whole(folder / "checkpoints")
    assert (found.step, passed_over) == (10, [])
    stub.run(folder, steps=11)
    assert starts(folder) == [0, 10]


def test_names_that_lead_elsewhere_are_no_checkpoints(stub):
    folder = copy(stub, "names") / "checkpoints"
    outside = stub.root / "outside"
    shutil.copytree(newest_of(stub.root / "whole"), outside / "step-00000050")
    (folder / "latest").symlink_to(outside)
    (folder / "step-0000009x").mkdir()
    (folder / "step-99").mkdir()
    (folder / "step-00000098").write_text("a file")
    (folder / "step-00000097").symlink_to(folder / "nowhere")
    found, passed_over = commit.newest_whole(folder)
    assert (found.step, passed_over) == (10, [])


@pytest.mark.parametrize("name", ["../../../etc/hostname", "/etc/hostname", "engine/../../x"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(stub, name):
    import json

    folder = copy(stub, f"out-{len(name)}")
    file = newest_of(folder) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = manifest["files"][FILES[0]]
    file.write_text(json.dumps(commit.sealed(manifest)))
    with pytest.raises(SteelError, match="names a file outside the checkpoint"):
        commit.verify(newest_of(folder))
    assert commit.newest_whole(folder / "checkpoints")[0].step == 5
