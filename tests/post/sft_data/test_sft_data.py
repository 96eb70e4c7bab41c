"""The whole way: files as published to train.jsonl, heldout.jsonl, report and LLaMA-Factory's files, or nothing at all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_steel import cli
from megatron_steel.errors import SteelError
from megatron_steel.post.sft_data import build as job
from megatron_steel.post.sft_data.build import sft_data
from megatron_steel.post.sft_data.spec import load_spec
from megatron_steel.post.template import Template

SYSTEM = "You are a helpful assistant."
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|> system You are a helpful assistant. <|im_end|>\n{% endif %}"
    "<|im_start|> {{ m['role'] }}\n {{ m['content'] }} <|im_end|>\n{% endfor %}"
)
EXAM = {"q_type": "单选题", "q_main": "下列城市中，位于长江沿岸而且又是直辖市的是哪一座呢", "option_a": "武汉", "option_b": "重庆",
        "option_c": "南京", "option_d": "北京", "std_ans": "B", "answer_detail": ""}  # fmt: skip
ARC = {"id": "1", "question": "Which gas do plants take in?", "choices": {"text": ["oxygen", "carbon dioxide"], "label": ["1", "2"]},
       "answerKey": "2"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    """Words for tokens, and a ChatML template."""
    folder = shutil.copytree(tiny_tokenizer, tmp_path_factory.mktemp("tokenizer") / "chat")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder whose name holds no word that matters."""
    folder = tmp_path / "w" / "w" / "w" / "w"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def _jsonl(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _spec(folder, chat, sources, **more):
    tree = {"tokenizer": str(chat), "sources": sources, "heldout_ratio": 0.0, **more}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return str(folder / "spec.yaml")


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _qa(n, start=0):
    return [{"instruction": f"w{3 + i % 90} question {i}", "output": f"answer {i}"} for i in range(start, start + n)]


def test_every_row_is_written_or_accounted_for(work, tokenizer, capsys):
    import pyarrow
    import pyarrow.parquet

    bad = [
        {"instruction": "q", "output": " "},
        {"instruction": "long", "output": "w4 " * 90},
        {"instruction": "q"},
        _qa(1)[0],
    ]
    plain = _jsonl(work / "a.jsonl", [*_qa(40), *bad])
    (work / "b.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": f"h{i}"}, {"from": "gpt", "value": f"g{i}"}]}
                                             for i in range(30)], indent=1))  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": f"x{i}", "answer": f"y{i}"} for i in range(20)]), work / "c.parquet",
                                row_group_size=6)  # fmt: skip
    spec = _spec(work, tokenizer, [
        {"type": "ruozhiba", "files": [plain]},
        {"type": "openhermes", "files": ["*.json"], "ratio": 0.5},
        {"type": "webinstructsub", "files": ["c.parquet"], "rows": 7},
    ], heldout_ratio=0.2, max_tokens=60, max_malformed_ratio=0.1)  # fmt: skip
    assert cli.main(["sft-data", spec, "--output", "out", "--workers", "1"]) == 0
    said = capsys.readouterr()
    train, heldout = _rows(work / "out" / "train.jsonl"), _rows(work / "out" / "heldout.jsonl")
    report = json.loads((work / "out" / "report.json").read_text())
    first, second, third = report["sources"]
    assert (first["rows"], first["malformed"], first["rejected"]) == (44, 1, {"empty answer": 1, "too long": 1})
    assert (first["duplicates"], first["not_drawn"], first["drawn"]) == (1, 0, 40)
    assert first["first_rejected"] == {"empty answer": "a.jsonl, row 41", "too long": "a.jsonl, row 42"}
    assert (second["rows"], second["drawn"], second["not_drawn"]) == (30, 15, 15)
    assert (third["rows"], third["drawn"], third["not_drawn"], third["files"]) == (20, 7, 13, {"c.parquet": 20})
    assert (len(train), len(heldout)) == (report["train"], report["heldout"])
    assert len(train) + len(heldout) == 62
    assert 0 < len(heldout) < 31
    by_set = {
        name: [row for row in train + heldout if row["source"] == name]
        for name in ("ruozhiba", "openhermes", "webinstructsub")
    }
    assert {name: len(rows) for name, rows in by_set.items()} == {"ruozhiba": 40, "openhermes": 15, "webinstructsub": 7}
    assert sorted((row["messages"] for row in by_set["ruozhiba"]), key=str) == sorted(
        ([{"role": "system", "content": SYSTEM}, {"role": "user", "content": q["instruction"]}, {"role": "assistant", "content": q["output"]}]
         for q in _qa(40)), key=str)  # fmt: skip
    assert {row["origin"] for row in by_set["webinstructsub"]} <= {f"c.parquet:{i}" for i in range(1, 21)}
    assert train != sorted(train, key=lambda row: row["source"])  # mixed, not laid end to end
    assert "ruozhiba: malformed row left out: a.jsonl, row 43: no key 'output'" in said.err
    assert "too long" in said.out
    assert sorted(p.name for p in work.iterdir()) == ["a.jsonl", "b.json", "c.parquet", "out", "spec.yaml"]


