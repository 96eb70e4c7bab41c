"""One export at a time makes a folder; nothing of the user's is removed or taken for an export's own."""

import subprocess
import sys

import pytest

from megatron_steel.convert.hf import publishing, refuse_used
from megatron_steel.data.reserve import Busy
from megatron_steel.errors import SteelError

KILLED = """
import os, sys
from pathlib import Path
from megatron_steel.convert.hf import publishing, refuse_used
with publishing(Path(sys.argv[1])) as aside:
    (aside / "model.safetensors").write_bytes(b"half")
    os._exit(9)
"""


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_exports_to_one_folder_do_not_mix(tmp_path):
    with publishing(tmp_path / "out") as first:
        (first / "config.json").write_text("first")
        with pytest.raises(Busy, match="another process is writing this folder"), publishing(tmp_path / "out"):
            pytest.fail("both write")
        (first / "README.md").write_text("first")
    assert _names(tmp_path) == ["out"]
    assert {file.read_text() for file in (tmp_path / "out").iterdir()} == {"first"}
    with (
        pytest.raises(SteelError, match="never overwritten"),
        publishing(tmp_path / "out"),
    ):  # begun before, late to look
        pytest.fail("it is made already")
    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == ["README.md", "config.json"]


@pytest.mark.parametrize("name", [".out.tmp", ".out.export-partial"])
def test_a_folder_of_the_users_stays(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    if name == ".out.tmp":
        with publishing(tmp_path / "out"):
            pass
    else:
        with pytest.raises(SteelError, match="what no export left"), publishing(tmp_path / "out"):
            pytest.fail("it is the user's")
        assert _names(tmp_path) == [name]
    assert (tmp_path / name / "thesis.txt").read_text() == "precious"


def test_what_a_killed_export_left_goes_and_a_failed_one_leaves_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)]).returncode == 9
    assert (out.parent / ".out.export-partial" / "out" / "model.safetensors").is_file()
    with pytest.raises(ZeroDivisionError), publishing(out):
        raise ZeroDivisionError
    assert _names(tmp_path / "new") == []
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "newer" / "out"):
        raise ZeroDivisionError
    assert _names(tmp_path) == ["new"]


def test_a_link_is_refused_first(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nothing")
    for name in ("out", "broken"):
        with pytest.raises(SteelError, match="is a link"):
            refuse_used(tmp_path / name)


def test_no_output_among_a_runs_checkpoints(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    (step / "engine").mkdir(parents=True)
    (step / "manifest.json").touch()
    kept = tmp_path / "kept"
    step.rename(kept)
    step.mkdir()
    for place in (step.parent / "step-00000009", step.parent / "a" / "b", step / "out", kept / "out"):
        with pytest.raises(SteelError, match="among a run's checkpoints") as error:
            refuse_used(place)
        assert "outside checkpoints/" in str(error.value)
    (tmp_path / "link").symlink_to(step.parent)
    with pytest.raises(SteelError, match="among a run's checkpoints"):
        refuse_used(tmp_path / "link" / "out")
    for place in (tmp_path / "run" / "out", tmp_path / "checkpoints" / "out", step.parent / ".." / "out"):
        refuse_used(place)
