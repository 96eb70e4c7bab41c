"""Benchmark items in a corpus: the shapes of C-Eval, CMMLU and MMLU, what counts as overlap, report and removal."""

import json
import random

import pytest

from megatron_steel.data.decontaminate import Matcher
from megatron_steel.data.prepare import prepare
from megatron_steel.errors import SteelError

CEVAL = "下列关于税法基本原则的表述中，不正确的是____。纳税人依法享有的权利不包括下面哪一项"
CEVAL_SHORT = "以下正确的是"
CMMLU = "在农业生产中被当作极其重要的劳动对象发挥作用，最主要的不可替代的基本生产资料是"
MMLU = "A furnace of pure iron is heated above its melting point; what happens, then, to the carbon which is dissolved in it?"
OPTIONS = ["税收法定原则包括税收要件法定", "税务合法性原则", "税收公平原则源于法律", "程序优于实体"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for sub in ("ceval", "cmmlu", "mmlu"):
        (folder / sub).mkdir()
    options = ",".join(OPTIONS)
    (folder / "ceval/tax_val.csv").write_text(
        f"id,question,A,B,C,D,answer\n0,{CEVAL},{options},C\n1,{CEVAL_SHORT},{options},A\n2,对吗,是,否,都对,都错,A\n",
        encoding="utf-8-sig",
    )
    (folder / "cmmlu/agronomy.csv").write_text(
        f",Question,A,B,C,D,Answer\n0,{CMMLU},农业生产工具,土地,劳动力,资金,B\n", encoding="utf-8"
    )
    (folder / "mmlu/metals_test.csv").write_text(
        f'"{MMLU}","It\nstays","It leaves","It burns","None",A\n', encoding="utf-8"
    )
    (folder / "gsm.jsonl").write_text(
        json.dumps({"question": "Natalia sold clips to forty eight of her friends in April.", "answer": "72"})
    )
    (folder / "arc.json").write_text(
        json.dumps(
            [
                {
                    "question": "Which?",
                    "choices": {"text": ["an iron ore of the mountain", "a cold river stone"], "label": ["A", "B"]},
                }
            ]
        )
    )
    return folder


def found(matcher, text):
    return [(matcher.files[matcher.items[hit.item].file], matcher.items[hit.item].number) for hit in matcher.find(text)]


def test_the_shapes_are_read(benchmarks):
    matcher = Matcher([str(benchmarks)])
    assert matcher.files == ["arc.json", "ceval/tax_val.csv", "cmmlu/agronomy.csv", "gsm.jsonl", "mmlu/metals_test.csv"]
    assert matcher.counts == [1, 3, 1, 1, 1]
    assert matcher.unmatchable == [0, 1, 0, 0, 0]


def test_items_are_found_in_other_dress(benchmarks):
    matcher = Matcher([str(benchmarks)])
    dressed = f"一、{CEVAL.replace('____', '（　）').replace('，', ' , ')} A．甲 B．乙"
    assert found(matcher, dressed) == [("ceval/tax_val.csv", 1)]
    assert found(matcher, "前文。" + CMMLU[3:28] + "后文") == [("cmmlu/agronomy.csv", 1)]
    assert found(matcher, "Q: " + MMLU.upper().replace(" ", "\n")) == [("mmlu/metals_test.csv", 1)]
    short = "\n".join([CEVAL_SHORT, *(f"{label}. {text}" for label, text in zip("ABCD", OPTIONS, strict=True))])
    assert found(matcher, "题：" + short) == [("ceval/tax_val.csv", 2)]
    assert found(matcher, "Natalia sold clips to forty-eight of her friends in April") == [("gsm.jsonl", 1)]
    assert found(matcher, "which A an iron ore of the mountain B a cold river stone") == [("arc.json", 1)]


def test_what_does_not_count(benchmarks):
    matcher = Matcher([str(benchmarks)])
    for text in (
        CEVAL_SHORT,
        "对吗 A 是 B 否 C 都对 D 都错",
        CEVAL[:10] + "甲" + CEVAL[11:20] + "乙",
        "",
        "钢" * 500,
        " ".join(MMLU.split()[:12]),
    ):
        assert found(matcher, text) == []
    assert found(matcher, CMMLU[:20]) == [("cmmlu/agronomy.csv", 1)]
    assert found(matcher, CMMLU[:19]) == []


def brute(question, text):
    """Do they share a run of 13 words or 20 characters, or is all of a question of 8 or 12 in the text?"""
    n = 20 if question[0] > "z" else 13
    least = {20: 12, 13: 8}[n]
    runs = {tuple(text[i : i + size]) for size in {n, len(question)} for i in range(len(text) - size + 1)}
    if len(question) < n:
        return len(question) >= least and tuple(question) in runs
    return any(tuple(question[i : i + n]) in runs for i in range(len(question) - n + 1))


@pytest.mark.parametrize("alphabet", ["abc", "钢铁是"])
def test_anchors_find_what_a_comparison_of_everything_finds(tmp_path, alphabet):
    """Random walks with spliced pieces: every length of overlap at every phase of the anchors."""
    draw = random.Random(5)
    walk = lambda size: [draw.choice(alphabet) for _ in range(size)]  # noqa: E731
    questions = [walk(draw.randint(6, 60)) for _ in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": " ".join(q)}) + "\n" for q in questions))
    matcher = Matcher([str(tmp_path / "q.jsonl")])
    outcomes = set()
    for _ in range(400):
        question = draw.choice(questions)
        begin = draw.randrange(len(question))
        text = walk(draw.randint(0, 30)) + question[begin : begin + draw.randint(5, 30)] + walk(draw.randint(0, 30))
        expected = [i for i, q in enumerate(questions, 1) if brute(q, text)]
        assert [number for _, number in found(matcher, " ".join(text))] == expected
        outcomes.add(bool(expected))
    assert outcomes == {True, False}


ROWS = [
    "一段与考题毫无关系的普通文字，讲的是炼钢的历史。",
    f"真题：{CEVAL}",
    f"{CMMLU}，答案是土地。{CEVAL}",
    "A text about nothing in particular, long enough.",
]


def run(tmp_path, benchmarks, name, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    report = prepare(
        "text", [tmp_path / "in.jsonl"], tmp_path / f"{name}.jsonl", workers=1, decontaminate=[benchmarks], **settings
    )
    return report, [json.loads(line)["row"] for line in (tmp_path / f"{name}.jsonl").open()]


def test_contaminated_rows_are_reported_and_removed_when_asked(tmp_path, benchmarks):
    report, rows = run(tmp_path, benchmarks, "all")
    assert rows == [1, 2, 3, 4]
    assert report["contaminated"] == 2
    entries = {entry["file"]: entry for entry in report["benchmarks"]}
    ceval = entries["ceval/tax_val.csv"]
    assert (ceval["items"], ceval["too_short"], ceval["items_found"]) == (3, 1, 1)
    (example,) = ceval["examples"]
    assert (example["item"], example["rows"], example["file"], example["row"]) == (1, 2, "in.jsonl", 2)
    assert example["shared"].replace(" ", "").startswith("下列关于税法基本原则的表述中不正确的是")
    assert entries["cmmlu/agronomy.csv"]["items_found"] == 1
    assert entries["gsm.jsonl"]["items_found"] == 0
    report, rows = run(tmp_path, benchmarks, "clean", remove_contaminated=True)
    assert rows == [1, 4]
    assert report["rejected"] == {"contaminated": 2}


def test_a_chat_is_searched_without_its_template(tmp_path, benchmarks):
    turns = [{"role": "user", "content": MMLU}, {"role": "assistant", "content": "It stays where it was, mostly."}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": turns}))
    report = prepare(
        "messages", [tmp_path / "in.jsonl"], tmp_path / "o.jsonl", workers=1, decontaminate=[benchmarks / "mmlu"]
    )
    assert report["contaminated"] == 1


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.csv", "a,b,c\n1,2,3\n", "columns of this CSV file are not known"),
        ("a.csv", "question,A,B\nx,1\n", "row 1 has 2 columns"),
        ("a.csv", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", '{"q": "x"}\n', "a row has no question"),
        ("a.jsonl", "{\n", "row 1: not JSON"),
        ("none", None, "no such benchmark"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_named(tmp_path, name, raw, says):
    if raw is not None:
        (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(SteelError, match=says) as caught:
        Matcher([str(tmp_path / name)])
    assert name in caught.value.where
    (tmp_path / "empty").mkdir()
    with pytest.raises(SteelError, match="holds no benchmark"):
        Matcher([str(tmp_path / "empty")])
