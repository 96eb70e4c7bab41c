"""A data set is whole or not there: both sides together, kills, full disks, parts that are used again."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from corpora import content, many, numbered
from processes import session, wait_for

from megatron_steel.data import parts
from megatron_steel.data import tokenize as room
from megatron_steel.data.indexed import IndexedDataset
from megatron_steel.data.manifest import verify
from megatron_steel.data.parallel import WorkerDied
from megatron_steel.data.reserve import Busy
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError


@pytest.fixture
def split(tmp_path, tiny_tokenizer):
    """split(name, source): the job with a validation side, and bytes of another input's `out` and of `straight`, its own."""
    old, new = many(tmp_path / "old.jsonl", 300), numbered(tmp_path / "new.jsonl", 300)

    def run(name, source=new):
        return tokenize([source], tiny_tokenizer, tmp_path / name, workers=1, validation_ratio=0.3)

    run("out", old)
    run("straight")
    sides = {name: {s: content(tmp_path / f"{name}{s}") for s in ("", "-validation")} for name in ("out", "straight")}
    return run, sides["out"], sides["straight"]


def whole_sides(folder):
    """The content of each side that `verify` calls whole."""
    found = {}
    for suffix in ("", "-validation"):
        with contextlib.suppress(SteelError):
            verify(folder / f"out{suffix}")
            found[suffix] = content(folder / f"out{suffix}")
    return found


def complete(folder):
    names = {f"out{s}.{kind}" for s in ("", "-validation") for kind in ("bin", "idx", "manifest.json")}
    return {path.name for path in folder.glob("out*")} == names


def test_both_sides_change_together_wherever_it_stops(tmp_path, split, monkeypatch):
    """Before every step that touches the output: unlinks of 4 files, renames of 6."""
    run, old, new = split
    steps, seen, stop = 1000, [], KeyboardInterrupt
    kept = shutil.copytree(tmp_path, tmp_path / "kept", ignore=shutil.ignore_patterns("*.jsonl", "kept"))
    for function in ("unlink", "replace"):
        whole = getattr(os, function)

        def counts(path, *more, whole=whole, **keys):
            nonlocal steps
            target = str(more[0] if more else path)
            if ".parts" not in target and "partial" not in target and not target.endswith(".lock"):
                steps -= 1
                if steps < 0:
                    raise stop
            return whole(path, *more, **keys)

        monkeypatch.setattr(os, function, counts)
    for at in range(10):
        steps, stop = at, (KeyboardInterrupt, OSError(5, "Input/output error"))[at % 2]
        with pytest.raises((KeyboardInterrupt, SteelError)):
            run("out")
        steps = 1000
        seen.append(whole_sides(tmp_path))
        run("out")
        assert whole_sides(tmp_path) == new
        assert complete(tmp_path)
        shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    assert seen == [old, {"-validation": old["-validation"]}, *[{}] * 7, {"": new[""]}]


def test_a_kill_between_the_renames(tmp_path, tiny_tokenizer, split):
    run, _, new = split
    script = (
        "import os, sys; from pathlib import Path; from megatron_steel.data.tokenize import tokenize; whole = os.replace\n"
        "def dies(a, b):\n"
        "    if str(b).endswith('out-validation.idx'): os._exit(9)\n"
        "    whole(a, b)\n"
        "os.replace = dies\n"
        "tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], workers=1, validation_ratio=0.3)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new.jsonl"), str(tiny_tokenizer), str(tmp_path / "out")]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 9
    assert whole_sides(tmp_path) == {}
    run("out")
    assert whole_sides(tmp_path) == new
    assert complete(tmp_path)


def test_an_error_before_the_renames_leaves_the_older_output(tmp_path, split, monkeypatch):
    run, old, new = split
    whole = room.manifest.write

    def fails(prefix, *facts):
        if str(prefix).endswith("validation"):
            raise OSError(28, "No space left on device")
        return whole(prefix, *facts)

    with monkeypatch.context() as patch:
        patch.setattr(room.manifest, "write", fails)
        with pytest.raises(SteelError, match="cannot write: No space left"):
            run("out")
    assert whole_sides(tmp_path) == old
    run("out")
    assert whole_sides(tmp_path) == new
    assert complete(tmp_path)


def test_finished_parts_are_used_again_and_only_for_the_same_job(tmp_path, tiny_tokenizer, small_units, monkeypatch):
    source, made, whole = many(tmp_path / "a.jsonl"), [], parts.make
    tokenize([source], tiny_tokenizer, tmp_path / "straight", workers=1)

    def stops(item, tokenizer):
        if item[0] == 6:
            raise KeyboardInterrupt
        made.append(item[0])
        return whole(item, tokenizer)

    monkeypatch.setattr(parts, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert made == list(range(6))
    assert not list(tmp_path.glob("out.[bim]*"))
    os.truncate(tmp_path / "out.parts" / "000002-training.bin", 8)  # a damaged part is made again
    made.clear()
    monkeypatch.setattr(parts, "make", lambda item, tokenizer: made.append(item[0]) or whole(item, tokenizer))
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert made == [2, *range(6, len(room._bundles([source])))]
    assert content(tmp_path / "out") == content(tmp_path / "straight")

    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "job").write_text("another")
    (tmp_path / "out.parts" / "000000.json").write_text("[]")
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


