"""A disk that takes no more: named, and the same command goes on once there is room."""

import contextlib
import json
import resource
from pathlib import Path

import pytest
from tiny_tuning import logged, run, sums, weights, write_rows, write_tiny

from megatron_steel.errors import EXIT_BAD_INPUT, SteelError
from megatron_steel.post.tune.writing import writing


@contextlib.contextmanager
def files_of_at_most(size: int):
    """No file of this process grows beyond `size` bytes; the kernel answers as a full disk does, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("part", "times"), [("weights", 0.5), ("optimizer", 1.5), ("published", 1.5)])
def test_a_disk_that_takes_no_more_is_named_and_the_run_goes_on(part, times, tmp_path, capsys):
    folder = Path(write_tiny(tmp_path / "model"))
    rows = write_rows(tmp_path / "rows.jsonl", sums(4))
    size = (folder / "model.safetensors").stat().st_size
    words = [
        "sft",
        folder,
        rows,
        "--output",
        tmp_path / "out",
        "--global-batch-size=4",
        "per_device_train_batch_size=4",
        "max_steps=2",
    ]
    if part == "published":  # twice the size of what was trained
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**tree, "dtype": "float64"}))
        words.append("optim=sgd")
    with files_of_at_most(int(size * times)):
        assert run(*words) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "cannot write: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "result.json").exists() == (part == "published")
    assert run(*words) == 0
    assert len(logged(tmp_path / "out", "loss")) == 2
    assert weights(tmp_path / "out").keys() == weights(folder).keys()


@pytest.mark.parametrize(
    ("error", "whole", "named"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file data/7"), True, True),
        (RuntimeError("CUDA error: an illegal memory access"), True, False),
        (FileNotFoundError(2, "No such file"), False, False),
        (OSError(28, "No space left on device"), False, True),
    ],
)
def test_only_what_a_disk_says_is_told_so(error, whole, named):
    with pytest.raises(SteelError if named else type(error)), writing("here", whole):
        raise error
