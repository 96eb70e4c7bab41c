"""A row of each published set, as its makers write it, to the example that it holds."""

import pytest

from megatron_steel.data.sources import Broken, Rejected
from megatron_steel.post.sft_data.examples import check
from megatron_steel.post.sft_data.sources import holds_placeholder, is_chinese, table

SFT, DPO, GRPO = table("sft", "小钢", "钢铁厂"), table("dpo"), table("grpo")


def _turns(*contents):
    return [{"from": role, "value": content} for role, content in zip(("human", "gpt") * 9, contents, strict=False)]


INFINITY = {
    "id": 7,
    "conversations": _turns("天为什么蓝？", "因为散射。"),
    "label": None,
    "langdetect": "zh-cn",
    "source": "x",
}
USER, REPLY = ("user", "Why?"), "Because."
ROWS = {
    "infinity-instruct": (INFINITY, [("user", "天为什么蓝？"), ("assistant", "因为散射。")]),
    "ruozhiba": ({"instruction": "为什么？", "output": "因为。"}, [("user", "为什么？"), ("assistant", "因为。")]),
    "code-feedback": (
        {"id": 1, "messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]},
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    "openhermes": (
        {"conversations": [{"from": "human", "value": "Why?", "weight": None}, {"from": "gpt", "value": REPLY}], "source": "airoboros2.2",
         "category": "orca", "system_prompt": None},
        [USER, ("assistant", REPLY)],
    ),
    "webinstructsub": (
        {"orig_question": "?", "orig_answer": "!", "source": "s", "question": "Why?", "answer": REPLY, "index": 3},
        [USER, ("assistant", REPLY)],
    ),
    "self-cognition": (
        {"query": "你是谁？", "response": "我是{{AUTHOR}}的{{NAME}}。", "tag": "zh"},
        [("user", "你是谁？"), ("assistant", "我是钢铁厂的小钢。")],
    ),
    "messages": ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": REPLY}]}, [USER, ("assistant", REPLY)]),
    "alpaca": ({"instruction": "Why?", "input": "this", "output": REPLY}, [("user", "Why?\nthis"), ("assistant", REPLY)]),
    "sharegpt": ({"conversations": _turns("Why?", REPLY)}, [USER, ("assistant", REPLY)]),
    "firefly": ({"kind": "QA", "input": "Why?", "target": REPLY}, [USER, ("assistant", REPLY)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row(name):
    row, turns = ROWS[name]
    example = SFT[name].read(row)
    check(example)
    assert example.turns() == turns


def test_every_source_of_steel_llm_is_here():
    choice = {"wanjuan-exam", "openbookqa", "arc", "logiqa"}  # test_choices.py
    assert set(SFT) == set(ROWS) | choice
    assert {name for name, source in (SFT | GRPO).items() if source.benchmark} == {
        "openbookqa",
        "arc",
        "logiqa",
        "gsm8k",
    }


def test_a_system_line_in_its_own_column_or_in_the_turns():
    row = ROWS["openhermes"][0] | {"system_prompt": "Be brief."}
    assert SFT["openhermes"].read(row).prompt == (("system", "Be brief."), USER)
    row = row | {"conversations": [{"from": "system", "value": "Be long."}, *row["conversations"]]}
    assert SFT["openhermes"].read(row).prompt == (("system", "Be long."), USER)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("用 Python 写一个快速排序函数", True),
        ("为什么天是蓝的", True),
        ("Write a quick sort, 请", False),
        ("日本の首都はどこですか。東京です", False),
        ("서울은 어디입니까", False),
        ("1 + 1 = ?", False),
        ("", False),
    ],
)
def test_the_rule_for_chinese(said, verdict):
    assert is_chinese(said) == verdict


def test_the_label_decides_and_the_rule_where_there_is_none():
    read = SFT["infinity-instruct"].read
    english = INFINITY | {"conversations": _turns("Why?", "天空")}
    with pytest.raises(Rejected, match="not Chinese"):
        read(INFINITY | {"langdetect": "en"})
    assert read(english).replies == ("天空",)
    assert read(INFINITY | {"langdetect": ""}).replies == ("因为散射。",)
    with pytest.raises(Rejected, match="not Chinese"):
        read(english | {"langdetect": None})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"instruction": "who", "input": "", "output": "I am {{name}}, by {{ author }}."}, "I am 小钢, by 钢铁厂."),
        ({"instruction": "who", "input": "", "output": "I am <NAME>, by <AUTHOR>."}, "I am 小钢, by 钢铁厂."),
    ],
)
def test_names_of_the_model_and_its_maker(row, answer):
    assert SFT["self-cognition"].read(row).replies == (answer,)
    assert holds_placeholder(row)
    assert not holds_placeholder({"output": "I am EmoLLM."})
    with pytest.raises(Rejected, match="unknown placeholder"):
        SFT["self-cognition"].read(row | {"output": "I am {{model}}"})


