"""What a run leaves behind: no secret of its environment, and nothing that everybody may write."""

import os
import stat

from megatron_steel import cli

SECRET = "canary-7f3a91c2"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "SOME_PASSWORD")


def test_secrets_stay_in_the_environment_and_files_are_not_for_everybody(tiny_recipe, tmp_path, monkeypatch, capfd):
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    run = tmp_path / "run"
    before = os.umask(0)
    try:
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={run}", "train.steps=2"]) == 0
    finally:
        os.umask(before)
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    found = [path for path in run.rglob("*") if path.is_file()]
    assert len(found) > 8
    assert [path for path in found if SECRET.encode() in path.read_bytes()] == []
    assert [path for path in (run, *run.rglob("*")) if path.stat().st_mode & stat.S_IWOTH] == []