def test_llama_factory_can_start_at_once(work, tokenizer):
    _jsonl(work / "a.jsonl", _qa(60))
    sft_data(
        _spec(work, tokenizer, [{"type": "alpaca", "files": ["a.jsonl"]}], heldout_ratio=0.2, max_tokens=50),
        "out",
        workers=1,
    )
    info = json.loads((work / "out" / "dataset_info.json").read_text())
    start = yaml.safe_load((work / "out" / "llama_factory_sft.yaml").read_text())
    assert (start["dataset"], start["eval_dataset"], start["dataset_dir"]) == (
        "steel_sft",
        "steel_sft_heldout",
        str(work / "out"),
    )
    for name in (start["dataset"], start["eval_dataset"]):
        entry = info[name]
        rows = _rows(work / "out" / entry["file_name"])
        tags = entry["tags"]
        roles = [turn[tags["role_tag"]] for turn in rows[0][entry["columns"]["messages"]]]
        assert roles == [tags["system_tag"], tags["user_tag"], tags["assistant_tag"]]
        assert entry["formatting"] == "sharegpt"
    assert (start["template"], start["default_system"], start["cutoff_len"]) == ("qwen", SYSTEM, 50)
    assert (start["learning_rate"], start["num_train_epochs"], start["train_on_prompt"]) == (2e-5, 4, False)
    assert start["per_device_train_batch_size"] * start["gradient_accumulation_steps"] == 256


def test_the_output_depends_on_rows_and_seed_alone(work, tokenizer, monkeypatch):
    rows = _qa(300)
    _jsonl(work / "a.jsonl", rows)
    sources = [{"type": "alpaca", "files": ["a.jsonl"], "ratio": 0.4}]
    texts = []
    for name, size, seed in (("one", 16 << 20, 1), ("two", 900, 1), ("three", 16 << 20, 2)):
        monkeypatch.setattr(job, "_UNIT_BYTES", size)
        sft_data(_spec(work, tokenizer, sources, heldout_ratio=0.1, seed=seed), name, workers=1)
        texts.append([(work / name / f"{side}.jsonl").read_bytes() for side in ("train", "heldout")])
    assert texts[0] == texts[1]
    assert sum(len(text.splitlines()) for text in texts[2]) == 120
    assert set(texts[0][0].splitlines()) != set(texts[2][0].splitlines())


@pytest.mark.slow
def test_the_output_is_the_same_for_any_number_of_workers(work, tokenizer, monkeypatch):
    monkeypatch.setattr(job, "_UNIT_BYTES", 900)
    _jsonl(work / "a.jsonl", _qa(100))
    spec = _spec(work, tokenizer, [{"type": "alpaca", "files": ["a.jsonl"]}], heldout_ratio=0.1)
    for workers in (1, 2):
        sft_data(spec, f"out{workers}", workers=workers)
    for path in (work / "out1").iterdir():
        if path.suffix != ".yaml":  # it names the folder
            assert path.read_bytes() == (work / "out2" / path.name).read_bytes()


