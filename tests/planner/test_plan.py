"""The plan of a recipe: what is best fits, what does not fit names the smallest change, the shown equals the counted."""

import json

import pytest

from megatron_steel import cli
from megatron_steel.errors import SteelError
from megatron_steel.planner import fits, settings
from megatron_steel.planner import plan as planning
from megatron_steel.planner.hardware import parse_cluster
from megatron_steel.planner.show import as_text
from megatron_steel.recipe import load_recipe
from megatron_steel.train.engine import smallest_stage_that_fits


@pytest.fixture(scope="module")
def steel():
    return planning.plan(load_recipe("steel-1b"), "steel-1b", parse_cluster("8xA100-80G"), price=2.0)


@pytest.fixture(scope="module")
def model():
    return planning._model(load_recipe("tinyllama-1.1b"))


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
    assert planning.length(recipe) == (None, None)
    tree = planning.plan(recipe, "tiny", parse_cluster("1xH100"))
    assert tree["settings"][0]["days"] is None
    assert "set train.tokens" in as_text(tree)


def test_tokens_are_rounded_up_to_whole_steps():
    recipe = load_recipe("steel-1b", ["train.tokens=1000000000"])
    tokens, steps = planning.length(recipe)
    assert steps == 954
    assert tokens == 954 * 512 * 2048


def test_a_sparse_mixture_is_refused(tmp_path):
    recipe = load_recipe("tiny", ["model.type=mixtral", "model.config={hidden_size: 64, num_hidden_layers: 2}"])
    with pytest.raises(SteelError, match="cannot be counted"):
        planning.plan(recipe, "tiny", parse_cluster("1xH100"))
