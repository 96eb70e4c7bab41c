"""The extractor on replies written by hand, in the ways models answer; each expectation is what a person would read."""

from decimal import Decimal

import pytest

from megatron_steel.post.extract import extract_choice, extract_number

CITIES = ["北京", "上海", "广州", "深圳"]
ENGLISH = ["a man of letters", "Paris", "New York", "York"]
REPLIES = [
    ("答案是B", "B"),
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("B. 上海", "B"),
    ("（C）", "C"),
    ("Ｄ", "D"),
    ("故选C。", "C"),
    ("故选：Ｃ", "C"),
    ("选项 D 正确", "D"),
    ("选项D是正确的，其他选项都是错误的。", "D"),
    ("A 不对，应选 B", "B"),
    ("答案不是A，而是B。", "B"),
    ("不选A，选C", "C"),
    ("答案：**D**", "D"),
    ("正确答案为：D. 深圳", "D"),
    ("参考答案 A", "A"),
    ("本题应该选择A选项", "A"),
    ("答案是b。", "B"),
    (r"答案是 $\boxed{C}$", "C"),
    (r"最终答案是：$\boxed{\text{C}}$", "C"),
    ("以上选项中，B最合适", "B"),
    ("题目要求选出错误的一项。A正确，B正确，C错误，D正确。故答案选C", "C"),
    ("我认为B比较合理", "B"),
    ("B 因为上海是直辖市", "B"),
    ("A：错误；B：正确；C：错误；D：错误", "B"),
    ("排除A和C，D项也不符合题意，故选B", "B"),
    ("A选项说的是北京，不符合题意。B选项说的是上海，符合题意。最终答案：B", "B"),
    ("先看选项A：首都。再看选项B：金融中心。\n最终答案是（ B ）", "B"),
    ("答案可能是A，不过再想一想，答案应该是D。", "D"),
    ("一步步思考：A 指北京，C 指广州。\n最后的答案：C", "C"),
    ("上海是中国最大的城市。\nB", "B"),
    ("上海是中国最大的城市。\n\nB. 上海", "B"),
    ("答案是上海。", "B"),
    ("上海", "B"),
    ("这座城市是深圳。", "D"),
    ("不是北京，是广州", "C"),
    ("<think>可能是A</think>答案是C", "C"),
    ("答案是A<|im_end|>\n<|im_start|>user\n答案是B", "A"),
    ("本题选B，不选A", "B"),
    ("A、B都不对，C正确", "C"),
    ("【答案】B\n【解析】选项C说的是广州", "B"),
    ("选项中正确的是C", "C"),
    ("答案是C，因为A和B都不对，D也不对。", "C"),
    ("选项C的说法不正确，所以选C", "C"),
    ("A选项错误，B选项错误，C选项错误，因此D", "D"),
    ("答案是A或B", None),
    ("A 和 B 都对", None),
    ("选A和C", None),
    ("答案：AB", None),
    ("A. 北京\nB. 上海\nC. 广州\nD. 深圳", None),
    ("抱歉，我无法回答这个问题。", None),
    ("", None),
    ("答案是E", None),
    ("北京和上海都有可能", None),
    ("A 不对", None),
    ("B超检查", None),
    ("维生素C对身体有好处", None),
    ("以下是一道单选题", None),
    ("正确选项是B，错误选项是A", "B"),
    ("答案选B\n\n【点评】本题容易误选A。", "B"),
    ("答案：B\n易错警示：很多同学会错选C", "B"),
    ("答案是B，因为选A会导致矛盾。", "B"),
    ("答案是B。\n如果选A，则错误。", "B"),
    ("答案：B\n解析：选A的同学没注意", "B"),
    ("答案是：上海。选项A北京不对。", "B"),
    ("答案可能是A，也可能是B", None),
    ("A。B。", None),
    ("容易误选A", None),
    ("错误的选项是D", "D"),
    ("不正确的选项是D", "D"),
    ("不符合题意的是D，符合题意的是B", "B"),
    ("<answer>B</answer>", "B"),
    ("先排除 A。\n<answer>\nB. 上海\n</answer>", "B"),
    ("答案=B", "B"),
    ("答案是_B_", "B"),
    ("答案: __B__", "B"),
    ("答案是『B』", "B"),
    ("选项为B", "B"),
    ("正确的有：B", "B"),
    ("B?", "B"),
    ("A. 错误\nB. 正确\nC. 错误\nD. 错误", "B"),
    ("本题先选A，不过再想一想，选B", "B"),
]
ENGLISH_REPLIES = [
    ("The answer is (C).", "C"),
    ("Answer: B", "B"),
    ("ANSWER IS D", "D"),
    ("The correct option is B, because A is wrong.", "B"),
    ("I would go with C.", "C"),
    ("A man of letters", "A"),  # the option's text, not the letter
    ("A man walked into the bar and ordered a drink.", None),
    ("The answer is a mystery to me.", None),
    ("I don't know.", None),
    ("As an AI model I cannot answer that.", None),
    ("A is wrong and B is wrong. D is correct.", "D"),
    ("The answer is not A but B", "B"),
    ("It is New York.", "C"),
    ("It must be York.", "D"),
    ("Both B and C are right", None),
    ("Let's think. Option A is a person. Option C is a city.\nFinal answer: C", "C"),
    ("Paris", "B"),
    ("the answer is b) Paris", "B"),
    ("Either Paris or New York", None),
    ("A because the question asks for a person", "A"),
    ("The correct answer is B; the incorrect answer is A", "B"),
    ("The answer is B. You could not choose A", "B"),
    ("The answer is B. Do not pick A, and never choose C.", "B"),
    ("I don't think it's A.", None),
    ("I don’t think the answer is A.", None),
    ("A. a man of letters is wrong", None),
    ("B is the answer.", "B"),
    ("I'd say B", "B"),
    ("So, B.", "B"),
    ("Correct: B", "B"),
    ("Incorrect: B", None),
]


