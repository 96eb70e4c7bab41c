"""The command line: instant help, every verb documented, words that are no arguments refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_for

from megatron_steel import cli, pretrain
from megatron_steel.data.manifest import trust
from megatron_steel.recipe import load_recipe, recipe_names

HEAVY = ("torch", "transformers", "deepspeed", "numpy", "pydantic", "pyarrow", "matplotlib")


def test_help_is_instant():
    """The issue asks for 0.5 s; the best of three, because machines stall."""
    command = [str(Path(sys.executable).with_name("megatron-steel")), "--help"]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - begin)
    assert "pretrain" in done.stdout
    assert min(times) < 0.5


def test_help_imports_nothing_heavy():
    code = f"import sys, megatron_steel.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_verb_once_in_its_group(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    groups = re.findall(r"^(data|training|after training|inspect and operate):\n((?:  \S.*\n)+)", text, re.MULTILINE)
    assert [title for title, _ in groups] == ["data", "training", "after training", "inspect and operate"]
    listed = [line.split()[0] for _, lines in groups for line in lines.splitlines()]
    (verbs,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    assert sorted(listed) == sorted(verbs)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_verb_that_is_none_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["pretrian", "tiny"])
    assert left.value.code == 78
    said = capsys.readouterr().err
    assert said.startswith(
        "error: there is no verb 'pretrian'\n  where: megatron-steel\n  do:    did you mean pretrain?"
    )


def test_recipes_are_listed_shown_and_scaled(capsys, tmp_path):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(recipe_names())
    assert next(line for line in lines if line.startswith("pythia-160m")).split()[1:4] == [
        "162,322,944",
        "299.9B",
        "32",
    ]
    assert cli.main(["recipes", "show", "tiny"]) == 0
    file = (Path(cli.__file__).parent / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    counted = "# Counted: 3,745,732 parameters in 131 tensors, 786,432 of them the input embedding.\n"
    assert capsys.readouterr().out == file + counted
    assert cli.main(["recipes", "scale", "tiny", "--params", "3m", "--output", str(tmp_path / "s.yaml")]) == 0
    assert load_recipe(str(tmp_path / "s.yaml")).about.parameters == pytest.approx(3e6, rel=0.1)
    assert cli.main(["recipes", "scale", "tiny", "--params", "3m", "--output", str(tmp_path / "s.yaml")]) == 78
    for words in (
        ["shwo", "tiny"],
        ["show"],
        ["scale", "tiny"],
        ["show", "tiny", "--params", "3m"],
        ["--params", "3m"],
    ):
        assert cli.main(["recipes", *words]) == 78


def test_the_list_of_recipes_imports_nothing_heavy():
    code = f"import sys; from megatron_steel import cli; cli.main(['recipes']); print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", "x", "--fast"])
    assert left.value.code == 78
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "named"),
    [("pretrain", "RECIPE"), ("launch", "RECIPE"), ("prepare", "SOURCE"), ("sft", "MODEL_DIR, DATA, --output")],
)
def test_only_what_is_needed_is_called_required(verb, named, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb])
    assert left.value.code == 78
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"error: the following arguments are required: {named}"


@pytest.mark.parametrize("asked", ["a recipe", "data"])
def test_ctrl_c_is_one_line_and_leaves_nothing(asked, tmp_path):
    (tmp_path / "temporary").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row that is long enough to be kept"}\n' * 200_000)
    words = ["plan", "tiny", "--gpus", "8xA100"] if asked == "a recipe" else ["plan", "--data", str(rows)]
    command = [str(Path(sys.executable).with_name("megatron-steel")), *words]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    maps = Path(f"/proc/{running.pid}/maps")
    busy = {"a recipe": lambda: "libtorch" in maps.read_text(),
            "data": lambda: any((tmp_path / "temporary").glob("*/text.jsonl.parts"))}  # fmt: skip
    wait_for(busy[asked])
    running.send_signal(signal.SIGINT)
    out, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.fullmatch(r"\d\d:\d\d:\d\d interrupted\n", said)
    assert out == ""
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_the_launcher_starts_has_help_and_refuses_options(capsys, caplog):
    assert pretrain.main(["--local_rank=0", "--help"]) == 0
    assert "RECIPE [key.path=value ...] [--dry-run]" in capsys.readouterr().out
    for words, said in ((["tiny", "--dryrun"], "there is no option --dryrun"), ([], "no recipe is named")):
        assert pretrain.main(["--local_rank=0", *words]) == 78
        assert said in capsys.readouterr().err + caplog.text


def test_verify_and_inspect_name_what_is_wrong(capsys, tiny_data, tmp_path):
    assert cli.main(["verify", str(tmp_path / "none")]) == 78
    assert "none" in capsys.readouterr().err
    assert cli.main(["inspect", str(tiny_data / "train")]) == 0
    assert "all 180 documents" in capsys.readouterr().out


def test_verify_goes_through_all_and_names_each_that_fails(capsys, tiny_data, tmp_path):
    for name, source in (("a", "train"), ("b", "validation"), ("c", "train"), ("d", "train")):
        for suffix in (".bin", ".idx"):
            shutil.copy(tiny_data / f"{source}{suffix}", tmp_path / f"{name}{suffix}")
        if name != "d":
            trust(tmp_path / name)
    for name in "ac":
        with open(tmp_path / f"{name}.bin", "r+b") as file:
            file.write(b"\x7b")
    assert cli.main(["verify", *(str(tmp_path / name) for name in "abcd")]) == 78
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/b: whole, 20 documents, {trust(tmp_path / 'b').tokens:,} tokens\n"
    assert "3 of 4 data sets fail" in printed.err
    for name in "ac":
        assert f"{tmp_path}/{name}: the data is not what its manifest says: digest is " in printed.err
    assert f"{tmp_path}/d.manifest.json: the index is consistent, but there is no manifest" in printed.err
    assert cli.main(["verify", str(tmp_path / "b")]) == 0


def test_merge_joins(capsys, tiny_data, tmp_path):
    assert (
        cli.main(["merge", str(tiny_data / "train"), str(tiny_data / "validation"), "--output", str(tmp_path / "all")])
        == 0
    )
    assert "200 documents" in capsys.readouterr().out
