"""The plan of a recipe: what is best fits, what does not fit names the smallest change, the shown equals the counted."""

import json

import pytest

from megatron_steel import cli
from megatron_steel.errors import SteelError
from megatron_steel.planner import asked, fits, settings
from megatron_steel.planner import plan as planning
from megatron_steel.planner.hardware import parse_cluster
from megatron_steel.planner.show import as_text
from megatron_steel.recipe import load_recipe
from megatron_steel.train.engine import config_folder, smallest_stage_that_fits


@pytest.fixture(scope="module")
def steel():
    return planning.plan(load_recipe("steel-1b"), "steel-1b", parse_cluster("8xA100-80G"), price=2.0)


@pytest.fixture(scope="module")
def model():
    return asked.model_of(load_recipe("tinyllama-1.1b"))


def test_steel_beside_its_authors(steel):
    rows = steel["claims"]["rows"]
    assert [(row["cluster"], row["days"]) for row in rows] == [("8xA100-80G", 60), ("8xH800", 30)]
    assert rows[0]["planned_days_as_it_is"] == pytest.approx(steel["recipe_as_it_is"]["days"])
    text = as_text(steel)
    assert "60 days (Steel-LLM README)" in text
    assert "30 days (Steel-LLM README)" in text
    assert "they conflict" in text


def test_one_figure_follows_from_the_other(steel):
    best = steel["settings"][0]
    assert best["days"] * 86400 * best["tokens_per_second"] == pytest.approx(steel["run"]["tokens"])
    assert best["gpu_hours"] == pytest.approx(best["days"] * 24 * 8)
    assert best["cost"] == pytest.approx(2.0 * best["gpu_hours"])
    for s in steel["settings"]:
        assert s["micro_batch"] * s["micro_batches"] * 8 == 512
        assert s["micro_batch"] <= s["largest_micro_batch"]
        assert s["memory"] <= fits.USABLE * 80e9
    assert best["tokens_per_second"] >= 0.99 * max(s["tokens_per_second"] for s in steel["settings"])
    assert ["offload" in s["file"] for s in steel["settings"]] == [False] * 6 + [True] * 2
    for row in steel["memory"]:
        assert row["states"] == row["weights"] + row["gradients"] + row["optimizer"] + row["buffers"]
        assert row["total"] == row["states"] + row["head"] + row["activations"]
        assert row["activations_checkpointing"] < row["activations"]


def test_the_largest_micro_batch_fits_and_one_more_does_not(model):
    cluster = parse_cluster("8xA100-40G")
    for file in settings.FILES:
        zero = settings.zero_section(file)
        for checkpointing in (False, True):
            most = fits.largest_micro_batch(model, zero, cluster, checkpointing, 10_000)
            assert fits.fits(fits.memory(model, zero, cluster, most, checkpointing), cluster)
            assert not fits.fits(fits.memory(model, zero, cluster, most + 1, checkpointing), cluster)


def test_auto_and_the_plan_count_states_alike(model):
    """`deepspeed.config: auto` takes the first file whose states fit, by the planner's formula."""
    p = model.work.parameters
    for gigabytes in (3, 5, 7, 9, 12, 40):
        chosen = smallest_stage_that_fits(p, 0, gigabytes * 10**9, 8)
        for file in settings.FILES[: settings.FILES.index(chosen)]:
            assert fits.rank_states([p], settings.zero_section(file), 8).device > 0.9 * gigabytes * 1e9
        if chosen != "zero3_offload.json":
            assert fits.rank_states([p], settings.zero_section(chosen), 8).device <= 0.9 * gigabytes * 1e9


@pytest.mark.parametrize(
    ("gpus", "micro", "checkpointing", "words"),
    [
        ("8xA100-40G", 64, False, ("train.micro_batch_size=",)),  # fewer samples are enough
        ("8xRTX-4090", 1, False, ("",)),
    ],
)
def test_the_smallest_change(model, gpus, micro, checkpointing, words):
    cluster = parse_cluster(gpus)
    change = settings.smallest_change(model, "zero1.json", cluster, checkpointing, micro, 1024)
    assert change is not None
    assert fits.fits(change.candidate.memory, change.cluster)
    for word in words:
        assert change.what.startswith(word) or not word


def test_changes_are_tried_from_small_to_large(model):
    """On ever smaller GPUs: fewer samples, checkpointing, a higher stage, offload, more GPUs."""
    changes = []
    for gigabytes in (30, 18, 13, 10, 7.5, 6, 4.5, 3):
        cluster = parse_cluster("8xA100", memory_gb=gigabytes)
        change = settings.smallest_change(model, "zero1.json", cluster, False, 32, 1024)
        changes.append(change.what if change else None)
    first = [next((i for i, what in enumerate(changes) if what and word in what), 99)
             for word in ("train.micro_batch_size=", "activation_checkpointing", "deepspeed.config=zero2",
                          "deepspeed.config=zero3")]  # fmt: skip
    assert first[0] == 0, changes
    assert first == sorted(first), changes
    assert 99 not in first, changes


