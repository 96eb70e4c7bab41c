"""Every corpus by its rule: the real samples where there are some, rows made by hand where there are none."""

import hashlib
import json
from collections import Counter

import pyarrow.parquet
import pytest

from megatron_steel.data import sources
from megatron_steel.data.prepare import prepare

HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return HEAD + "<|im_end|>\n".join(f"<|im_start|>{role}\n{text}" for role, text in zip(roles, texts, strict=False))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# source: files, rows, kept, rejected, sha256 of the output
SAMPLES = {
    "skypile": ("sky/*.jsonl", 500, 500, {}, "3fdf6890ab592e6ab8fe42499825f5bedc6da9c4c261637143ee361c6c26f376"),
    "wanjuan": ("wanjuan/*.jsonl", 500, 500, {}, "062315314e7a05583654adb6b6aa8e98af4e8cf3a97e203432d0613e15db8924"),
    "wiki-cn": ("wiki_cn/*.json", 125, 125, {}, "0652850834c33d7d2d213e96b96d697d710a7755793969dae32790eb4be8b31e"),
    "baidu-baike": (
        "baidu_baike/*.json",
        500,
        479,
        {"empty": 4, "short": 17},
        "f8eadad6d33a3246149c9da9de5828c4001e90cf0a970a45f77ef77c4327dd5b",
    ),
    "baidu-qa": (
        "baidu_QA/*.json",
        500,
        494,
        {"short": 6},
        "dc8b6fbda48e2f6224757719819970f0fb5c9a14d1df3108f02eaa1c8993ac77",
    ),
    "zhihu-kol": (
        "zhihu/*.parquet",
        500,
        192,
        {"few upvotes": 308},
        "f5834768f3345ed4dd4d18e2285df8638119a3921ac9dda20ef5b883410aa5a9",
    ),
    "belle-2m": (
        "BELLE/train_2M*.json",
        500,
        500,
        {},
        "257ab17ba88b947c3bc23face741b09c92b65409bf2ce80e75bf95137a9e632d",
    ),
    "belle-3.5m": (
        "BELLE/train_3.5M*.json",
        500,
        500,
        {},
        "d5da57215098c0f31bb4991afb520699da3ff9fd639466eca97a00a44175804d",
    ),
    "firefly": (
        "firefly/*.jsonl",
        500,
        496,
        {"short": 4},
        "c119467f020a6e1b6b061e5dd073c9b58d0f040d2093196f7a6aadb9956e4c82",
    ),
    "starcoder": (
        "starcode/*/*.parquet",
        750,
        749,
        {"short": 1},
        "2f1a0041a8e9ce2322e29eabd4e0b3f6f44d65f9388f5ce09a7e2564f1c349a2",
    ),
}


@pytest.fixture(scope="module")
def golden(shared_data, tmp_path_factory):
    """source -> (report, rows of the output, digest), made once."""
    folder, made = tmp_path_factory.mktemp("golden"), {}

    def get(source):
        if source not in made:
            inputs = sorted((shared_data / "steel_samples").glob(SAMPLES[source][0]))
            output = folder / f"{source}.jsonl"
            report = prepare(source, inputs, output, workers=1)
            made[source] = report, lines(output), hashlib.sha256(output.read_bytes()).hexdigest()
        return made[source]

    return get


@pytest.mark.shared
@pytest.mark.parametrize("source", SAMPLES)
def test_the_real_sample(golden, source):
    _, rows, kept, rejected, digest = SAMPLES[source]
    report, made, found = golden(source)
    assert (report["rows"], report["kept"], report["rejected"], report["broken"]) == (rows, kept, rejected, 0)
    assert len(made) == kept
    assert report["sha256"] == found == digest
    assert all(row["source"] == source and len(row["text"]) >= 20 for row in made)


