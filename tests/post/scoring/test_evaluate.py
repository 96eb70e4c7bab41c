"""C-Eval scores by the real harness equal log-likelihoods worked out by hand over the same prompts."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from foreign import CAUSAL, LEAKING, write_foreign
from toy_models import LETTERS, rows, write_ceval, write_cmmlu, write_letters, write_mmlu

from megatron_steel import cli
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.post.scoring.evaluate import evaluate
from megatron_steel.recipe import Model

HEADS = {
    "law": "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n",
    "logic": "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n",
    "agronomy": "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n",
    "anatomy": "The following are multiple choice questions (with answers) about anatomy.\n\n",
}  # as the harness writes them


@pytest.fixture(scope="module")
def ceval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceval")
    write_ceval(folder, ["law", "logic"])
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A random Steel model over single characters, as a Hugging Face folder; and the model."""
    folder = tmp_path_factory.mktemp("letters")
    return folder, *write_letters(folder)


def _by_hand(model, words, subject: str, scored: str, dev: int, ask: str = "答案：") -> float:
    """Accuracy of argmax over log p(' A'..' D' | worked examples, question); nothing of the harness is used."""

    def asked(row):
        return row["question"] + "".join(f"\n{x}. {row[x]}" for x in LETTERS) + f"\n{ask}"

    def ids(text):
        return [words.get(character, words["<unk>"]) for character in text]

    head = HEADS[subject] + "".join(f"{asked(row)} {row['answer']}\n\n" for row in rows(subject, "dev", dev))
    right = 0
    for row in rows(subject, scored, 4):
        context = ids(head + asked(row))
        scores = []
        for letter in LETTERS:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + ids(f" {letter}")])).logits[0]
            log_p = torch.log_softmax(logits[len(context) - 1 : -1], -1)
            scores.append(float(sum(log_p[i, token] for i, token in enumerate(ids(f" {letter}")))))
        right += LETTERS[max(range(4), key=scores.__getitem__)] == row["answer"]
    return right / 4