def test_an_impossible_fit_names_what_would_fit(capsys):
    """Exit code 78, and the change named makes it fit."""
    words = ["plan", "tinyllama-1.1b", "--gpus", "1xTOY", "--peak-tflops", "100", "--memory-gb", "3"]
    assert cli.main(words) == 78
    message = capsys.readouterr().err
    assert "do not fit 1 x TOY" in message
    assert "smallest change that fits: " in message
    words[-1] = message.split("a GPU of ")[1].split()[0]
    assert cli.main(words) == 0  # with what was named it fits
    words[-1] = str(int(words[-1]) - 1)
    assert cli.main(words) == 78


@pytest.mark.parametrize(
    ("name", "overrides", "files"),
    [
        ("chatlm-mini-0.2b", [], {"zero0.json"}),  # Adafactor; an encoder-decoder
        ("zh-0.2b", ["optim.name=muon"], {"zero1.json", "zero2.json"}),
        ("zh-0.2b", [], set(settings.FILES)),
    ],
)
def test_only_what_the_optimizer_can_train_with_is_offered(name, overrides, files):
    found = planning.plan(load_recipe(name, overrides), name, parse_cluster("8xA100-80G"))
    assert {setting["file"] for setting in found["settings"]} == files
    text = as_text(found)
    assert ("pairs: tokens are those of responses" in text) == (name == "chatlm-mini-0.2b")


def test_why_gives_the_share_by_which_the_next_is_slower():
    found = planning.plan(load_recipe("zh-1b"), "zh-1b", parse_cluster("4x8xH100", "100Gb/s"))
    best, following = found["settings"][:2]
    slower = 1 - following["tokens_per_second"] / best["tokens_per_second"]
    assert slower > 0.001
    assert f"is {slower:.1%} slower" in found["why"]


def test_offload_that_would_be_faster_is_named_and_not_called_slower():
    found = planning.plan(load_recipe("tinyllama-1.1b"), "tinyllama-1.1b", parse_cluster("1xRTX-4090"))
    best = found["settings"][0]
    offload = max(s["tokens_per_second"] for s in found["settings"] if "offload" in s["file"])
    assert "offload" not in best["file"]
    assert f"offload may be {offload / best['tokens_per_second'] - 1:.0%} faster" in found["why"]
    assert "as fast" not in found["why"]
    assert any(note.startswith("offload: ") for note in found["notes"])


