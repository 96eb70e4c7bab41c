"""Every command that README and docs show is one that the program takes: verb, options, recipe and keys."""

import re

import pytest
from blocks import MARKS, ROOT, blocks, commands, pages

from megatron_steel import cli
from megatron_steel.recipe import known_keys, load_recipe, recipe_names

BLOCKS = [block for page in pages() for block in blocks(page)]


def _id(block):
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("block", BLOCKS, ids=_id)
def test_a_block_says_where_it_runs(block):
    assert block.mark in MARKS


@pytest.mark.parametrize("block", BLOCKS, ids=_id)
def test_commands_are_taken(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(block.text):
        if words[0] == "megatron-steel":
            _verb(words[1:])
        elif words[0] == "deepspeed" and "megatron_steel.pretrain" in words:
            _recipe(words[words.index("megatron_steel.pretrain") + 1 :])
        elif words[0] in ("python", "bash") and len(words) > 1 and words[1].startswith(("tools/", "launch/")):
            _script(words[1:])


def test_keys_exist():
    """What looks like a key of a recipe is one."""
    keys = set(known_keys())
    sections = {key.split(".")[0] for key in keys} - {"deepspeed"}  # a module too
    unknown = []
    for page in pages():
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
            section = name.split(".")[0]
            is_file = name.endswith((".json", ".yaml", ".jsonl", ".py", ".bin", ".idx", ".model", ".lock"))
            if (
                section in sections
                and not is_file
                and not any(name == key or name.startswith(key + ".") for key in keys)
            ):
                unknown.append(f"{page.name}: {name}")
    assert unknown == []


def test_links_lead_somewhere():
    broken = []
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def _verb(words):
    if words[0].startswith("--"):  # --help, --version
        return
    known, rest = cli._parser().parse_known_args(words)  # leaves with 78 where it cannot
    assert not any(word.startswith("-") for word in rest), words
    if known.action.__name__ in ("pretrain", "launch", "plan") and known.recipe:
        _recipe([known.recipe, *known.overrides, *rest])


def _recipe(words):
    name, *overrides = [word for word in words if not word.startswith("-")]
    if name in recipe_names():
        load_recipe(name, overrides)
    elif name != "RECIPE" and "FILLED" not in name:
        assert name.endswith((".yaml", ".yml")), words


def _script(words):
    file = ROOT / words[0]
    assert file.is_file(), words
    options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
    folder = file.with_suffix("") if file.with_suffix("").is_dir() else None
    source = "".join(f.read_text(encoding="utf-8") for f in [file, *(folder.glob("*.py") if folder else [])])
    if file.suffix == ".py":
        assert all(option in source for option in options - {"--help"}), (words, options)