CHANGES = ("tokenizer", "ratio", "key", "file")


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_another_job_are_not_used(tmp_path, tiny_tokenizer, small_units, monkeypatch, change):
    source, whole = tmp_path / "a.jsonl", parts.make
    rows = [{"text": f"w{3 + i % 7} w9 w{3 + i % 100}", "body": f"w{4 + i % 7} w{3 + i % 100}"} for i in range(3000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tokenizer_path": tiny_tokenizer, "text_key": "text", "validation_ratio": 0.5, "workers": 1}

    def stops(item, tokenizer):
        if item[0] == 6:
            raise KeyboardInterrupt
        return whole(item, tokenizer)

    monkeypatch.setattr(parts, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenize([source], output_prefix=tmp_path / "out", **settings)
    assert len(list((tmp_path / "out.parts").glob("*.json"))) == 6
    monkeypatch.setattr(parts, "make", whole)
    if change == "tokenizer":
        shutil.copytree(tiny_tokenizer, tmp_path / "other")
        tree = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        words = tree["model"]["vocab"]
        words["w3"], words["w4"] = words["w4"], words["w3"]
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
        settings["tokenizer_path"] = tmp_path / "other"
    elif change == "ratio":
        settings["validation_ratio"] = 0.25
    elif change == "key":
        settings["text_key"] = "body"
    else:  # as many bytes as before
        changed_at = source.stat().st_mtime_ns + 10**9
        source.write_bytes(source.read_bytes().replace(b" w9 ", b" w8 "))
        os.utime(source, ns=(changed_at, changed_at))
    tokenize([source], output_prefix=tmp_path / "out", **settings)
    tokenize([source], output_prefix=tmp_path / "straight", **settings)
    for suffix in ("", "-validation"):
        assert content(tmp_path / f"out{suffix}") == content(tmp_path / f"straight{suffix}")


def dies(item, tokenizer):
    if item[0] == 4:
        os._exit(9)
    return parts.make(item, tokenizer)


def test_a_worker_that_dies_costs_no_finished_part(tmp_path, tiny_tokenizer, small_units, monkeypatch):
    source, made, whole = many(tmp_path / "a.jsonl"), [], parts.make
    with monkeypatch.context() as patch:
        patch.setattr(parts, "make", dies)
        with pytest.raises(WorkerDied, match="a worker process died"):
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=2)
    kept = {int(path.stem) for path in (tmp_path / "out.parts").glob("*.json")}
    assert len(kept) >= 3  # of 0 to 3: the other worker may have been at work on one
    monkeypatch.setattr(parts, "make", lambda item, tokenizer: made.append(item[0]) or whole(item, tokenizer))
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert set(made) == set(range(len(room._bundles([source])))) - kept
    monkeypatch.undo()
    tokenize([source], tiny_tokenizer, tmp_path / "straight", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


KILLED = """
import sys
from megatron_steel.data import parts, tokenize
tokenize._LEAST_UNIT_BYTES = 10_000
if __name__ == "__main__":
    tokenize.tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_output_and_no_worker(tmp_path, tiny_tokenizer, how):
    source = many(tmp_path / "a.jsonl", 60_000)
    (tmp_path / "job.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "job.py"), str(source), str(tiny_tokenizer), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: list((tmp_path / "out.parts").glob("*.json")), 60)
        assert len(session(process.pid)) > 2  # this and the workers
    finally:
        process.send_signal(how)
        process.wait()
    wait_for(lambda: not session(process.pid), 20)
    assert not list(tmp_path.glob("out.[bim]*"))
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert IndexedDataset(tmp_path / "out").documents == 60_000
    assert not (tmp_path / "out.parts").exists()


def test_the_same_command_twice_at_once(tmp_path, tiny_tokenizer):
    source = many(tmp_path / "a.jsonl", 20_000)
    (tmp_path / "job.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "job.py"), str(source), str(tiny_tokenizer), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((tmp_path / "out.parts").glob("*.json")), 60)
        process.send_signal(signal.SIGSTOP)  # it cannot end before the second has tried
        with pytest.raises(Busy, match="another process is writing") as caught:
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
        assert caught.value.where == f"{tmp_path}/out.lock"
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
    assert {path.name for path in tmp_path.glob("out*")} == {"out.bin", "out.idx", "out.manifest.json"}
    tokenize([source], tiny_tokenizer, tmp_path / "straight", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("shuffles", [False, True])
def test_a_disk_without_room_publishes_nothing_and_loses_nothing(tmp_path, tiny_tokenizer, small_units, shuffles):
    source, limits = many(tmp_path / "a.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenize([source], tiny_tokenizer, tmp_path / "straight", workers=1, shuffle=shuffles)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # room for a part, none for the whole
    try:
        with pytest.raises(SteelError, match="cannot write: File too large") as caught:
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, shuffle=shuffles)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.where == f"{tmp_path}/out.parts"
    assert [path.name for path in tmp_path.glob("out*")] == ["out.parts"]
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, shuffle=shuffles)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
