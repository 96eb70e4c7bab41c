"""Data that is not there yet: every set at once, with the commands that make it."""

import re

import pytest

from megatron_steel.cli import _parser
from megatron_steel.data.missing import commands, require_made
from megatron_steel.errors import SteelError


def test_every_missing_data_set_is_named_with_its_commands(tmp_path):
    (tmp_path / "starcoder.bin").touch()  # half a data set is not an unmade one
    prefixes = [f"{tmp_path}/{name}" for name in ("skypile", "starcoder", "wanjuan", "openwebtext-validation")]
    with pytest.raises(SteelError) as caught:
        require_made(prefixes, "tok", "data.train")
    assert caught.value.where == "data.train"
    assert "starcoder" not in caught.value.what
    assert [line.strip() for line in caught.value.remedy.splitlines()[1:]] == [
        "megatron-steel prepare skypile --fetch raw/skypile",
        "megatron-steel prepare skypile $(find raw/skypile -type f ! -name fetch.json) --output skypile.jsonl",
        f"megatron-steel tokenize skypile.jsonl --tokenizer tok --output {tmp_path}/skypile",
        "# into raw/wanjuan: https://opendatalab.com/OpenDataLab/WanJuan1_dot_0 (its own client; raw/nlp)",
        "megatron-steel prepare wanjuan $(find raw/wanjuan -type f ! -name fetch.json) --output wanjuan.jsonl",
        f"megatron-steel tokenize wanjuan.jsonl --tokenizer tok --output {tmp_path}/wanjuan",
        f"megatron-steel tokenize openwebtext.jsonl --tokenizer tok --output {tmp_path}/openwebtext --validation-ratio 0.001",
    ]
    require_made([prefixes[1]], "tok", "data.train")


def test_a_set_called_train_is_made_of_its_folder_s_text():
    assert commands("data/zh/train", "tok") == [
        "megatron-steel tokenize zh.jsonl --tokenizer tok --output data/zh/train"
    ]
    assert commands("data/skypile/train", "tok")[-1].endswith(
        "skypile.jsonl --tokenizer tok --output data/skypile/train"
    )


def test_the_commands_are_commands():
    for line in [line for name in ("skypile", "belle-2m", "own") for line in commands(f"data/{name}", "tok")]:
        _parser().parse_args(re.sub(r"\$\(.*\)", "file", line).split()[1:])
