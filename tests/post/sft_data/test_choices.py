"""Rows of choice sets as they are published, to the prompt and the answer that a model is trained on."""

import pytest

from megatron_steel.data.sources import Broken, Rejected
from megatron_steel.post.extract import extract_choice
from megatron_steel.post.sft_data.choices import english_choice, logiqa, wanjuan_exam, wanjuan_exam_explained

EXAM = {
    "id": "BkQQW", "q_type": "单选题", "q_main": "下列物质中，属于纯净物的是（ ）", "option_a": "空气",
    "option_b": "蒸馏水", "option_c": "海水", "option_d": "石灰石", "option_e": "", "std_ans": "B",
    "answer_detail": "空气、海水和石灰石都由多种物质混合而成；蒸馏水只由水一种物质组成。故选B。",
    "grade": "初中", "major": "化学", "keypoint": "纯净物",
}  # fmt: skip
EXPLANATION = "空气、海水和石灰石都由多种物质混合而成；蒸馏水只由水一种物质组成。"
LINES = "下列物质中，属于纯净物的是（ ）\nA. 空气\nB. 蒸馏水\nC. 海水\nD. 石灰石\n"
HEAD = "The following is a multiple-choice question. Please choose the most suitable one among {} as the answer to this question.\n\n"


def _pair(example):
    ((role, prompt),) = example.prompt
    assert role == "user"
    return prompt, example.replies[0]


def test_an_exam_question_with_an_explanation():
    example = wanjuan_exam(EXAM)
    assert _pair(example) == (f"以下是一道单选题:\n{LINES}请先给出解释再给出答案。\n", f"{EXPLANATION}\n答案为B")
    assert (example.answer, example.options) == ("B", ("空气", "蒸馏水", "海水", "石灰石"))


@pytest.mark.parametrize("detail", ["", "略", "略。", "解析：略", "见答案", "略（见答案）", None, "水是纯净物"])
def test_an_exam_question_without_an_explanation(detail):
    said = "B。水是纯净物" if detail == "水是纯净物" else "B"
    assert _pair(wanjuan_exam(EXAM | {"answer_detail": detail})) == (f"以下是一道单选题:\n{LINES}请给出答案。\n", said)


@pytest.mark.parametrize(
    ("ending", "kept"),
    [
        ("故选B。", ""), ("故选：B．", ""), ("故答案为：B", ""), ("因此，本题应选择（B）。", ""), ("综上所述，答案为B，故选B。", ""), ("综上，选B。", ""), ("故选B，蒸馏水。", ""),
        ("故不选A。", "故不选A。"), ("故为A类物质。", "故为A类物质。"), ("故选项A错误。", "故选项A错误。"), ("故选B；A是混合物。", "故选B；A是混合物。"),
    ],
)  # fmt: skip
def test_only_a_conclusion_at_the_end_is_cut(ending, kept):
    said = _pair(wanjuan_exam(EXAM | {"answer_detail": EXPLANATION + ending}))[1]
    assert said == f"{EXPLANATION}{kept}\n答案为B"


def test_a_word_that_holds_the_character_for_omitted_is_kept():
    assert "战略" in _pair(wanjuan_exam(EXAM | {"answer_detail": "这是一项长远的战略，蒸馏水才是纯净物。"}))[1]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"q_type": "多选题", "std_ans": "A、C", "answer_detail": ""}, "多选题", "AC"),
        ({"q_type": "", "std_ans": "CA", "answer_detail": ""}, "多选题", "AC"),
        ({"q_type": "", "answer_detail": ""}, "单选题", "B"),
        ({"q_type": "选择题", "std_ans": "(b)", "answer_detail": ""}, "选择题", "B"),
        ({"q_type": "多选题", "std_ans": "Ａ和Ｃ。", "answer_detail": ""}, "多选题", "AC"),
    ],
)
def test_the_type_is_the_rows_own_or_follows_from_its_key(change, kind, said):
    assert _pair(wanjuan_exam(EXAM | change)) == (f"以下是一道{kind}:\n{LINES}请给出答案。\n", said)


@pytest.mark.parametrize(("kind", "answer"), [("填空题", "氧气"), ("判断题", "正确"), ("解答题", "x=3")])
def test_a_question_without_options_keeps_its_type(kind, answer):
    row = (
        EXAM | {f"option_{letter}": "" for letter in "abcd"} | {"q_type": kind, "std_ans": answer, "answer_detail": ""}
    )
    example = wanjuan_exam(row)
    assert _pair(example) == (f"以下是一道{kind}:\n{EXAM['q_main']}\n请给出答案。\n", answer)
    assert example.answer == ""