def test_a_question_stands_on_one_side_only(work, tokenizer):
    rows = [{"instruction": f"question {i}", "output": f"answer {i} {j}"} for i in range(40) for j in range(4)]
    _jsonl(work / "a.jsonl", rows)
    report = sft_data(
        _spec(work, tokenizer, [{"type": "alpaca", "files": ["a.jsonl"]}], heldout_ratio=0.3), "out", workers=1
    )
    sides = [
        {row["messages"][1]["content"] for row in _rows(work / "out" / f"{side}.jsonl")}
        for side in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40
    assert report["heldout"] == 4 * len(sides[1]) > 0


def test_first_questions_stand_on_one_side_however_they_are_spaced_and_go_on(work, tokenizer):
    def row(question, *more):
        turns = [question, "reply", *more]
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}

    rows = []
    for i in range(40):
        rows += [row(f"question {i}"), row(f" question  {i}\n"), row(f"question\u3000{i}"), row(f"ｑuestion {i}"),
                 row(f"question {i}", "go on", "and on")]  # fmt: skip
    _jsonl(work / "a.jsonl", rows)
    spec = _spec(work, tokenizer, [{"type": "messages", "files": ["a.jsonl"]}], heldout_ratio=0.3)
    report = sft_data(spec, "out", workers=1)
    sides = [
        {row["messages"][1]["content"].replace("ｑ", "q").split()[1] for row in _rows(work / "out" / f"{side}.jsonl")}
        for side in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert report["heldout"] == 5 * len(sides[1]) > 0
    assert report["train"] == 5 * len(sides[0]) > 0


def test_lengths_are_those_of_the_template_with_the_real_tokens(work, tokenizer):
    from transformers import AutoTokenizer

    hf, template = AutoTokenizer.from_pretrained(tokenizer), Template(str(tokenizer))
    turns = [("system", SYSTEM), ("user", "w3 w4 w5"), ("assistant", "w6 w7 w8 w9")]
    ids = hf.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=True)["input_ids"]
    assert template.lengths([template.render(turns)]) == [len(ids)]
    _jsonl(work / "a.jsonl", [{"instruction": "w3 w4 w5", "output": "w6 w7 w8 w9"}])
    sources = [{"type": "alpaca", "files": ["a.jsonl"]}]
    report = sft_data(_spec(work, tokenizer, sources, max_tokens=len(ids)), "out", workers=1)
    assert (report["train"], report["tokens"]) == (1, len(ids))
    with pytest.raises(SteelError, match=r"too long: 1, first a\.jsonl, row 1"):
        sft_data(_spec(work, tokenizer, sources, max_tokens=len(ids) - 1), "out2", workers=1)


def test_control_strings_of_a_text_cannot_end_a_turn(work, tokenizer):
    _jsonl(work / "a.jsonl", [{"instruction": "say <|im_end|>", "output": "<|im_end|> it is"}])
    report = sft_data(_spec(work, tokenizer, [{"type": "alpaca", "files": ["a.jsonl"]}]), "out", workers=1)
    said = [turn["content"] for turn in _rows(work / "out" / "train.jsonl")[0]["messages"]]
    assert said == [SYSTEM, "say < |im_end|>", "< |im_end|> it is"]
    assert report["sources"][0]["control_strings"] == 2


def test_without_a_system_line_where_none_is_wanted(work, tokenizer):
    _jsonl(work / "a.jsonl", _qa(1))
    sft_data(_spec(work, tokenizer, [{"type": "alpaca", "files": ["a.jsonl"]}], system=None), "out", workers=1)
    assert [turn["role"] for turn in _rows(work / "out" / "train.jsonl")[0]["messages"]] == ["user", "assistant"]


def test_benchmark_questions_are_left_out(work, tokenizer):
    asked = EXAM["q_main"]
    _jsonl(work / "exam.jsonl", [EXAM, EXAM | {"q_main": "水的化学式是什么"}])
    (work / "val").mkdir()
    (work / "val" / "geo_val.csv").write_text(
        f"id,question,A,B,C,D,answer\n0,地球是圆的还是方的还是别的什么形状呢,圆,方,扁,长,A\n1,{asked},武汉,重庆,南京,北京,B\n"
    )
    spec = _spec(work, tokenizer, [{"type": "wanjuan-exam", "files": ["exam.jsonl"]}], benchmarks=["val"])
    report = sft_data(spec, "out", workers=1)
    assert report["sources"][0]["rejected"] == {"holds a benchmark question": 1}
    assert report["benchmarks"] == [{"file": "geo_val.csv", "items": 2, "too_short": 0, "found": [2]}]
    assert [row["origin"] for row in _rows(work / "out" / "train.jsonl")] == ["exam.jsonl:2"]


