"""The training template renders the text of pretraining, and marks what the assistant says: no more, no less."""

import json

import pytest
from toy_models import CHATML, write_letters
from transformers import AutoTokenizer

from megatron_steel.data.chat_template import chatml_template, training_template, training_template_of
from megatron_steel.data.chatml import chatml
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.errors import SteelError

USER = ["你好，钢铁是怎样炼成的？", "What is 3 + 4?", "def f(x):\n    return x", " a\n", "🙂 一", "请写诗。", "x" * 50]
REPLY = [
    "在一千五百度的高温里。",
    "It is 7.",
    "它返回 x。\n",
    "  two  spaces",
    "好的 👍",
    "床前明月光，\n疑是地上霜。",
    "{% if %}",
]
CONVERSATIONS = [
    turns[i:]
    for rounds in (1, 2, 3, 5)
    for i, first in ((1, ""), (1, "-"), (0, "你是铁匠。"), (0, "You are a smith.\n"), (0, ""))
    for turns in [[("system", first)] + [
        turn for r in range(rounds)
        for turn in (("user", USER[(r + 2 * rounds + i) % 7] + first), ("assistant", REPLY[(r + 3 * rounds + len(first)) % 7]))
    ]]
]  # fmt: skip


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def by_hand(tokenizer, turns):
    """(ids, mask) from pieces that are encoded each for itself: no template, no offsets."""
    if turns[0][0] != "system":
        turns = [("system", "You are a helpful assistant."), *turns]
    ids, mask = [], []
    for role, content in turns:
        for text, counts in (f"<|im_start|>{role}\n", 0), (f"{content}<|im_end|>", int(role == "assistant")), ("\n", 0):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, mask = ids + piece, mask + [counts] * len(piece)
    return ids, mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    text = " ".join(USER + REPLY) * 20
    (folder / "c.jsonl").write_text(json.dumps({"text": text}) + "\n")
    train_tokenizer([folder / "c.jsonl"], folder / "tokenizer", 420)
    return folder / "tokenizer"


def check(tokenizer, template):
    assert len({str(turns) for turns in CONVERSATIONS}) == 20
    for turns in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages(turns), chat_template=template, tokenize=False)
        assert text == chatml(turns) + "<|im_end|>\n"
        found = tokenizer.apply_chat_template(
            messages(turns), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert (found["input_ids"], found["assistant_masks"]) == by_hand(tokenizer, turns)
    open_turn = tokenizer.apply_chat_template(
        messages(CONVERSATIONS[0][:1]), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert open_turn == chatml([*CONVERSATIONS[0][:1], ("assistant", "")])


@pytest.mark.shared
def test_qwens_tokenizer_gets_ours_and_twenty_masks_are_those_made_by_hand(shared_data):
    template = training_template(shared_data / "qwen_tokenizer")
    assert template == chatml_template()
    check(AutoTokenizer.from_pretrained(str(shared_data / "qwen_tokenizer")), template)


def test_a_tokenizer_that_was_trained_here_with_and_without_its_template(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert training_template(trained) == chatml_template()
    tokenizer.chat_template = None
    template = training_template_of(tokenizer)
    check(tokenizer, template)
    tokenizer.chat_template = template
    assert training_template_of(tokenizer) == template


def test_the_line_that_a_template_puts_first_is_kept(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.chat_template = CHATML
    assert training_template_of(tokenizer) == chatml_template(None)
    line = 'You\'re "Steel", \\n 钢\n{{ x }}.'
    unmarked = chatml_template(line).replace("endgeneration", "endif").replace("generation %", "if true %")
    tokenizer.chat_template = {"default": unmarked, "rag": "r"}
    template = training_template_of(tokenizer)
    assert template == chatml_template(line)
    text = tokenizer.apply_chat_template(messages([("user", "a")]), chat_template=template, tokenize=False)
    assert text == f"<|im_start|>system\n{line}<|im_end|>\n<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize(
    "change",
    [
        ("message['content'] +", "message['content'] | trim +"),
        ("message['role'] +", "(message['role'] | upper) +"),
        ("{% for", "{% if tools %}{{ tools | length }}{% endif %}{% for"),
        ("{% for", "{{ strftime_now('%d') }}{% for"),
        ("{% for", "{{ raise_exception('no') }}{% for"),
        ("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
        ("loop", "loop"),
    ],
)  # fmt: skip
def test_a_template_that_says_anything_else_gets_none(change, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.chat_template = CHATML.replace(*change)
    assert (training_template_of(tokenizer) is None) == (change[0] != "loop")


def test_without_chatmls_tokens_there_is_none(tiny_tokenizer, tmp_path):
    assert training_template(tiny_tokenizer) is None
    (tmp_path / "x.model").write_bytes(b"x")
    assert training_template(tmp_path / "x.model") is None
    with pytest.raises(SteelError, match="cannot load this tokenizer"):
        training_template(tmp_path)
    write_letters(tmp_path / "m", template=None)
    assert training_template(tmp_path / "m") == chatml_template()
