"""`prepare --fetch` against a mirror on this machine: listed, sampled, killed, gone on with, verified."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from hub_mirror import Mirror
from processes import wait_for

from megatron_steel import cli
from megatron_steel.data import fetch as room
from megatron_steel.errors import SteelError

REPOSITORY = "Skywork/SkyPile-150B"
FILES = {f"data/part-{i}.jsonl": random.Random(i).randbytes(200_000 + i) for i in range(4)}
EXTRA = {"README.md": b"# card", "data/small.jsonl": b'{"text": "small"}\n'}


@pytest.fixture
def mirror():
    with Mirror({REPOSITORY: {**EXTRA, **FILES}}) as server:
        yield server


def run(mirror, folder, *options, expect=0):
    """The command as a user gives it, in a process of its own."""
    done = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=120, env=around(mirror))
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def command(folder, *options):
    return [sys.executable, "-m", "megatron_steel.cli", "prepare", "skypile", "--fetch", str(folder), *options]


def around(mirror):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**inherited, "HF_ENDPOINT": mirror.url, "HF_HOME": "/nonexistent"}


@pytest.fixture
def verb(mirror, capsys, monkeypatch, tmp_path):
    """verb(*words): prepare ... in this process, which has read HF_ENDPOINT long ago. Returns what was printed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", mirror.url)
    template = mirror.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def call(*words, expect=0):
        assert cli.main(["prepare", *map(str, words)]) == expect
        said = capsys.readouterr()
        return said.out + said.err

    return call


def manifest(folder):
    return json.loads((folder / "fetch.json").read_text())


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_corpus_comes_whole_and_its_size_licence_and_gate_are_said_first(mirror, tmp_path):
    folder = tmp_path / "raw"
    done = run(mirror, folder)
    assert "size:    800.0 kB in 5 files" in done.stdout
    assert "licence: cc-by-sa-3.0; Skywork Community License" in done.stdout
    assert "gate:    none" in done.stdout
    wanted = {**FILES, "data/small.jsonl": EXTRA["data/small.jsonl"]}  # no card, nothing half-written
    found = files_of(folder)
    tree = json.loads(found.pop("fetch.json"))
    assert found == wanted
    assert {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in tree["files"]} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in wanted.items()
    }
    assert (tree["revision"], tree["gated"], tree["repository"]) == (mirror.revision, False, REPOSITORY)

    mirror.asked.clear()  # again: nothing is fetched; a file that was spoiled comes anew
    (folder / "data/part-2.jsonl").write_bytes(FILES["data/part-2.jsonl"][:-1] + b"\0")
    (folder / "data/part-3.jsonl").unlink()
    run(mirror, folder)
    assert sorted(mirror.asked) == [("GET", "data/part-2.jsonl", 0), ("GET", "data/part-3.jsonl", 0)]
    assert files_of(folder) == {**wanted, "fetch.json": (folder / "fetch.json").read_bytes()}
    assert manifest(folder) == tree


def test_a_killed_download_goes_on_in_the_middle_of_its_file(mirror, tmp_path):
    folder, name = tmp_path / "raw", "data/large.jsonl"
    large = mirror.repositories[REPOSITORY][name] = random.Random(9).randbytes(23 << 20)
    mirror.stall_after = 21 << 20  # the library writes 10 MB at a time
    part = folder / f"{name}.part"
    child = subprocess.Popen(command(folder), env=around(mirror), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: part.is_file() and part.stat().st_size == 20 << 20)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    mirror.stall_after = 1 << 60
    mirror.asked.clear()
    run(mirror, folder)
    assert ("GET", name, 20 << 20) in mirror.asked
    assert len([1 for _, asked, _ in mirror.asked if asked == name]) == 1
    assert (folder / name).read_bytes() == large
    assert not list(folder.rglob("*.part"))


def test_a_sample_is_whole_files_up_to_its_size_and_may_grow(mirror, verb, tmp_path):
    folder = tmp_path / "raw"
    assert "; now 400.0 kB in 2 files" in verb("skypile", "--fetch", folder, "--sample", "300KB")
    assert sorted(entry["name"] for entry in manifest(folder)["files"]) == ["data/part-0.jsonl", "data/part-1.jsonl"]
    mirror.asked.clear()
    mirror.revision = "b" * 40  # the repository moved on, and this folder does not
    assert "the hub did not give it" in verb("skypile", "--fetch", folder, "--sample", "500KB", expect=78)
    mirror.revision = "a" * 40
    verb("skypile", "--fetch", folder, "--sample", "500KB")
    assert [name for _, name, _ in mirror.asked] == ["data/part-2.jsonl"]


def test_a_gate_is_named_with_where_to_agree(mirror, verb, tmp_path, monkeypatch):
    mirror.gated, mirror.token = "auto", "hf_secret"
    said = verb("skypile", "--fetch", tmp_path / "raw", expect=78)
    assert "gate:    its terms must be agreed to there first" in said
    assert f"agree to its terms at {mirror.url}/datasets/{REPOSITORY}" in said
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    verb("skypile", "--fetch", tmp_path / "raw")
    assert (tmp_path / "raw/data/part-0.jsonl").read_bytes() == FILES["data/part-0.jsonl"]


def test_a_file_that_is_not_what_the_hub_lists_is_refused(mirror, verb, tmp_path):
    mirror.wrong.add("data/part-1.jsonl")
    assert "the hub says 200001 and" in verb("skypile", "--fetch", tmp_path / "raw", expect=78)
    assert not (tmp_path / "raw/data/part-1.jsonl").exists()
    assert "data/part-1.jsonl" not in {entry["name"] for entry in manifest(tmp_path / "raw")["files"]}


def test_what_a_user_may_get_wrong(mirror, verb, tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    verb("skypile", "--fetch", folder, "--sample", "1KB")
    assert "the folder holds skypile" in verb("wiki-cn", "--fetch", folder, expect=78)
    for words, says in (
        (["baidu-qa", "--fetch", "x"], "aistudio.baidu.com"),
        (["text", "--fetch", "x"], "files of your own"),
        (["nothing", "--fetch", "x"], "known are skypile"),
        (["wiki-cn", "--fetch", "x", "--hub", "modelscope"], "--hub huggingface has it"),
        (["skypile", "--fetch", "x", "--sample", "some"], "is no size"),
        (["skypile", "a.jsonl", "--fetch", "x"], "prepare SOURCE --fetch DIR"),
        (["skypile"], "prepare SOURCE --fetch DIR"),
    ):
        assert says in verb(*words, expect=78)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(SteelError, match="not installed") as caught:
        room.fetch("skypile", tmp_path / "m", "modelscope")
    assert "pip install modelscope-hub" in caught.value.remedy
    assert not (tmp_path / "m").exists()


def test_sizes_are_read_and_every_source_is_fetchable_or_says_where():
    assert [room._bytes(text) for text in ("1GB", "1.5 MB", "200k", "7")] == [10**9, 1_500_000, 200_000, 7]
    from megatron_steel.data import sources

    assert list(room.CORPORA) == sources.names()
    assert all(bool(corpus.by_hand) != bool(corpus.huggingface) for corpus in room.CORPORA.values())
