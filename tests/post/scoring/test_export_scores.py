"""lm-eval finds the same in an export as in the same weights gathered by DeepSpeed's own tool and saved by hand."""

import json

import pytest
from conftest import finished, launch_command
from toy_models import rows, write_ceval, write_letters

from megatron_steel import cli
from megatron_steel.post.scoring.evaluate import evaluate


def _train(folder, tokenizer) -> None:
    """A run of 4 steps over questions of another seed."""
    texts = [f"{row['question']}\nA. {row['A']}\n答案： {row['answer']}\n" for row in rows("history", "train", 400)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["tokenize", folder / "texts.jsonl", "--tokenizer", tokenizer, "--output", folder / "data", "--workers", 1]
    assert cli.main([str(word) for word in words]) == 0
    sizes = {
        "vocab_size": 136,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    overrides = [
        f"run.dir={folder}/run", f"tokenizer.path={tokenizer}", f"data.train={folder}/data", "data.validation=null",
        "data.sequence_length=64", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=8",
        "train.precision=fp32", *(f"model.config.{key}={value}" for key, value in sizes.items()),
    ]  # fmt: skip
    finished(launch_command(1, "tiny", *overrides))


def _save_by_hand(folder, tokenizer):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoTokenizer

    from megatron_steel.model.build import build_config, build_model
    from megatron_steel.recipe import load_recipe

    model = build_model(build_config(load_recipe(str(folder / "run" / "recipe.yaml")).model), 1)
    checkpoint = max((folder / "run" / "checkpoints").glob("step-*"))
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine"))
    model.save_pretrained(folder / "hand")
    AutoTokenizer.from_pretrained(str(tokenizer)).save_pretrained(folder / "hand")


def _lm_eval(folder, tasks) -> dict[str, list]:
    """{task: [log-likelihoods of a question]} by the harness's own loader, as its command line does it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32"}, tasks=tasks,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=True, device="cpu",
    )  # fmt: skip
    return {task: [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
            for task, samples in found["samples"].items()}  # fmt: skip


@pytest.mark.slow
def test_lm_eval_of_an_export_equals_that_of_weights_saved_by_hand(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from megatron_steel.post.scoring.benchmarks import BENCHMARKS, read
    from megatron_steel.post.scoring.harness import local_tasks

    write_letters(tmp_path / "letters")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "letters" / file).unlink(missing_ok=True)  # its tokenizer alone
    _train(tmp_path, tmp_path / "letters")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "export"), "--dtype", "float32"]) == 0
    _save_by_hand(tmp_path, tmp_path / "letters")
    write_ceval(tmp_path / "ceval", ["law", "logic"])

    def tasks():
        return local_tasks(BENCHMARKS["ceval-valid"], read(BENCHMARKS["ceval-valid"], tmp_path / "ceval"))

    export, hand = (_lm_eval(tmp_path / name, tasks()) for name in ("export", "hand"))
    assert export == hand
    assert len({value for answers in export["ceval-valid_law"] for value in answers}) > 4
    ours = tmp_path / "items.jsonl"
    evaluate(str(tmp_path / "export"), ["ceval-valid"], data=str(tmp_path / "ceval"), items=str(ours))
    lines = [json.loads(line) for line in ours.read_text().splitlines()]
    for subject in ("law", "logic"):
        mine = [line["log_likelihoods"] for line in lines if line["subject"] == subject]
        for found, expected in zip(mine, export[f"ceval-valid_{subject}"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)  # batches of 8 here, of 1 there
