"""Written answers equal a plain greedy loop over a prompt written out by hand, in batches of any size."""

import json

import pytest
import torch
from toy_models import LETTERS, rows, write_ceval, write_cmmlu, write_letters, write_mmlu

from megatron_steel.errors import SteelError
from megatron_steel.post.extract import extract_choice
from megatron_steel.post.load import load
from megatron_steel.post.scoring.benchmarks import Question
from megatron_steel.post.scoring.chat_protocol import user_turn, written
from megatron_steel.post.scoring.evaluate import evaluate

NEW = 4


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model that writes nothing but "A", "B", "。" and the end of its turn."""
    folder = tmp_path_factory.mktemp("talker")
    return folder, *write_letters(folder, seed=26, only="AB。")


def _greedy(model, words, text: str) -> str:
    """What the model writes after ChatML text, one token at a time without any cache, up to NEW tokens."""
    ids = []
    for part in text.replace("<|im_start|>", "\0<|im_start|>\0").replace("<|im_end|>", "\0<|im_end|>\0").split("\0"):
        ids += [words[part]] if part in words and len(part) > 1 else [words.get(c, words["<unk>"]) for c in part]
    names, reply = {i: word for word, i in words.items()}, ""
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if names[ids[-1]] in ("<|im_end|>", "<eos>"):
                break
            reply += names[ids[-1]]
    return reply


def test_replies_and_scores_equal_a_loop_by_hand(talker, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    folder, model, words = talker
    write_ceval(tmp_path / "ceval-exam", ["law"], val=12)
    file = tmp_path / "items.jsonl"
    result = evaluate(
        str(folder), ["ceval-valid"], data=str(tmp_path), protocol="both", max_new_tokens=NEW, items=str(file)
    )
    right, invalid = 0, 0
    items = [json.loads(line) for line in file.read_text().splitlines()]
    mine = [item for item in items if item["protocol"] == "steel-chat"]
    for row, item in zip(rows("law", "val", 12), mine, strict=True):
        options = "".join(f"{x}. {row[x]}\n" for x in LETTERS)
        asked = f"以下是一道单选题:\n{row['question']}\n\n{options}请给出答案。\n"
        reply = _greedy(model, words, f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{asked}"
                                      "<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
        assert item["reply"] == reply
        assert item["given"] == extract_choice(reply, [row[x] for x in LETTERS])
        right += item["given"] == row["answer"]
        invalid += item["given"] is None
    score = result["ceval-valid"]["steel-chat"]
    assert (score["acc"], score["invalid"], score["n"], score["few_shot"]) == (right / 12, invalid, 12, 0)
    assert 0 < right < 12
    assert 0 < invalid < 12  # so that an answer that is not there was met, and was wrong
    assert all(not item["right"] for item in mine if item["given"] is None)
    assert result["ceval-valid"]["protocol"]["name"] == "loglikelihood"
    assert result["ceval-valid"]["acc"] == sum(i["right"] for i in items if i["protocol"] == "loglikelihood") / 12


def test_batches_change_no_reply(talker):
    loaded = load(str(talker[0]))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (3, 17, 9, 9, 1, 30, 12)]
    alone = [written(loaded, [prompt], 6, 1)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    for size in (2, 3, 7):
        assert written(loaded, prompts, 6, size) == alone


def test_the_three_prompts_are_steel_llms():
    asked = Question("x", 0, "中国的首都是____。", ("北京", "上海", "广州", "深圳"), "A")
    options = "A. 北京\nB. 上海\nC. 广州\nD. 深圳\n"
    assert user_turn("ceval-valid", asked) == f"以下是一道单选题:\n中国的首都是( )\n\n{options}请给出答案。\n"
    assert user_turn("cmmlu", asked) == f"以下是一道单选题:\n中国的首都是。\n\n{options}请给出答案。\n"
    blanks = Question("x", 0, "____。", ("____。", "____", "广州", "深圳"), "A")
    shown = "A. ____。\nB. ____\nC. 广州\nD. 深圳\n"
    assert user_turn("ceval-valid", blanks) == f"以下是一道单选题:\n( )\n\n{shown}请给出答案。\n"
    assert user_turn("cmmlu", blanks) == f"以下是一道单选题:\n。\n\n{shown}请给出答案。\n"
    assert user_turn("mmlu", asked) == (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        f"answer to this question.\n\n中国的首都是____。\n{options}"
    )


def test_all_three_benchmarks_are_asked(talker, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    write_cmmlu(tmp_path / "cmmlu", ["agronomy"])
    write_mmlu(tmp_path / "mmlu", ["anatomy"])
    result = evaluate(str(talker[0]), ["cmmlu", "mmlu"], data=str(tmp_path), protocol="steel-chat", max_new_tokens=2)
    for task in ("cmmlu", "mmlu"):
        assert result[task]["protocol"]["name"] == "steel-chat"
        assert (result[task]["n"], result[task]["max_new_tokens"], result[task]["decoding"]) == (4, 2, "greedy")
    with pytest.raises(SteelError, match="the model reaches 1024"):
        evaluate(str(talker[0]), ["mmlu"], data=str(tmp_path), protocol="steel-chat")
