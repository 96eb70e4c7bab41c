"""The scripts that make other environments: their FOLDER is seen from where the caller stands."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize(
    ("script", "program"),
    [("clean_environment.sh", "dj-process"), ("llama_factory_environment.sh", "llamafactory-cli")],
)
def test_a_relative_folder_is_the_callers(script, program, tmp_path):
    file = tmp_path / "my env" / "bin" / program
    file.parent.mkdir(parents=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    command = ["bash", str(LAUNCH / script), "my env"]
    # Where it were not found, the script would go on to make it; without PATH it cannot.
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": _only(tmp_path, "dirname")}
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/my env is there already\n"), done.stderr


def _only(tmp_path: Path, name: str) -> str:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / name).symlink_to(
        subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
    )
    (tmp_path / "path" / "bash").symlink_to("/bin/bash")
    return str(tmp_path / "path")