def raw(shared_data, pattern):
    (path,) = (shared_data / "steel_samples").glob(pattern)
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.shared
def test_the_texts_are_the_corpora_s(golden, shared_data):
    """Each text again, from the raw row and the rule in docs/prepare.md, for the rows that a rule leaves simple."""
    rules = {
        "skypile": ("sky/*", lambda row: row["text"]),
        "wanjuan": ("wanjuan/*", lambda row: row["content"]),
        "wiki-cn": ("wiki_cn/*", lambda row: row["completion"]),
        "belle-2m": ("BELLE/train_2M*", lambda row: chat(row["instruction"], row["output"])),
        "belle-3.5m": ("BELLE/train_3.5M*", lambda row: chat(*(turn["value"] for turn in row["conversations"]))),
        "firefly": ("firefly/*", lambda row: chat(row["input"], row["target"])),
        "zhihu-kol": ("zhihu/*", lambda row: chat(row["INSTRUCTION"], row["RESPONSE"])),
    }
    for source, (pattern, rule) in rules.items():
        rows = raw(shared_data, pattern)
        for made in golden(source)[1]:
            assert made["text"] == rule(rows[made["row"] - 1]).replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.shared
def test_the_first_rows_of_the_rules_that_are_not_simple(golden):
    baike, qa, code = (golden(source)[1] for source in ("baidu-baike", "baidu-qa", "starcoder"))
    assert baike[0]["text"].startswith("红色食品：红色食品是指食品为红色、橙红色或棕红色的食品。科学家认为")
    assert "\n简介：红色食品富含番茄红素" in baike[0]["text"]
    assert baike[0]["id"] == "http://baike.baidu.com/view/0010.htm"
    assert qa[0]["text"] == chat(
        "人站在地球上为什么没有头朝下的感觉",
        "地球上重力作用一直是指向球心的，因此\n只要头远离球心，人们就回感到头朝上。",
    )
    assert qa[0]["id"] == "qid_5982723620932473219"
    assert qa[1]["text"].startswith(HEAD + "<|im_start|>user\n我的小baby-辛巴。温顺可爱的，两个月大的小家伙")
    assert code[0]["text"].startswith("/* Copyright (c) 2012 Cheese and Bacon Games, LLC */\n")
    assert not any(row["text"].startswith(("<reponame>", "<filename>", "<gh_stars>")) for row in code)


@pytest.mark.shared
def test_the_most_upvoted_answers_are_kept(golden, shared_data):
    rows = raw(shared_data, "zhihu/*")
    kept = {row["row"] for row in golden("zhihu-kol")[1]}
    votes = {i: json.loads(row["METADATA"])["upvotes"] for i, row in enumerate(rows, 1)}
    assert {i for i, text in votes.items() if "万" in text} <= kept
    assert Counter("万" in votes[i] for i in kept)[True] == 10
    assert all(i in kept for i, text in votes.items() if text.removeprefix("赞同 ").isdigit() and int(text[3:]) >= 100)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("赞同 15", 15), ("赞同 1.5 万", 15_000), ("赞同 3 万", 30_000), ("赞同 2.3K", 2300), ("赞同", 0), ("赞同 1,024", 1024),
        ("1.5万", 15_000), ("12 人赞同", 12), ("赞同 1.2 亿", 120_000_000), ("", None), ("多", None), ("赞同 x", None),
        ("1.5.2", None), ("-3", None),
    ],
)  # fmt: skip
def test_upvotes(text, count):
    assert sources.upvotes(text) == count


def read(source, row, **settings):
    """The text of a row, or the reason that it has none."""
    try:
        made = sources.source(source, **settings).read(row)
    except (sources.Rejected, sources.Broken) as verdict:
        return f"{type(verdict).__name__}: {verdict}"
    return made.text if isinstance(made, sources.Document) else made.turns


