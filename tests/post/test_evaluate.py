"""C-Eval scores by the real harness equal log-likelihoods worked out by hand over the same prompts."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
from foreign import CAUSAL, LEAKING, write_foreign

from megatron_steel import cli
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.post.evaluate import evaluate
from megatron_steel.recipe import Model

LETTERS = "ABCD"
SUBJECTS = {"law": "法学", "logic": "逻辑学"}  # as the harness names them in Chinese


def _rows(subject: str, split: str, count: int) -> list[dict[str, str]]:
    """Questions whose answers are not all the same, of words that differ between subjects and splits."""
    shift = len(subject) * 7 + len(split)
    return [
        {"id": str(i), "question": f"{subject} {split} 问题{i}?", **{x: f"{(shift * (i + 3) + j * 5) % 97}" for j, x in enumerate(LETTERS)},
         "answer": LETTERS[(i * 3 + shift) % 4]}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ceval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceval")
    for subject in SUBJECTS:
        for split, count in (("dev", 3), ("val", 4)):
            (folder / split).mkdir(exist_ok=True)
            columns = ["id", "question", *LETTERS, "answer", *(["explanation"] if split == "dev" else [])]
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns, restval="because")
                writer.writeheader()
                writer.writerows(_rows(subject, split, count))
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A random Steel model over single characters, as a Hugging Face folder; and the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("letters")
    shown = "".join(chr(c) for c in range(32, 127)) + "\n：以下是中国关于法学逻辑的单项选择题，请选出其中正确答案。问"
    words = {"<eos>": 0, "<pad>": 1, "<unk>": 2}
    words |= {character: i + 3 for i, character in enumerate(dict.fromkeys(shown))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    from tokenizers import Regex

    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = SteelConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, eos_token_id=0, pad_token_id=1, initializer_range=0.4,
                         max_position_embeddings=1024)  # fmt: skip
    model = build_model(config, 5).eval()
    model.save_pretrained(folder)
    return folder, model, words


def _by_hand(model, words, subject: str) -> float:
    """Accuracy of argmax over log p(' A'..' D' | 3 worked examples, question); nothing of the harness is used."""

    def asked(row):
        return row["question"] + "".join(f"\n{x}. {row[x]}" for x in LETTERS) + "\n答案："

    def ids(text):
        return [words.get(character, words["<unk>"]) for character in text]

    head = f"以下是中国关于{SUBJECTS[subject]}的单项选择题，请选出其中的正确答案。\n\n"
    head += "".join(f"{asked(row)} {row['answer']}\n\n" for row in _rows(subject, "dev", 3))
    right = 0
    for row in _rows(subject, "val", 4):
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
    expected = {subject: _by_hand(model, words, subject) for subject in SUBJECTS}
    score = result["ceval-valid"]
    assert {subject: part["acc"] for subject, part in score["subjects"].items()} == expected
    assert 0 < score["acc"] < 1  # neither all right nor all wrong, so the comparison means something
    assert score["acc"] == sum(expected.values()) / 2
    assert (score["n"], score["few_shot"], score["version"]) == (8, 3, 2.0)
    assert len(score["absent"]) == 50
    assert "答案：" in score["prompt"]
    assert result["protocol"]["versions"]["lm_eval"]
    assert json.loads(file.read_text()) == result
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json"]
    assert "ceval-valid:" in capsys.readouterr().out


def test_without_the_extra_the_command_to_install_it_is_named(letters):
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from megatron_steel.post.evaluate import evaluate\n"
        f"evaluate({str(letters[0])!r}, ['ceval-valid'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'megatron-steel[eval]'" in done.stderr


def _spoil(folder, old: str, new: str):
    file = folder / "val" / "law_val.csv"
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("answer", "solution", "the column 'answer' is missing"),
        ("law val 问题0?", "law dev 问题1?", "stands in dev and in val"),
        ("law val 问题2?", "", "question 3 has no question"),
    ],
)
def test_a_data_folder_of_another_shape_is_named(old, new, named, ceval, letters, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    _spoil(shutil.copytree(ceval, tmp_path / "ceval"), old, new)
    with pytest.raises(SteelError, match=named):
        evaluate(str(letters[0]), ["ceval-valid"], data=str(tmp_path / "ceval"), json=str(tmp_path / "scores.json"))
    assert not (tmp_path / "scores.json").exists()


def test_other_bad_input(letters, ceval, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    with pytest.raises(SteelError, match="no C-Eval subject"):
        evaluate(str(letters[0]), ["ceval-valid"], data=str(tmp_path))
    with pytest.raises(SteelError, match="'mmlu' is another task"):
        evaluate(str(letters[0]), ["mmlu"], data=str(ceval))
    with pytest.raises(SteelError, match="folder for the scores does not exist"):
        evaluate(str(letters[0]), ["ceval-valid"], data=str(ceval), json=str(tmp_path / "no" / "scores.json"))


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
    for file in ("tokenizer.json", "tokenizer_config.json"):
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
    protocol = json.loads((tmp_path / "s.json").read_text())["protocol"]
    assert (protocol["causal"], protocol["loss_sees_future"]) == (kind == "causal", kind != "causal")
    assert protocol["audit"] == {
        "causal": "causal: yes", "leaking": "NOT CAUSAL: MeanMixer in layers 0-1 reads later tokens",
        "softmoe_v3": "NOT CAUSAL: softmoe_v3 in layers 0-1 reads later tokens", "known": "NOT CAUSAL: found last week",
    }[kind]  # fmt: skip
    assert ("THIS MODEL SEES THE FUTURE" in said.out) == (kind != "causal")
    assert ("this model sees the future" in said.err) == (kind != "causal")
    assert ("has no audit.json: it is audited first" in said.err) == (kind != "known")
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