def test_preferences_in_trls_form(work, tokenizer):
    _jsonl(
        work / "zh.jsonl",
        [{"instruction": f"问 {i}", "chosen_response": "好", "rejected_response": "坏"} for i in range(8)],
    )
    asked = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "more"},
    ]
    _jsonl(work / "en.jsonl", [{"prompt": "q", "chosen": [*asked, {"role": "assistant", "content": f"good {i}"}],
                                "rejected": [*asked, {"role": "assistant", "content": "bad"}]} for i in range(5)])  # fmt: skip
    sources = [{"type": "ultrafeedback-chinese", "files": ["zh.jsonl"], "weight": 4},
               {"type": "ultrafeedback-binarized", "files": ["en.jsonl"], "weight": 1}]  # fmt: skip
    report = sft_data(_spec(work, tokenizer, sources, kind="dpo"), "out", workers=1)
    assert [source["drawn"] for source in report["sources"]] == [8, 2]
    rows = {row["source"]: row for row in _rows(work / "out" / "train.jsonl")}
    assert [turn["content"] for turn in rows["ultrafeedback-binarized"]["prompt"]] == [SYSTEM, "q", "a", "more"]
    chinese = rows["ultrafeedback-chinese"]
    assert (chinese["chosen"], chinese["rejected"]) == (
        [{"role": "assistant", "content": "好"}],
        [{"role": "assistant", "content": "坏"}],
    )
    assert sorted(p.name for p in (work / "out").iterdir()) == ["report.json", "train.jsonl"]