EXAM = {
    "id": "a",
    "q_type": "单选题",
    "q_main": "一加一？\n",
    "option_a": "1",
    "option_b": "2",
    "option_c": "",
    "std_ans": "B",
}
TURNS = [("user", "问"), ("assistant", "答")]
BY_HAND = {
    "wanjuan exam": ("wanjuan", {**EXAM, "answer_detail": "数手指。"}, "一加一？\nA. 1\nB. 2\n标准答案：B\n解析：数手指。"),
    "wanjuan no detail": ("wanjuan", {**EXAM, "answer_detail": "略"}, "一加一？\nA. 1\nB. 2\n标准答案：B"),
    "wanjuan no answer": ("wanjuan", {**EXAM, "std_ans": None}, "Rejected: no answer"),
    "baike no summary": ("baidu-baike", {"title": "钢", "summary": None, "sections": [{"title": "史", "content": "古\n"}]}, "钢\n史：古"),
    "baike bare": ("baidu-baike", {"title": "钢", "summary": "", "sections": None}, "Rejected: empty"),
    "baike no title": ("baidu-baike", {"title": "", "summary": "金属", "sections": []}, "Rejected: empty"),
    "baike odd": ("baidu-baike", {"title": "钢", "summary": "金属", "sections": ["史"]}, "Broken: 'sections' is not a list of objects"),
    "qa adds": ("baidu-qa", {"title": "问 ", "desc": "细节", "answer": "答"}, [("user", "问\n细节"), ("assistant", "答")]),
    "qa repeats": ("baidu-qa", {"title": "问？怎么 ", "desc": "怎么", "answer": "答"}, [("user", "问？怎么"), ("assistant", "答")]),
    "qa is cut": ("baidu-qa", {"title": "问", "desc": "问得更长", "answer": "答"}, [("user", "问得更长"), ("assistant", "答")]),
    "zhihu no votes": ("zhihu-kol", {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": "{}"}, "Broken: 'METADATA' is not a JSON object with upvotes"),
    "zhihu odd votes": ("zhihu-kol", {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": '{"upvotes": "许多"}'}, "Rejected: upvotes unreadable"),
    "zhihu int votes": ("zhihu-kol", {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": '{"upvotes": 100}'}, TURNS),
    "belle input": ("belle-2m", {"instruction": "问", "input": "料", "output": "答"}, [("user", "问\n料"), ("assistant", "答")]),
    "belle two": ("belle-3.5m", {"conversations": [{"from": "human", "value": "问"}] * 2}, "Rejected: role order"),
    "belle answer first": ("belle-3.5m", {"conversations": [{"from": "assistant", "value": "答"}, {"from": "human", "value": "问"}]}, "Rejected: role order"),
    "belle no answer": ("belle-3.5m", {"conversations": [{"from": "human", "value": "问"}]}, "Rejected: role order"),
    "belle none": ("belle-3.5m", {"conversations": []}, "Rejected: role order"),
    "belle odd": ("belle-3.5m", {"conversations": "问"}, "Broken: 'conversations' is not a list of objects"),
    "moss": (
        "moss",
        {"conversation": [{"human": "<|Human|>: 问<eoh>\n", "assistant": "<|MOSS|>: 答 <eoh> <eom>\n"}, {"human": "问", "assistant": "答"}]},
        [("user", "问"), ("assistant", "答 <eoh>"), *TURNS],
    ),
    "moss none": ("moss", {"conversation": []}, "Rejected: role order"),
    "firefly": ("firefly", {"kind": "NLI", "input": "问", "target": "答"}, TURNS),
    "firefly odd": ("firefly", {"kind": "NLI", "input": 3, "target": "答"}, "Broken: 'input' holds a int, not a string"),
    "starcoder": ("starcoder", {"content": "<reponame>a/b<filename>c.py<gh_stars>1-10\nx = '<filename>'\n"}, "x = '<filename>'\n"),
    "starcoder bare": ("starcoder", {"content": "\ufeff<html>\r\n"}, "\ufeff<html>\r\n"),
    "mnbvc text": ("mnbvc", {"文件名": "a.txt", "段落": [{"行号": 1, "内容": "一"}, {"行号": 2, "内容": "二"}]}, "一\n二"),
    "mnbvc qa": ("mnbvc", {"id": 1, "问": "问", "答": "答", "来源": "x", "元数据": {}}, TURNS),
    "mnbvc forum": ("mnbvc", {"ID": 1, "主题": "题", "来源": "x", "回复": [{"楼ID": "1", "回复": "沙发"}, {"楼ID": "2", "回复": " "}]}, "题\n沙发"),
    "mnbvc code": ("mnbvc", {"来源": "github", "仓库名": "a/b", "path": "c.py", "text": "x = 1\n"}, "x = 1\n"),
    "mnbvc old": ("mnbvc", {"text": "旧\n文", "meta": "{}"}, "旧\n文"),
    "mnbvc old paragraphs": ("mnbvc", {"text": '[{"行号": 1, "内容": "一"}, {"行号": 2, "内容": "二"}]', "meta": "{}"}, "一\n二"),
    "mnbvc parallel": ("mnbvc", {"行号": 1, "zh_text": "一", "en_text": "one"}, "Broken: no key 'text' (it has: 行号, zh_text, en_text)"),
    "redpajama 1": ("redpajama", {"text": "t\r\n", "meta": {"url": "u"}, "red_pajama_subset": "c4"}, "t\r\n"),
    "redpajama 2": ("redpajama", {"raw_content": "t", "doc_id": "d"}, "t"),
    "slimpajama": ("slimpajama", {"text": "t", "meta": {"redpajama_set_name": "RedPajamaC4"}}, "t"),
    "pile": ("pile", {"text": "t", "meta": {"pile_set_name": "Pile-CC"}}, "t"),
    "dolma": ("dolma", {"id": "1", "text": "t", "source": "reddit", "added": "", "created": ""}, "t"),
    "text": ("text", {"text": "t"}, "t"),
    "text none": ("text", {}, "Broken: no key 'text' (it has: none)"),
    "messages": ("messages", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, [("system", "s"), *TURNS]),
    "messages tool": ("messages", {"messages": [{"role": "user", "content": "问"}, {"role": "tool", "content": "{}"}]}, "Rejected: unknown role"),
    "messages late system": ("messages", {"messages": [{"role": "user", "content": "问"}, {"role": "system", "content": "s"}]}, "Rejected: role order"),
    "messages parts": ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "Broken: 'content' holds a list, not a string"),
    "alpaca": ("alpaca", {"instruction": "问", "input": "", "output": "答"}, TURNS),
    "alpaca history": ("alpaca", {"instruction": "问", "input": "料", "output": "答", "system": "s", "history": [["一", "二"]]}, [("system", "s"), ("user", "一"), ("assistant", "二"), ("user", "问\n料"), ("assistant", "答")]),
    "alpaca odd": ("alpaca", {"instruction": "问", "output": "答", "history": ["一"]}, "Broken: 'history' is not a list of [question, answer]"),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "s"}, [("system", "s"), *TURNS]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_row_by_hand(name):
    source, row, expected = BY_HAND[name]
    assert read(source, row) == expected


def test_every_source_has_a_row_by_hand_or_a_sample():
    assert set(sources.names()) == {source for source, _, _ in BY_HAND.values()} | set(SAMPLES)


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("starcoder", {"content": "ｘ"}),
        ("mnbvc", {"仓库名": "a/b", "text": "ｘ"}),
        ("redpajama", {"text": "ｘ", "red_pajama_subset": "github"}),
        ("slimpajama", {"text": "ｘ", "meta": {"redpajama_set_name": "RedPajamaGithub"}}),
        ("pile", {"text": "ｘ", "meta": '{"pile_set_name": "Github"}'}),
        ("dolma", {"text": "ｘ", "source": "the-stack-dedup"}),
    ],
)
def test_code_is_known_for_code(source, row):
    assert sources.source(source).read(row).code
    assert not sources.source("text").read({"text": "ｘ"}).code
