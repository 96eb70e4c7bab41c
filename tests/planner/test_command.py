"""`megatron-steel plan`: what cannot be heeded or written is refused before any work."""

import pytest

from megatron_steel import cli
from megatron_steel.planner import calibrate, command


@pytest.mark.parametrize(
    ("words", "named", "plan", "other"),
    [
        (["zh-1b", "--gpus", "8xA100", "--tokenizer", "nope", "--chain", "nope", "--cores", "-4", "--total-size", "junk"],
         "--tokenizer, --chain, --cores, --total-size", "RECIPE --gpus", "--data"),
        (["--check", "--cores", "0"], "--cores", "--check", "--data"),
        (["--check", "--price", "0"], "--price", "--check", "RECIPE --gpus"),
        (["--data", "a.jsonl", "--link", "x", "--peak-tflops", "1", "--memory-gb", "1", "--price", "1"],
         "--link, --peak-tflops, --memory-gb, --price", "--data", "RECIPE --gpus"),
    ],
)  # fmt: skip
def test_an_option_of_another_plan_is_refused(words, named, plan, other, capsys):
    assert cli.main(["plan", *words]) == 78
    what, where, _ = capsys.readouterr().err.splitlines()
    assert what.endswith(f"error: only plan {other} takes {named}")
    assert where == f"  where: plan {plan}"


def test_every_option_of_a_plan_is_in_the_table():
    (verbs,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    options = {a.dest for a in verbs["plan"]._actions if a.option_strings}
    listed = [name for names in command._ONLY_WITH.values() for name in names]
    assert sorted(listed) == sorted(options - {"help", "gpus", "check", "data", "json_file"})


@pytest.mark.parametrize(
    ("file", "what"), [("none/x.json", "the folder for this file does not exist"), ("", "a folder stands where")]
)
def test_where_json_cannot_go_is_said_before_the_plan(file, what, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "check", lambda: pytest.fail("it was computed all the same"))
    for words in (["plan", "--check"], ["inspect", str(tmp_path)]):
        assert cli.main([*words, "--json", str(tmp_path / file)]) == 78
        printed = capsys.readouterr()
        assert printed.out == ""
        assert what in printed.err