def test_options_that_bring_their_letters_and_options_inside_the_question():
    row = EXAM | {"option_a": "A．空气", "option_b": "B、蒸馏水", "option_c": "C. 海水", "option_d": "D:石灰石"}
    assert _pair(wanjuan_exam(row)) == _pair(wanjuan_exam(EXAM))
    inside = (
        EXAM
        | {f"option_{letter}": None for letter in "abcde"}
        | {"q_main": "纯净物是？A．空气 B．水", "answer_detail": ""}
    )
    assert _pair(wanjuan_exam(inside)) == ("以下是一道单选题:\n纯净物是？A．空气 B．水\n请给出答案。\n", "B")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"std_ans": ""}, "no answer"),
        ({"std_ans": None}, "no answer"),
        *(({"std_ans": answer}, "no answer") for answer in ("略", "见解析", "略(见答案)", "略，详见解析。", "（略）")),
        ({"answer_detail": "综上所述，答案为A，故选B。"}, "explanation and answer differ"),
        ({"answer_detail": "综上所述，答案为B，故选A。"}, "explanation and answer differ"),
        ({"q_main": " "}, "empty question"),
        ({"std_ans": "E"}, "answer is none of the options"),
        ({"std_ans": "蒸馏水"}, "answer is not a letter"),
        ({"std_ans": "AB"}, "several answers to a single choice"),
        ({"option_b": ""}, "an empty option"),
        ({"option_b": "空气"}, "two options alike"),
        ({"std_ans": "C"}, "explanation and answer differ"),
        ({f"option_{letter}": "" for letter in "abcd"}, "no options"),
    ],
)
def test_what_no_model_should_learn_is_rejected_by_name(change, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        wanjuan_exam(EXAM | change)


@pytest.mark.parametrize("row", [{"content": "text"}, EXAM | {"std_ans": 2}, {"q_main": "x"}])
def test_a_row_of_another_form_is_broken(row):
    with pytest.raises(Broken):
        wanjuan_exam(row)


def test_for_a_reward_the_explanation_is_asked_for_though_the_row_has_none():
    example = wanjuan_exam_explained(EXAM | {"answer_detail": ""})
    assert example.prompt[0][1] == f"以下是一道单选题:\n{LINES}请先给出解释再给出答案。\n"
    assert (example.answer, len(example.options)) == ("B", 4)


OPENBOOKQA = {
    "id": "7-980", "question_stem": "The sun is responsible for",
    "choices": {"text": ["puppies learning new tricks", "children growing up", "plants sprouting", "flowers wilting in a vase"],
                "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}  # fmt: skip
ARC = {
    "id": "MCAS_1", "question": "Which gas do plants take in?",
    "choices": {"text": ["oxygen", "carbon dioxide", "helium", "neon"], "label": ["1", "2", "3", "4"]}, "answerKey": "2",
}  # fmt: skip


def test_openbookqa():
    lines = (
        "A. puppies learning new tricks\nB. children growing up\nC. plants sprouting\nD. flowers wilting in a vase\n"
    )
    expected = HEAD.format("A, B, C and D") + "The sun is responsible for\n" + lines
    assert _pair(english_choice(OPENBOOKQA)) == (expected, "C. plants sprouting")


def test_arc_with_numbers_for_letters():
    lines = "A. oxygen\nB. carbon dioxide\nC. helium\nD. neon\n"
    assert _pair(english_choice(ARC)) == (
        HEAD.format("A, B, C and D") + "Which gas do plants take in?\n" + lines,
        "B. carbon dioxide",
    )


@pytest.mark.parametrize(
    ("count", "names", "key"), [(3, "A, B and C", "C"), (5, "A, B, C, D and E", "E"), (2, "A and B", "B")]
)
def test_three_and_five_options(count, names, key):
    choices = {"text": [f"gas {i}" for i in range(count)], "label": list("ABCDE"[:count])}
    prompt, answer = _pair(english_choice(ARC | {"choices": choices, "answerKey": key}))
    assert prompt.startswith(HEAD.format(names))
    assert (prompt.count("\ngas"), prompt.count(". gas"), answer) == (0, count, f"{key}. gas {count - 1}")


def test_the_authors_own_json_lines():
    inner = {
        "stem": ARC["question"],
        "choices": [{"text": t, "label": x} for t, x in zip(ARC["choices"]["text"], "1234", strict=True)],
    }
    assert english_choice({"id": "1", "question": inner, "answerKey": "2"}) == english_choice(ARC)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answerKey": ""}, "no answer"),
        ({"answerKey": "E"}, "answer is none of the options"),
        ({"answerKey": "A"}, "answer is none of the options"),
        ({"choices": {"text": ["x"], "label": ["1"]}}, "answer is none of the options"),
        ({"choices": {"text": ["x", ""], "label": ["1", "2"]}}, "an empty option"),
    ],
)
def test_a_key_that_fits_nothing_is_rejected_and_repeats_no_other_row(change, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        english_choice(ARC | change)


LOGIQA2 = {
    "id": 1,
    "answer": 2,
    "text": "All cats sleep.",
    "type": "{}",
    "question": "What follows?",
    "options": ["a dog", "a cow", "a cat sleeps", "none"],
}


@pytest.mark.parametrize(
    "row",
    [
        LOGIQA2,
        {"context": "All cats sleep.", "query": "What follows?", "options": LOGIQA2["options"], "correct_option": "2"},
        {"label": "c", "context": "All cats sleep.", "question": "What follows?", "options": LOGIQA2["options"]},
    ],
)
def test_logiqa_in_its_three_published_forms(row):
    lines = "A. a dog\nB. a cow\nC. a cat sleeps\nD. none\n"
    expected = HEAD.format("A, B, C and D") + "context: All cats sleep.\nquestion: What follows?\n" + lines
    assert _pair(logiqa(row)) == (expected, "C. a cat sleeps")


def test_logiqa_of_another_form():
    for change in ({"answer": None}, {"answer": 1.5}, {"options": "a, b"}):
        with pytest.raises(Broken):
            logiqa(LOGIQA2 | change)
    with pytest.raises(Rejected, match="none of the options"):
        logiqa(LOGIQA2 | {"answer": 4})


@pytest.mark.parametrize("example", [wanjuan_exam(EXAM), wanjuan_exam(EXAM | {"answer_detail": ""}), english_choice(OPENBOOKQA),
                                     english_choice(ARC), logiqa(LOGIQA2)])  # fmt: skip
def test_what_is_learnt_is_what_the_extractor_reads(example):
    assert extract_choice(example.replies[0], example.options) == example.answer
