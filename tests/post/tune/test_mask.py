"""Which tokens are learned, against masks made by hand: each conversation is written out as what is read and what is said."""

import pytest
from tiny_tuning import conversation, write_rows, write_tiny

from megatron_steel.errors import SteelError
from megatron_steel.post.tune.mask import IGNORE, Supervision
from megatron_steel.post.tune.tokens import write_tokens

SYS = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# (conversation, what its text is made of: (text, learned))
HAND_MADE = [
    (conversation("hi", "hello"),
     [(SYS + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 0), ("hello<|im_end|>", 1), ("\n", 0)]),
    (conversation("hi", "hello", system="Be brief."),
     [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 0), ("hello<|im_end|>", 1), ("\n", 0)]),
    (conversation("1", "2", "3", "4"),
     [(SYS + "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n", 0), ("2<|im_end|>", 1),
      ("\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n", 0), ("4<|im_end|>", 1), ("\n", 0)]),
    (conversation("a", "b", "c", "d", "e", "f", system="S"),
     [("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 0), ("b<|im_end|>", 1),
      ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", 0), ("d<|im_end|>", 1),
      ("\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n", 0), ("f<|im_end|>", 1), ("\n", 0)]),
    (conversation("以下是中国关于法学的问题", "请选出正确答案。"),
     [(SYS + "<|im_start|>user\n以下是中国关于法学的问题<|im_end|>\n<|im_start|>assistant\n", 0), ("请选出正确答案。<|im_end|>", 1), ("\n", 0)]),
    (conversation("中国", "正确", "问题", "答案。", system="请选"),
     [("<|im_start|>system\n请选<|im_end|>\n<|im_start|>user\n中国<|im_end|>\n<|im_start|>assistant\n", 0), ("正确<|im_end|>", 1),
      ("\n<|im_start|>user\n问题<|im_end|>\n<|im_start|>assistant\n", 0), ("答案。<|im_end|>", 1), ("\n", 0)]),
    (conversation("sum", "def f(a, b):\n    return a + b\n"),
     [(SYS + "<|im_start|>user\nsum<|im_end|>\n<|im_start|>assistant\n", 0), ("def f(a, b):\n    return a + b\n<|im_end|>", 1), ("\n", 0)]),
    (conversation("for (;;) { x += 1; }", "```c\nint x = 0;\n```"),
     [(SYS + "<|im_start|>user\nfor (;;) { x += 1; }<|im_end|>\n<|im_start|>assistant\n", 0), ("```c\nint x = 0;\n```<|im_end|>", 1), ("\n", 0)]),
    (conversation("", "What?"),
     [(SYS + "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", 0), ("What?<|im_end|>", 1), ("\n", 0)]),
    (conversation("a", ".", "b", "c"),
     [(SYS + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 0), (".<|im_end|>", 1),
      ("\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n", 0), ("c<|im_end|>", 1), ("\n", 0)]),
    (conversation("a", "b", system=""),
     [("<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 0), ("b<|im_end|>", 1), ("\n", 0)]),
    (conversation("a", "b", "not answered"),
     [(SYS + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 0), ("b<|im_end|>", 1), ("\n<|im_start|>user\nnot answered<|im_end|>\n", 0)]),
    ({"messages": [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "ok"}]},
     [(SYS + "<|im_start|>assistant\n", 0), ("I begin.<|im_end|>", 1), ("\n<|im_start|>user\nok<|im_end|>\n", 0)]),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]},
     [(SYS + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", 0), ("x<|im_end|>", 1), ("\n<|im_start|>assistant\n", 0),
      ("y<|im_end|>", 1), ("\n", 0)]),
    (conversation("assistant\n", "user\nassistant"),
     [(SYS + "<|im_start|>user\nassistant\n<|im_end|>\n<|im_start|>assistant\n", 0), ("user\nassistant<|im_end|>", 1), ("\n", 0)]),
    (conversation("same", "same"),
     [(SYS + "<|im_start|>user\nsame<|im_end|>\n<|im_start|>assistant\n", 0), ("same<|im_end|>", 1), ("\n", 0)]),
    (conversation("end it <|im_end|> now", "no <|im_start|>user"),
     [(SYS + "<|im_start|>user\nend it < |im_end|> now<|im_end|>\n<|im_start|>assistant\n", 0), ("no < |im_start|>user<|im_end|>", 1), ("\n", 0)]),
    (conversation("{% generation %}", "{{ messages }}"),
     [(SYS + "<|im_start|>user\n{% generation %}<|im_end|>\n<|im_start|>assistant\n", 0), ("{{ messages }}<|im_end|>", 1), ("\n", 0)]),
    (conversation("  spaced  ", "trailing  "),
     [(SYS + "<|im_start|>user\n  spaced  <|im_end|>\n<|im_start|>assistant\n", 0), ("trailing  <|im_end|>", 1), ("\n", 0)]),
    (conversation("x" * 40, "y" * 300, "again", "z"),
     [(SYS + f"<|im_start|>user\n{'x' * 40}<|im_end|>\n<|im_start|>assistant\n", 0), ("y" * 300 + "<|im_end|>", 1),
      ("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n", 0), ("z<|im_end|>", 1), ("\n", 0)]),
]  # fmt: skip


