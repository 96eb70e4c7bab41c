"""The supervisor without a job: what it refuses before it starts one, and the folder that ranks report into."""

import os

from megatron_steel import cli
from megatron_steel.supervise import Supervisor, ranks_options
from megatron_steel.train.report import Report, ask_to_stop, read_all


def test_resume_never_is_asked_of_the_folder_before_anything_starts(tiny_recipe, tmp_path, capsys):
    used = tmp_path / "used"
    (used / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert cli.main(["launch", str(tiny_recipe), f"run.dir={used}", "train.resume=never"]) == 78
    assert "train.resume is never and the run folder has been used" in capsys.readouterr().err
    assert [p.name for p in used.iterdir()] == ["checkpoints"]


def test_every_start_has_a_folder_of_its_own_also_where_numbers_repeat(tmp_path):
    """In a container the supervisor has the same process number after each restart."""
    supervisor = Supervisor(tmp_path / "run", [], None)
    left = supervisor._reports_folder(1)
    (left / "stop").write_text("of the one before")
    again = Supervisor(tmp_path / "run", [], None)._reports_folder(1)
    assert again != left
    assert not left.exists()
    assert list(again.iterdir()) == []
    assert f"-{os.getpid()}-1-" in again.name


def test_a_report_that_cannot_be_read_hides_no_other(tmp_path):
    Report(tmp_path)
    (tmp_path / "rank-00001.json").write_text('{"rank": 1, "exit_co')
    (tmp_path / "rank-00002.json").symlink_to(tmp_path / "gone")
    assert [r["rank"] for r in read_all(tmp_path)] == [0]


def test_a_stop_that_cannot_be_written_is_told_otherwise(tmp_path, caplog):
    """A full disk: the ranks of this machine are signalled (here there are none), and nobody is killed for it."""
    supervisor = Supervisor(tmp_path / "run", [], None)
    supervisor._tell([], tmp_path / "no" / "such" / "folder")
    ask_to_stop(tmp_path, "SIGTERM")
    assert (tmp_path / "stop").read_text() == "SIGTERM"


def test_without_gpus_the_number_of_ranks_is_the_launchers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ranks_options(3) == ["--num_gpus", "3"]
    assert ranks_options(None) == []