def test_a_batch_ramp_takes_more_steps():
    """90,000 steps of 64 samples, then as many of 512 as the rest needs."""
    ramp = ["train.batch_ramp=[{global_batch_size: 64, until_steps: 90000}]"]
    found = planning.plan(load_recipe("zh-1b", ramp), "zh-1b", parse_cluster("8xA100-80G"))
    recipe = load_recipe("zh-1b")
    rest = recipe.train.tokens - 90_000 * 64 * 2048
    assert found["run"]["steps"] == 90_000 + -(-rest // (512 * 2048))
    assert any("train.batch_ramp" in note for note in found["notes"])


def test_fp16_is_planned_at_its_own_peak_where_it_has_one():
    for gpus, peak in (("8xV100", 125e12), ("8xA100-80G", 312e12)):
        found = planning.plan(load_recipe("zh-0.2b", ["train.precision=fp16"]), "zh-0.2b", parse_cluster(gpus))
        assert found["cluster"]["peak"] == peak
    assert planning.plan(load_recipe("zh-0.2b"), "zh-0.2b", parse_cluster("8xV100"))["cluster"]["peak"] == 15.7e12


def test_a_file_of_the_users_own_is_planned_as_it_is(tmp_path):
    tree = json.loads((config_folder() / "zero3.json").read_text())
    tree["zero_optimization"]["stage3_max_live_parameters"] = 10**8
    own = tmp_path / "zero3.json"
    own.write_text(json.dumps(tree))
    cut = ["train.micro_batch_size=8", "deepspeed.config="]
    plans = [planning.plan(load_recipe("zh-1b", [cut[0], cut[1] + file]), "zh-1b", parse_cluster("8xA100-80G"))
             for file in ("zero3.json", str(own))]  # fmt: skip
    shipped, changed = (p["recipe_as_it_is"]["memory"] for p in plans)
    assert changed != shipped


def test_a_recipe_that_cannot_be_cut_here_is_told_so():
    found = planning.plan(load_recipe("zh-1b", ["train.micro_batch_size=3"]), "zh-1b", parse_cluster("8xA100-80G"))
    assert found["recipe_as_it_is"] is None
    assert "3 samples a pass on 8 GPUs do not cut a batch of 512" in as_text(found)


def test_a_run_of_one_save_has_one_checkpoint_on_disk():
    one, many = (planning.plan(load_recipe("zh-1b", [f"train.steps={steps}", "train.tokens=null"]), "zh-1b",
                               parse_cluster("8xA100-80G"))["disk"] for steps in (1, 10**6))  # fmt: skip
    assert one["checkpoints"] == one["checkpoint"]
    assert many["checkpoints"] == (max(2, load_recipe("zh-1b").train.keep_last) + 1) * many["checkpoint"]


@pytest.mark.parametrize(
    ("overrides", "claimed"),
    [
        (["train.micro_batch_size=4"], True),
        (["train.global_batch_size=1", "train.micro_batch_size=1"], False),  # other tokens; 8 GPUs cannot share it
        (["model.config.num_hidden_layers=2"], False),
        (["train.steps=1000"], False),
    ],
)
def test_authors_are_quoted_for_their_own_run_only(overrides, claimed):
    found = planning.plan(load_recipe("steel-1b", overrides), "steel-1b", parse_cluster("1xH100"))
    assert ("60 days (Steel-LLM README)" in as_text(found)) == claimed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steel-1b", "--gpus", "7xA100"], "cannot be shared evenly by 7 GPUs"),
        (["steel-1b", "--gpus", "8xA1000"], "no GPU 'A1000'"),
        (["steel-1b", "--gpus", "999999999999xA100"], "at most 65,536"),
        (["zh-1b", "--gpus", "8xA100", "data.sequence_length=4096"], "do not fit a model of 2048 positions"),
        (["zh-1b", "--gpus", "8xA100", "deepspeed.config=zero4.json"], "there is no DeepSpeed file 'zero4.json'"),
        (["zh-1b", "--gpus", "8xA100", "deepspeed.config=/none/zero3.json"], "there is no DeepSpeed file"),
        (
            ["zh-1b", "--gpus", "8xA100", "train.batch_ramp=[{global_batch_size: 60, until_steps: 9}]"],
            "batch of 60 samples",
        ),
        (["zh-1b", "--gpus", "8xA100", "model.config.vocab_size=-5"], "cannot be built"),
        (["steel-1b"], "not complete"),
        ([], "not complete"),
        (["steel-1b", "--gpus", "8xA100", "--check"], "one plan at a time"),
        (["steel-1b", "--gpus", "8xA100", "--price", "-1"], "a price of -1.0"),
        (["steel-2b", "--gpus", "8xA100"], "no recipe 'steel-2b'"),
        (["steel-1b", "--gpus", "8xA100", "train.micro_batch=2"], "did you mean train.micro_batch_size"),
        (["--data", "skypile"], "no file of it is given"),
        (["--data", "nothing.jsonl"], "no such input file"),
    ],
)
def test_bad_input(words, message, capsys):
    assert cli.main(["plan", *words]) == 78
    assert message in capsys.readouterr().err


def test_the_command_needs_no_data_and_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "tiny", "--gpus", "2x4xH100", "--link", "400Gb/s", "--json", str(file),
                     "train.global_batch_size=64"]) == 0  # fmt: skip
    tree = json.loads(file.read_text(encoding="utf-8"))
    assert tree["cluster"]["ranks"] == 8
    assert tree["run"]["global_batch_size"] == 64
    assert as_text(tree) in capsys.readouterr().out


def test_epochs_have_no_length_without_data():
    recipe = load_recipe("tiny", ["train.epochs=2"])
    assert asked.length(recipe) == (None, None)
    tree = planning.plan(recipe, "tiny", parse_cluster("1xH100"))
    assert tree["settings"][0]["days"] is None
    assert "set train.tokens" in as_text(tree)


def test_tokens_are_rounded_up_to_whole_steps():
    recipe = load_recipe("steel-1b", ["train.tokens=1000000000"])
    tokens, steps = asked.length(recipe)
    assert steps == 954
    assert tokens == 954 * 512 * 2048


def test_a_sparse_mixture_is_refused(tmp_path):
    recipe = load_recipe("tiny", ["model.type=mixtral", "model.config={hidden_size: 64, num_hidden_layers: 2}"])
    with pytest.raises(SteelError, match="cannot be counted"):
        planning.plan(recipe, "tiny", parse_cluster("1xH100"))