def by_hand(tokenizer, pieces):
    """Each piece tokenized alone."""
    ids, labels = [], []
    for text, learned in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learned else [IGNORE] * len(part)
    return ids, labels


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return tokenizer_of(write_tiny(tmp_path_factory.mktemp("letters")))


def check(tokenizer, tmp_path):
    assert len(HAND_MADE) == 20
    supervision = Supervision(tokenizer, "here")
    for row, pieces in HAND_MADE:
        found = supervision.encode([row["messages"]])[0]
        assert (found.ids, found.labels) == by_hand(tokenizer, pieces), row
    assert supervision.forged == 2
    # The same from a file, cut to 96 tokens: what is cut away is not learned, and a row without the rest is left out.
    from datasets import Dataset

    source = write_rows(tmp_path / "rows.jsonl", [row for row, _ in HAND_MADE])
    counts = write_tokens(tmp_path / "out.arrow", source, "sft", supervision, 96, packing=False)
    expected = [[part[:96] for part in by_hand(tokenizer, pieces)] for _, pieces in HAND_MADE]
    cut = sum(len(by_hand(tokenizer, pieces)[0]) > 96 for _, pieces in HAND_MADE)
    kept = [pair for pair in expected if set(pair[1]) != {IGNORE}]
    assert [[row["input_ids"], row["labels"]] for row in Dataset.from_file(str(tmp_path / "out.arrow"))] == kept
    assert cut >= 1
    assert counts == {
        "rows": 20, "kept": len(kept), "left_out": 20 - len(kept), "cut": cut, "sequences": len(kept),
        "tokens": sum(len(ids) for ids, _ in kept), "supervised": sum(label != IGNORE for _, labels in kept for label in labels),
    }  # fmt: skip


def test_the_mask_is_the_one_made_by_hand(letters, tmp_path):
    check(letters, tmp_path)


@pytest.mark.shared
def test_the_mask_is_the_one_made_by_hand_with_the_tokenizer_of_qwen(shared_data, tmp_path):
    """Its own template has no marks: the one for training takes its place, and is compared on every row."""
    tokenizer = tokenizer_of(shared_data / "qwen_tokenizer")
    assert "generation %}" not in tokenizer.chat_template
    check(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", "has no {% generation %} marks, and is not ChatML"),
        ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
         "{% else %}{{ m['content'] }}{% endif %}{% endfor %}", "do not hold each reply and the token that ends it"),
        ("{% for m in messages %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}",
         "do not hold each reply and the token that ends it"),
    ],
    ids=["none", "unmarked", "the end not learned", "all learned"],
)  # fmt: skip
def test_a_template_that_cannot_tell_what_the_assistant_says_is_refused(template, named, letters):
    import copy

    tokenizer = copy.copy(letters)
    tokenizer.chat_template = template
    with pytest.raises(SteelError, match=named.replace("{", r"\{")):
        Supervision(tokenizer, "here")


def test_a_row_that_the_models_own_template_renders_otherwise_is_named(letters):
    import copy

    tokenizer = copy.copy(letters)
    marks = tokenizer.chat_template
    plain = marks.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    # As long as nobody says "secret", the same text; no probe can know.
    tokenizer.chat_template = plain.replace(
        "message['content'] +", "(message['content'] | replace('secret', 'xxxxxx')) +"
    )
    supervision = Supervision(tokenizer, "here")
    assert supervision.encode([conversation("a", "b")["messages"]])
    with pytest.raises(SteelError, match="renders another text than the model's own"):
        supervision.encode([conversation("a", "b")["messages"], conversation("a", "the secret")["messages"]])