def test_scores_equal_a_computation_by_hand(ceval, letters, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    folder, model, words = letters
    file = tmp_path / "scores.json"
    result = evaluate(str(folder), ["ceval-valid"], data=str(ceval), json=str(file))
    expected = {subject: _by_hand(model, words, subject, "val", 3) for subject in ("law", "logic")}
    score = result["ceval-valid"]
    assert {subject: part["acc"] for subject, part in score["subjects"].items()} == expected
    assert 0 < score["acc"] < 1  # neither all right nor all wrong, so the comparison means something
    assert score["acc"] == sum(expected.values()) / 2
    assert (score["n"], score["few_shot"], score["version"]) == (8, 3, 2.0)
    assert len(score["absent"]) == 50
    assert "答案：" in score["prompt"]
    assert score["protocol"]["versions"]["lm_eval"]
    assert score["truncated"] == 0
    assert json.loads(file.read_text()) == result
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json"]
    assert "ceval-valid:" in capsys.readouterr().out


def test_three_benchmarks_from_one_folder(letters, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    folder, model, words = letters
    write_ceval(tmp_path / "ceval-exam", ["law", "logic"])
    write_cmmlu(tmp_path / "cmmlu", ["agronomy"])
    write_mmlu(tmp_path / "mmlu", ["anatomy"])
    file = tmp_path / "items.jsonl"
    result = evaluate(str(folder), ["ceval-valid", "cmmlu", "mmlu"], data=str(tmp_path), items=str(file))
    assert result["cmmlu"]["acc"] == _by_hand(model, words, "agronomy", "test", 5)
    assert result["mmlu"]["acc"] == _by_hand(model, words, "anatomy", "test", 5, ask="Answer:")
    assert [result[task]["few_shot"] for task in ("ceval-valid", "cmmlu", "mmlu")] == [3, 5, 5]
    assert [len(result[task]["absent"]) for task in ("ceval-valid", "cmmlu", "mmlu")] == [50, 66, 56]
    by_category = {task: {name: part["n"] for name, part in result[task]["categories"].items()} for task in
                   ("ceval-valid", "cmmlu", "mmlu")}  # fmt: skip
    assert by_category == {"ceval-valid": {"Humanities": 8}, "cmmlu": {"Other": 4}, "mmlu": {"stem": 4}}
    items = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(items) == 16
    for task in ("cmmlu", "mmlu"):
        mine = [item for item in items if item["task"] == task]
        assert sum(item["right"] for item in mine) / 4 == result[task]["acc"]
        assert all(item["right"] == (item["given"] == item["answer"]) for item in mine)
        assert all(
            item["given"] == LETTERS[item["log_likelihoods"].index(max(item["log_likelihoods"]))] for item in mine
        )
    published = rows("anatomy", "test", 4)
    assert [(i["question"], i["options"], i["answer"]) for i in items if i["task"] == "mmlu"] == [
        (row["question"], [row[x] for x in LETTERS], row["answer"]) for row in published
    ]


def test_prompts_that_are_cut_off_are_counted_marked_and_warned_of(letters, tmp_path, capsys):
    """Each example is longer than half of the 1024 characters that the model reaches; one question needs no example."""
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    write_cmmlu(tmp_path, ["agronomy", "virology"])
    dev = tmp_path / "dev" / "virology.csv"
    dev.write_text(dev.read_text().replace("问题", "?" * 600))
    words = ["evaluate", str(letters[0]), "--tasks", " cmmlu, ", "--data", str(tmp_path), "--json", str(tmp_path / "s.json"),
             "--items", str(tmp_path / "i.jsonl"), "--picture", str(tmp_path / "p.png")]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert json.loads((tmp_path / "s.json").read_text())["cmmlu"]["truncated"] == 4
    lines = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    assert [line["truncated"] for line in lines] == [line["subject"] == "virology" for line in lines]
    assert len(lines) == 8
    assert "(8 questions, 5-shot, version 1.0, 4 PROMPTS CUT OFF)" in said.out
    assert "cmmlu: 4 prompts are longer than the 1024 tokens that the model reaches" in said.err


def test_a_prompt_that_just_fits_is_not_cut(letters):
    """The last token of the continuation is never an input, so one more than the reach fits."""
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from lm_eval.models.huggingface import HFLM

    from megatron_steel.post.load import load
    from megatron_steel.post.scoring.harness import _truncated

    loaded = load(str(letters[0]))
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, device="cpu")
    for request, cut in (
        (("x" * 1023, " A"), False), (("x" * 1024, " A"), True), (("x" * 5000,), False),
        (("x" * 1014, {"max_gen_toks": 10}), False), (("x" * 1015, {"max_gen_toks": 10}), True),
    ):  # fmt: skip
        assert _truncated(model, {"arguments": [("x", " A"), request]}) == cut


def test_without_the_extra_the_command_to_install_it_is_named(letters):
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from megatron_steel.post.scoring.evaluate import evaluate\n"
        f"evaluate({str(letters[0])!r}, ['ceval-valid'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'megatron-steel[eval]'" in done.stderr


@pytest.mark.parametrize("kind", ["causal", "leaking", "softmoe_v3", "known"])
def test_a_folder_without_a_verdict_is_audited_first_and_the_scores_say_what_it_is(
    kind, letters, ceval, tmp_path, capsys
):
    """`leaking` is foreign code that nothing but the audit can find out; `known` brings its verdict in audit.json."""
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    folder = tmp_path / kind  # one process of transformers keeps the code of one folder name
    if kind == "softmoe_v3":
        config = letters[1].config.to_dict() | {"FFN_type": kind, "n_experts": 2}
        build_model(SteelConfig(**config), 5).save_pretrained(folder)
    else:
        write_foreign(folder, tmp_path / "ran", CAUSAL if kind == "causal" else LEAKING, vocabulary=len(letters[2]))
        build_model(build_config(Model(path=str(folder), trust_code=True)), 5).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(letters[0] / file, folder / file)
    if kind == "known":
        (folder / "audit.json").write_text(json.dumps({"causal": False, "verdict": "NOT CAUSAL: found last week"}))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    words = [
        "evaluate",
        str(folder),
        "--tasks",
        "ceval-valid",
        "--data",
        str(ceval),
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert cli.main([*words, "--trust-code"]) == 0
    said = capsys.readouterr()
    tree = json.loads((tmp_path / "s.json").read_text())
    assert {task: sorted({"acc", "n", "protocol"} & set(score)) for task, score in tree.items()} == {
        "ceval-valid": ["acc", "n", "protocol"]
    }
    protocol = tree["ceval-valid"]["protocol"]
    assert (protocol["causal"], protocol["loss_sees_future"]) == (kind == "causal", kind != "causal")
    assert protocol["audit"] == {
        "causal": "causal: yes", "leaking": "NOT CAUSAL: MeanMixer in layers 0-1 reads later tokens",
        "softmoe_v3": "NOT CAUSAL: softmoe_v3 in layers 0-1 reads later tokens", "known": "NOT CAUSAL: found last week",
    }[kind]  # fmt: skip
    assert ("THIS MODEL SEES THE FUTURE" in said.out) == (kind != "causal")
    assert ("this model sees the future" in said.err) == (kind != "causal")
    assert ("has no audit.json: it is audited first" in said.err) == (kind != "known")
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


NATIVE = """
import sys
from megatron_steel import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_local_folder_scores_as_the_harness_with_its_own_data_set(letters, tmp_path):
    """The harness's untouched `ceval-valid`, its data set standing where the hub's name points to, against --data."""
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from megatron_steel.post.scoring.benchmarks import BENCHMARKS, shipped_files

    subjects = list(shipped_files(BENCHMARKS["ceval-valid"]))
    hub = tmp_path / "ceval" / "ceval-exam"
    write_ceval(hub, subjects, dev=5, val=2)
    parts = "".join(
        f"- config_name: {s}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {split}/{s}_{split}.csv\n" for split in ("dev", "val"))
        for s in subjects
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    ways = {"native": [], "local": ["--data", str(hub)]}
    for way, words in ways.items():
        command = ["evaluate", str(letters[0]), "--tasks", "ceval-valid", "--protocol", "both", "--max-new-tokens", "2",
                   "--json", str(tmp_path / f"{way}.json"), "--items", str(tmp_path / f"{way}.jsonl"), *words]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", NATIVE, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    native, local = (json.loads((tmp_path / f"{way}.json").read_text()) for way in ways)
    assert native == local
    assert (native["ceval-valid"]["n"], native["ceval-valid"]["few_shot"]) == (104, 5)
    assert len(native["ceval-valid"]["subjects"]) == 52
    assert (tmp_path / "native.jsonl").read_text() == (tmp_path / "local.jsonl").read_text()