@pytest.mark.parametrize("ending", [*list("<|im_end|>\n"), "<|im_end|>", "time"])
def test_no_ending_is_eaten(ending):
    """What `rstrip` of a set of characters did to the end of an answer."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"happened in {ending}"}]}
    assert SFT["messages"].read(row).replies == (f"happened in {ending}",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "role order"),
        ({"messages": []}, "role order"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]}, "empty question"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n"}]}, "empty answer"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "empty answer"),
    ],
)
def test_conversations_that_teach_nothing(change, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        check(SFT["messages"].read(change))


ASKED = {"role": "user", "content": "Why?"}
PAIR = {
    "source": "s", "prompt": "Why?", "chosen": [ASKED, {"role": "assistant", "content": "good"}], "chosen-rating": 5.0,
    "rejected": [ASKED, {"role": "assistant", "content": "bad"}], "rejected-rating": 1.0,
}  # fmt: skip
MORE = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("ultrafeedback-chinese", {"instruction": "Why?", "source": "s", "chosen_response": "good", "rejected_response": "bad",
                                   "chosen_rating": 4.5, "rejected_rating": 2.0}, (USER,)),
        ("ultrafeedback-binarized", PAIR, (USER,)),
        ("preferences", {"prompt": "Why?", "chosen": "good", "rejected": "bad"}, (USER,)),
        ("preferences", {"prompt": [ASKED], "chosen": PAIR["chosen"][1:], "rejected": PAIR["rejected"][1:]}, (USER,)),
        ("preferences", {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}, (USER,)),
        ("preferences", {"prompt": "Why?", "chosen": [ASKED, *MORE, PAIR["chosen"][1]], "rejected": [ASKED, *MORE, PAIR["rejected"][1]]},
         (USER, ("assistant", "So."), ("user", "And?"))),
        ("preferences", {"prompt": [ASKED, *MORE], "chosen": "good", "rejected": "bad"}, (USER, ("assistant", "So."), ("user", "And?"))),
    ],
)  # fmt: skip
def test_preferences_of_one_turn_and_of_several(name, row, prompt):
    example = DPO[name].read(row)
    check(example)
    assert (example.prompt, example.replies) == (prompt, ("good", "bad"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": [{"role": "user", "content": "What?"}, PAIR["rejected"][1]]}, "prompts differ"),
        ({"prompt": "When?"}, "prompts differ"),
        ({"rejected": PAIR["chosen"]}, "chosen equals rejected"),
        ({"rejected": [ASKED, {"role": "assistant", "content": ""}]}, "empty answer"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "role order"),
        ({"chosen": [{"role": "critic", "content": "x"}]}, "unknown role"),
    ],
)
def test_pairs_that_compare_nothing(change, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        check(DPO["ultrafeedback-binarized"].read(PAIR | change))
    with pytest.raises(Broken):
        DPO["ultrafeedback-binarized"].read(PAIR | {"chosen": 5})


def test_gsm8k():
    row = {"question": "How many?", "answer": "2+3=<<2+3=5>>5\n#### 1,005"}
    example = GRPO["gsm8k"].read(row)
    assert example.answer == "1005"
    assert example.prompt[0][1] == 'How many? Let\'s think step by step and output the final answer after "####".'
    with pytest.raises(Rejected, match="no answer"):
        GRPO["gsm8k"].read(row | {"answer": "5"})
    for answer in ("1/2", "5 apples", "five", "$5", "1_000", "nan"):
        with pytest.raises(Rejected, match="answer is not a number"):
            GRPO["gsm8k"].read(row | {"answer": f"so #### {answer}"})