def test_prompts_for_a_reward(work, tokenizer):
    _jsonl(work / "exam.jsonl", [EXAM, EXAM | {"q_type": "多选题", "std_ans": "AB"}])
    _jsonl(work / "gsm.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    sources = [{"type": "wanjuan-exam", "files": ["exam.jsonl"]}, {"type": "gsm8k", "files": ["gsm.jsonl"]}]
    report = sft_data(_spec(work, tokenizer, sources, kind="grpo"), "out", workers=1)
    assert report["sources"][0]["rejected"] == {"no single answer to judge by": 1}
    rows = {row["source"]: row for row in _rows(work / "out" / "train.jsonl")}
    assert (rows["wanjuan-exam"]["answer"], rows["wanjuan-exam"]["options"]) == ("B", ["武汉", "重庆", "南京", "北京"])
    assert (rows["gsm8k"]["answer"], rows["gsm8k"]["options"]) == ("2", [])
    assert [turn["role"] for turn in rows["gsm8k"]["prompt"]] == ["system", "user"]


@pytest.mark.parametrize(
    "name",
    [
        "train/x-test.jsonl",
        "ARC-Easy/test/0000.jsonl",
        "ARC-Challenge-Test.jsonl",
        "test-00000-of-00001.jsonl",
        "arc/test/deep/part-0.jsonl",
        "arc/testset.jsonl",
        "arc/tests/0.jsonl",
    ],
)
def test_a_test_split_is_refused_and_forced_only_by_name(work, tokenizer, name):
    _jsonl(work / name, [ARC])
    spec = _spec(work, tokenizer, [{"type": "arc", "files": [name]}])
    with pytest.raises(SteelError, match="this is a test split of arc"):
        sft_data(spec, "out", workers=1)
    assert not (work / "out").exists()
    report = sft_data(spec, "out", force_test_splits=True, workers=1)
    assert (report["train"], report["forced_test_splits"]) == (1, True)


def test_a_test_split_is_refused_from_inside_its_folder_and_through_a_link(work, tokenizer, monkeypatch):
    _jsonl(work / "test" / "x.jsonl", [ARC])
    (work / "train.jsonl").symlink_to(work / "test" / "x.jsonl")
    (work / "blob").write_bytes((work / "test" / "x.jsonl").read_bytes())
    (work / "ARC-Test.jsonl").symlink_to(work / "blob")
    for folder, name in ((work / "test", "x.jsonl"), (work, "train.jsonl"), (work, "ARC-Test.jsonl")):
        monkeypatch.chdir(folder)
        spec = _spec(work, tokenizer, [{"type": "arc", "files": [name]}])
        with pytest.raises(SteelError, match="this is a test split of arc"):
            sft_data(spec, "out", workers=1)


def test_training_splits_pass_and_words_that_hold_test_too(work, tokenizer):
    for name in ("ARC-Easy/train-0.jsonl", "contest/latest.jsonl"):
        _jsonl(work / name, [ARC | {"question": f"Which gas? {name}"}])
    spec = _spec(work, tokenizer, [{"type": "arc", "files": ["*/*.jsonl"]}])
    assert {row["origin"] for row in _rows_of(spec, work)} == {"ARC-Easy/train-0.jsonl:1", "contest/latest.jsonl:1"}


def _rows_of(spec, work):
    sft_data(spec, "out", workers=1)
    return _rows(work / "out" / "train.jsonl")


TOOL = {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}
BAD_ROWS = {
    "unknown role": ("messages", [TOOL], r"none of 1 rows can be used \(unknown role: 1, first a.jsonl, row 1\)"),
    "empty answers": ("alpaca", [{"instruction": "q", "output": ""}], r"none of 1 rows can be used \(empty answer: 1"),
    "another set": ("wanjuan-exam", _qa(3), "3 of 3 rows are not of the form of wanjuan-exam: no key 'q_main'"),
    "nothing to see": ("alpaca", [{"instruction": "q", "output": "\u200b\ufeff \n"}], r"\(empty answer: 1"),
    "nothing asked": ("alpaca", [{"instruction": "\u200b", "output": "a"}], r"\(empty question: 1"),
    "half a character": (
        "alpaca",
        [{"instruction": "q", "output": "\ud800"}],
        "1 of 1 rows are not of the form.*surrogate",
    ),
    "another model's name": (
        "self-cognition",
        [{"instruction": "who", "output": "I am X"}],
        "no row leaves room for a name",
    ),
    "nothing": ("alpaca", [], "none of 0 rows can be used"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_left(work, tokenizer, name):
    kind, rows, message = BAD_ROWS[name]
    (work / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"name": "N", "author": "A"} if kind == "self-cognition" else {}
    spec = _spec(work, tokenizer, [{"type": kind, "files": ["a.jsonl"], **more}])
    with pytest.raises(SteelError, match=message):
        sft_data(spec, "out", workers=1)
    assert sorted(p.name for p in work.iterdir()) == ["a.jsonl", "spec.yaml"]


BAD_SPECS = {
    "unknown source": ({"sources": [{"type": "ruozhib", "files": ["a.jsonl"]}]}, "did you mean ruozhiba"),
    "source of another kind": ({"kind": "dpo"}, "'alpaca' is no source of kind dpo"),
    "unknown key": ({"max_token": 5}, "unknown key; did you mean max_tokens"),
    "several ways to draw": ({"sources": [{"type": "alpaca", "files": ["a.jsonl"], "ratio": 0.5, "rows": 1}]}, "exclude each other"),
    "some weights": ({"sources": [{"type": "alpaca", "files": ["a.jsonl"], "weight": 1}, {"type": "alpaca", "files": ["a.jsonl"]}]}, "a weight, or none"),
    "ratio": ({"sources": [{"type": "alpaca", "files": ["a.jsonl"], "ratio": 20}]}, r"ratio: 20.0 is not in \(0, 1\]"),
    "no names": ({"sources": [{"type": "self-cognition", "files": ["a.jsonl"]}]}, "needs the model's name"),
    "no file": ({"sources": [{"type": "alpaca", "files": ["b*.jsonl"]}]}, "there is no such file"),
    "too many wanted": ({"sources": [{"type": "alpaca", "files": ["a.jsonl"], "rows": 4}]}, "4 rows of alpaca are wanted and 3"),
    "no tokenizer": ({"tokenizer": "nowhere"}, "there is no such tokenizer folder"),
    "no benchmark": ({"benchmarks": ["nowhere"]}, "there is no such benchmark"),
    "a benchmark of another shape": ({"benchmarks": ["shape.csv"]}, "the columns of this CSV file are not known"),
    "nothing to train on": ({"heldout_ratio": 0.9999999}, "no row is left to train on"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_specifications_are_named_and_nothing_is_left(work, tokenizer, name):
    change, message = BAD_SPECS[name]
    _jsonl(work / "a.jsonl", _qa(3))
    (work / "shape.csv").write_text("frage,antwort\n1,2\n")
    spec = _spec(work, tokenizer, **({"sources": [{"type": "alpaca", "files": ["a.jsonl"]}]} | change))
    with pytest.raises(SteelError, match=message):
        sft_data(spec, "out", workers=1)
    assert sorted(p.name for p in work.iterdir()) == ["a.jsonl", "shape.csv", "spec.yaml"]


def test_a_used_folder_and_a_tokenizer_without_a_template(work, tokenizer, tiny_tokenizer):
    _jsonl(work / "a.jsonl", _qa(3))
    sources = [{"type": "alpaca", "files": ["a.jsonl"]}]
    _jsonl(work / "out" / "mine.jsonl", [])
    with pytest.raises(SteelError, match="exists already and is never overwritten"):
        sft_data(_spec(work, tokenizer, sources), "out", workers=1)
    with pytest.raises(SteelError, match="no chat template"):
        sft_data(_spec(work, tiny_tokenizer, sources), "out2", workers=1)
    assert sorted(p.name for p in work.iterdir()) == ["a.jsonl", "out", "spec.yaml"]


@pytest.mark.shared
def test_real_rows(work, shared_data):
    samples = shared_data / "steel_samples"
    sources = [
        {"type": "firefly", "files": [f"{samples}/firefly/*.jsonl"]},
        {"type": "alpaca", "files": [f"{samples}/BELLE/train_2M*.json"], "ratio": 0.2},
        {"type": "sharegpt", "files": [f"{samples}/BELLE/train_3.5M*.json"], "rows": 300},
    ]
    report = sft_data(
        _spec(work, shared_data / "qwen_tokenizer", sources, heldout_ratio=0.02, max_tokens=768), "out", workers=1
    )
    assert [(s["rows"], s["malformed"], s["rejected"], s["drawn"]) for s in report["sources"]] == [
        (500, 0, {"too long": 28}, 472), (500, 0, {"too long": 2}, 100), (500, 0, {"too long": 4}, 300)]  # fmt: skip
    rows = _rows(work / "out" / "train.jsonl") + _rows(work / "out" / "heldout.jsonl")
    assert len(rows) == 872
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(shared_data / "qwen_tokenizer")
    ids = [hf.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in rows[:50]]
    assert max(map(len, ids)) <= 768
    for tokens, row in zip(ids, rows, strict=False):
        assert tokens.count(151645) == len(row["messages"])  # each turn is closed once, and by nothing else


def test_the_specifications_in_the_documentation_are_whole(tmp_path):
    docs = Path(job.__file__).resolve().parents[3] / "docs"
    for name in ("sft_data.md", "grpo.md"):
        (text,) = re.findall(r"```yaml\n(.*?)```", (docs / name).read_text(encoding="utf-8"), re.DOTALL)
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        assert load_spec(str(tmp_path / "spec.yaml")).seed == 666


def test_another_set_is_found_out_at_its_first_part(work, tokenizer, monkeypatch):
    monkeypatch.setattr(job, "_UNIT_BYTES", 900)
    _jsonl(work / "a.jsonl", _qa(1000))
    with pytest.raises(SteelError, match=r"^1\d of 1\d rows are not of the form of messages: 'messages' is not a list"):
        sft_data(_spec(work, tokenizer, [{"type": "messages", "files": ["a.jsonl"]}]), "out", workers=1)
    assert sorted(p.name for p in work.iterdir()) == ["a.jsonl", "spec.yaml"]
