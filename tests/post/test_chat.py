"""A piped chat prints what it remembers, and each reply is the one that the whole conversation so far leads to."""

import io
import os
import subprocess
import sys

import pytest
from toy_models import CHATML, write_letters

from megatron_steel import cli
from megatron_steel.errors import EXIT_BAD_INPUT, EXIT_INTERNAL, SteelError
from megatron_steel.post.chat import chat
from megatron_steel.post.load import load
from megatron_steel.post.scoring.chat_protocol import written


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    write_letters(folder, seed=8, only="ABCDEF ")
    return folder


def _say(monkeypatch, text: str):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_turns_from_a_pipe_are_answered_with_the_history(talker, monkeypatch, capsys):
    _say(monkeypatch, "hello\n\nand now?\n/exit\nnever read\n")
    history = chat(str(talker), max_new_tokens=9, greedy=True)
    assert [turn["role"] for turn in history] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in history[::2]] == ["hello", "and now?"]
    assert capsys.readouterr().out.splitlines() == [turn["content"] for turn in history[1::2]]
    loaded = load(str(talker))
    for turns in (1, 3):
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in history[:turns])
        ids = loaded.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        assert history[turns]["content"] == written(loaded, [ids], 9, 1)[0] != ""
    assert history[1] != history[3]


def test_the_end_of_the_input_ends_it_and_sampling_repeats(talker, monkeypatch, capsys):
    said = []
    for _ in range(2):
        _say(monkeypatch, "hello\nwhat?")
        assert cli.main(["generate", str(talker), "--chat", "--max-new-tokens", "7"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 2


def test_a_long_conversation_forgets_its_first_turns_and_says_so(talker, monkeypatch, capsys):
    _say(monkeypatch, "x" * 700 + "\n" + "y" * 500 + "\n")
    assert cli.main(["generate", str(talker), "--chat", "--max-new-tokens", "3", "--greedy"]) == 0
    assert "it no longer sees the first 2 turns" in capsys.readouterr().err
    _say(monkeypatch, "x" * 1100 + "\n")
    assert cli.main(["generate", str(talker), "--chat", "--max-new-tokens", "3"]) == EXIT_BAD_INPUT
    assert "longer than the 1024 tokens that the model reaches" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf8_is_named(talker, monkeypatch, capsys, errors):
    given = io.TextIOWrapper(io.BytesIO("hello\n北京\n".encode("gbk")), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", given)
    assert cli.main(["generate", str(talker), "--chat", "--max-new-tokens", "3"]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "the text is not UTF-8" in said
    assert "stdin" in said
    assert cli.main(["generate", str(talker), "--prompt", "\udcb1\udcb1", "--max-new-tokens", "3"]) == EXIT_BAD_INPUT
    assert "the text is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "reader", "code"),
    [
        ("print('x' * 100_000)", False, 141),
        ("print('x')", False, 141),  # met when the buffer is flushed
        ("print('x')", True, 0),
        ("os.write(broken, b'x')", True, EXIT_INTERNAL),  # another process died
    ],
)
def test_a_reader_that_leaves_early_is_no_bug(action, reader, code):
    program = (
        "import os, sys\nfrom megatron_steel import dist\nend, broken = os.pipe()\nos.close(end)\n"
        f"dist.set_up_logging()\nsys.exit(dist.exit_code(lambda: {action}))"
    )
    end, stdout = os.pipe()
    if not reader:
        os.close(end)
    done = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert done.returncode == code
    assert ("BrokenPipeError" in done.stderr) == (code == EXIT_INTERNAL)
    assert done.stderr == "" or code == EXIT_INTERNAL


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (None, "the tokenizer has no chat template"),
        (CHATML.replace("{{", "{% if message['role'] == 'assistant' %}{{ raise_exception('unknown role') }}{% endif %}{{", 1),
         "the chat template does not take these turns: unknown role"),
        ("{% for", "the chat template does not take these turns"),
    ],
    ids=["none", "unknown role", "broken"],
)  # fmt: skip
def test_a_template_that_takes_no_conversation_is_named_before_a_word_is_read(template, named, monkeypatch, tmp_path):
    write_letters(tmp_path, template=template)
    _say(monkeypatch, "hello\n")
    with pytest.raises(SteelError, match=named):
        chat(str(tmp_path))
    assert cli.sys.stdin.read() == "hello\n"