@pytest.mark.parametrize(("reply", "letter"), REPLIES)
def test_chinese_replies(reply, letter):
    assert extract_choice(reply, CITIES) == letter


@pytest.mark.parametrize(("reply", "letter"), ENGLISH_REPLIES)
def test_english_replies(reply, letter):
    assert extract_choice(reply, ENGLISH) == letter


def test_letters_go_as_far_as_the_options():
    assert extract_choice("答案是E", [*CITIES, "天津"]) == "E"
    assert extract_choice("答案是C", CITIES[:2]) is None
    assert extract_choice("答案是C", ["", "", "", ""]) == "C"
    assert extract_choice("上海", ["", "", "", ""]) is None


def test_options_that_are_verdicts_are_not_read_as_verdicts():
    assert extract_choice("A. 正确\nB. 错误", ["正确", "错误"]) is None
    assert extract_choice("A. 正确", ["正确", "错误"]) == "A"
    assert extract_choice("B. 不变", ["变大", "不变"]) == "B"


def test_numbers_in_options_are_whole_numbers():
    assert extract_choice("结果等于 14", ["4", "14", "1", "0.14"]) == "B"
    assert extract_choice("答案是 0.14", ["4", "14", "1", "0.14"]) == "D"
    assert extract_choice("结果等于 140", ["4", "14", "1", "0.14"]) is None


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("48 / 2 = 24, so 24 + 48 = 72.\n#### 72", "72"),
        ("She pays $1,234.50 in all.", "1234.50"),
        ("#### -5 apples", "-5"),
        ("一共 12 个。", "12"),
        ("答案是3.14。", "3.14"),
        ("about 1e5", "1e5"),
        ("10-5", "5"),
        ("10–5", "5"),
        ("#### −5", "-5"),
        ("#### –5", "-5"),
        ("the answer is −5", "-5"),
        ("#### 1/2", None),
        ("#### 1 000", "1000"),
        ("#### 12 345 678 apples", "12345678"),
        ("#### 72\n\nThat's step 3.", "72"),
        ("2 + 2 = 4\n#### four", None),
        ("__import__('os').system('true')", None),
        ("the answer is 3 * 4", "4"),
        ("no idea", None),
    ],
)
def test_numbers_are_read_and_never_computed(reply, number):
    assert extract_number(reply) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    "piece",
    [
        "答案",
        "(",
        "选项( ",
        "A、",
        "不",
        "\n",
        "A\n",
        "答案是A和B和",
        "\\boxed{",
        "A也",
        "not ",
        "故选",
        "so ",
        "_",
        "A,也可能是",
        "<answer>",
        "n't think that ",
        "A.正确",
        "选项是",
    ],
)
def test_no_reply_makes_reading_run_away(piece):
    """Patterns that backtrack take minutes over these; each is read in a few hundredths of a second."""
    assert extract_choice(piece * 4000, CITIES) in (None, "A")
