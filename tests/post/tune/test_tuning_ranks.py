"""Two real ranks, plain and under ZeRO, against one: the same losses and the same model; stops and deaths in between."""

import json
import re
import signal
import subprocess
import sys

import pytest
from conftest import one_thread
from processes import wait_for
from tiny_tuning import farthest, logged, preferences, run, sums, weights, write_rows, write_tiny

from megatron_steel.errors import EXIT_INTERNAL, EXIT_STOPPED

pytestmark = pytest.mark.slow
SETTINGS = ["--global-batch-size", "4", "learning_rate=3e-3", "num_train_epochs=2", "per_device_train_batch_size=1"]
# Nothing is too small to be cut: every gather is a real one.
STAGES = {"plain": None, "zero2": {"stage": 2}, "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    for kind in ("prefix", "llama"):
        write_tiny(root / kind, kind, tie_word_embeddings=kind == "llama")
    write_rows(root / "data" / "train.jsonl", sums(12))
    write_rows(root / "data" / "heldout.jsonl", sums(5, first=50))  # an odd number: one rank has a row less
    write_rows(root / "pairs.jsonl", preferences(8))
    for name, zero in STAGES.items():
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    return root


def command(*words) -> list[str]:
    return [sys.executable, "-m", "megatron_steel.cli", *(str(word) for word in words)]


def two(root, stage, *words, expect: int = 0):
    extra = ["--num_gpus", "2", *(["--deepspeed", root / f"{stage}.json"] if STAGES[stage] else [])]
    done = subprocess.run(command(*words, *extra), capture_output=True, text=True, env=one_thread(), timeout=400)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def started(*words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(*words), env=one_thread(), **pipes)


def alone(root, name, *words):
    if not (root / name).exists():
        assert run(*words, "--output", root / name) == 0
    return root / name


def same(out, straight, base, keys=("loss",)):
    for key in keys:
        assert logged(out, key) == pytest.approx(logged(straight, key), rel=2e-5, abs=2e-6), key
    # Sums of other orders, divided by Adam's root of a tiny square: a few weights differ by some hundredths of a step.
    one, other, begun = weights(straight), weights(out), weights(base)
    assert one.keys() == other.keys() == begun.keys()

    def far(a, b):
        return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5

    assert far(one, other) < 1e-4 * far(one, begun)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["prefix", "llama"])
def test_two_ranks_tune_as_one_does(kind, stage, parts):
    words = ["sft", parts / kind, parts / "data", *SETTINGS]
    straight = alone(parts, f"one-{kind}", *words)
    two(parts, stage, *words, "--output", parts / f"{stage}-{kind}")
    same(parts / f"{stage}-{kind}", straight, parts / kind, ("loss", "eval_loss", "eval_tokens", "grad_norm"))


def test_two_ranks_pack_as_one_does(parts):
    words = ["sft", parts / "prefix", parts / "data", *SETTINGS, "--packing", "max_length=128", "eval_strategy=no"]
    straight = alone(parts, "one-packed", *words)
    two(parts, "zero3", *words, "--output", parts / "packed")
    same(parts / "packed", straight, parts / "prefix")


def test_adapters_under_zero3_are_those_of_one_rank(parts):
    words = ["sft", parts / "prefix", parts / "data", *SETTINGS, "--lora", "r=4", "eval_strategy=no"]
    straight = alone(parts, "one-lora", *words)
    two(parts, "zero3", *words, "--output", parts / "lora")
    same(parts / "lora", straight, parts / "prefix")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_dpo_on_two_ranks_is_dpo_on_one(stage, parts):
    words = ["dpo", parts / "prefix", parts / "pairs.jsonl", *SETTINGS, "warmup_steps=0"]
    straight = alone(parts, "one-dpo", *words)
    two(parts, stage, *words, "--output", parts / f"dpo-{stage}")
    same(parts / f"dpo-{stage}", straight, parts / "prefix", ("loss", "rewards/margins"))
    assert logged(straight, "loss")[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("stage", ["plain", "zero3"])
def test_a_stop_saves_on_every_rank_and_the_same_command_goes_on(stage, parts):
    words = ["sft", parts / "prefix", parts / "data", *SETTINGS, "max_steps=60", "save_steps=2", "eval_strategy=no", "--num_gpus", "2",
             *(["--deepspeed", parts / "zero3.json"] if stage == "zero3" else [])]  # fmt: skip
    output, work = parts / f"stopped-{stage}", parts / f"stopped-{stage}.partial"
    job = started(*words, "--output", output)
    wait_for(lambda: list(work.glob("checkpoints/*/whole")) or job.poll() is not None, 240)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == EXIT_STOPPED, said[-4000:]
    assert "the same command goes on from there" in said
    assert not output.exists()
    two(parts, "plain", *words, "--output", output)
    two(parts, "plain", *words, "--output", parts / f"straight-{stage}")
    assert logged(output, "loss") == logged(parts / f"straight-{stage}", "loss")
    assert farthest(weights(output), weights(parts / f"straight-{stage}")) == 0


def test_a_killed_rank_is_told_and_leaves_nobody_behind(parts):
    import psutil

    output, work = parts / "killed", parts / "killed.partial"
    settings = ["max_steps=400", "save_steps=2", "eval_strategy=no", "--num_gpus=2"]
    job = started("sft", parts / "prefix", parts / "data", *SETTINGS, *settings, "--output", output)
    wait_for(lambda: list(work.glob("checkpoints/*/whole")) or job.poll() is not None, 240)
    everyone = psutil.Process(job.pid).children(recursive=True)
    next(process for process in everyone if "--local_rank=1" in process.cmdline()[:5]).kill()
    said = job.communicate(timeout=120)[0]
    assert job.returncode == EXIT_INTERNAL, said[-4000:]
    assert "1 of 2 ranks died without a word" in said, said[-4000:]  # and how the other fared
    wait_for(lambda: not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 30)
    assert not output.exists()


def test_what_a_rank_finds_wrong_is_told_once(parts):
    words = ["sft", parts / "prefix", parts / "data", *SETTINGS, "optim=adamw_bnb_8bit", "--output", parts / "bad"]
    done = two(parts, "plain", *words, expect=EXIT_INTERNAL)
    told = re.findall(r"^\d\d:\d\d:\d\d error: (.*)$", done.stderr, re.MULTILINE)
    assert len(told) == 1
    assert "bitsandbytes" in told[0]
    assert not (parts / "bad").exists()
