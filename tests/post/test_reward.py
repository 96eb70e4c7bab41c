"""Rewards: the reply alone decides, in the call forms of TRL and verl, and no text is ever run."""

import ast
import inspect

import pytest

from megatron_steel.post import extract, reward
from megatron_steel.post.reward import compute_score, score, trl_reward

# Five questions, each answered rightly in three wordings: read with their prompts, most of them used to be "A".
QUESTIONS = [
    ("下列哪座城市是中国的首都？", ("上海", "北京", "广州", "深圳"), "B"),
    ("水的化学式是", ("CO2", "O2", "H2O", "NaCl"), "C"),
    ("Which planet is the largest?", ("Mars", "Venus", "Earth", "Jupiter"), "D"),
    ("一年有多少个月？", ("十二", "十", "八", "六"), "A"),
    ("Which of these is a mammal?", ("a trout", "a bat", "a lizard", "a beetle"), "B"),
]
WORDINGS = ["答案是{letter}。", "{letter}. {text}", "我们逐一分析各个选项，最终答案：{letter}"]


def _prompt(question, options):
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    return f"以下是一道单选题:\n{question}\n{lines}请先给出解释再给出答案。\n"


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize(("question", "options", "letter"), QUESTIONS)
def test_fifteen_right_replies_are_right_whatever_the_prompt_lists(question, options, letter, wording):
    reply = wording.format(letter=letter, text=options["ABCD".index(letter)])
    prompt = [{"role": "user", "content": _prompt(question, options)}]
    for other in "ABCD":
        right = float(other == letter)
        assert trl_reward(prompts=[prompt], completions=[[{"role": "assistant", "content": reply}]], answer=[other],
                          options=[list(options)], completion_ids=[[1]], trainer_state=None) == [right]  # fmt: skip
        assert compute_score("wanjuan-exam", reply, other, {"options": list(options), "prompt": prompt}) == right


@pytest.mark.parametrize(
    "reply", ["", "不知道", "A 或 B", "A. 上海\nB. 北京\nC. 广州\nD. 深圳", "不是 B", "__import__('os').system('true')"]
)
def test_no_plain_answer_is_worth_nothing(reply):
    _, options, letter = QUESTIONS[0]
    assert score(reply, letter, options) == 0.0


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("2 + 3 = 5\n#### 5", "5", 1.0),
        ("so he has $1,005.00.\n#### 1,005", "1005", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### −3", "-3", 1.0),
        ("#### −3", "3", 0.0),
        ("#### 1/2", "2", 0.0),
        ("#### 0.50", ".5", 1.0),
        ("#### 18 dollars", "#### 18", 1.0),
        ("It is 17 or so, thus 18", "18", 1.0),
        ("#### 181", "18", 0.0),
        ("#### 18\nNo: #### 19", "18", 0.0),
        ("eighteen", "18", 0.0),
        ("", "18", 0.0),
        ("#### 2*9", "18", 0.0),
        ("#### " + "9" * 10_000, "18", 0.0),
    ],
)
def test_numbers(reply, answer, right):
    assert trl_reward([reply], [answer]) == [right]
    assert compute_score("gsm8k", reply, answer) == right


def test_several_completions_of_several_questions():
    options = [list(QUESTIONS[0][1]), []]
    completions = [[{"role": "assistant", "content": "答案是B"}], [{"role": "assistant", "content": "#### 7"}]]
    assert trl_reward(completions, ["B", "8"], options=options) == [1.0, 0.0]
    assert trl_reward([[]], ["B"], options=options[:1]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        *((answer, ("x", "y")) for answer in ("E", "AB", "")),
        *((answer, ()) for answer in ("five", "", "1/2", "$5", "50%", "5 apples", "nan", "1_000", "inf", "1e3", "5.")),
    ],
)
@pytest.mark.parametrize("reply", ["#### 5", "#### 0.5", "no idea", ""])
def test_a_row_whose_answer_nobody_can_give_is_an_error_not_a_zero(answer, options, reply):
    with pytest.raises(ValueError, match="the answer"):
        score(reply, answer, options)


def test_nothing_of_a_reply_is_run():
    for module in (reward, extract):
        names = {node.id for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}
