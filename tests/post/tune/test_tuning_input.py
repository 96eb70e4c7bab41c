"""Bad input of sft and dpo: named, exit 78, and nothing left behind."""

import json
import shutil

import pytest
from tiny_tuning import conversation, preferences, run, sums, write_rows, write_tiny

from megatron_steel.errors import EXIT_BAD_INPUT, SteelError
from megatron_steel.post.tune import settings
from megatron_steel.post.tune.lora import read_lora
from megatron_steel.post.tune.rows import data_files, read_rows

GOOD = conversation("a", "b")
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(verb, *words): the error of a command that writes nothing."""
    before = sorted(tmp_path.iterdir())

    def say(*words) -> str:
        before[:] = sorted(tmp_path.iterdir())
        assert run(*words, "--output", tmp_path / "out") == EXIT_BAD_INPUT
        assert sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    return say


@pytest.mark.parametrize(
    ("kind", "row", "named"),
    [
        ("sft", {"messages": [{"role": "function", "content": "x"}, A]}, r"line 2: messages\[0\] has the unknown role 'function' (known: system, user, assistant)"),
        ("sft", {"messages": [U]}, "no assistant turn"),
        ("sft", {"messages": [U, {"role": "assistant", "content": " \n"}]}, "the assistant says nothing in messages[1]"),
        ("sft", {"messages": [U, {"role": "assistant", "content": ""}, U, A]}, "the assistant says nothing in messages[1]"),
        ("sft", {"messages": [U, A, U, {**A, "tool_calls": [{"name": "f"}]}]}, "messages[3] calls tools, which is not learned"),
        ("sft", {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, A]}, "messages[1] calls tools"),
        ("sft", {"messages": [U, {"role": "assistant", "content": "\ud83d"}]}, "messages[1] holds half a character"),
        ("dpo", {"prompt": [{"role": "user", "content": "x\ude00"}], "chosen": [A], "rejected": [U]}, "prompt[0] holds half a character"),
        ("sft", {"messages": [U, {"role": "system", "content": "s"}, A]}, r"messages\[1\] is a system turn that is not the first"),
        ("sft", {"messages": [U, {"role": "assistant", "content": None}]}, r"messages\[1\] is not {role, content} with text"),
        ("sft", {"messages": []}, "messages is not a list of turns"),
        ("sft", {"messages": "hello"}, "messages is not a list of turns"),
        ("sft", [1], "not a JSON object"),
        ("sft", preferences(1)[0], "these rows are preferences: `megatron-steel dpo`"),
        ("sft", {"conversations": []}, "ShareGPT rows"),
        ("sft", {"instruction": "", "output": ""}, "Alpaca rows"),
        ("dpo", GOOD, "these rows are conversations: `megatron-steel sft`"),
        ("dpo", {"prompt": [A], "chosen": [A], "rejected": [A]}, "does not end with what a user asks"),
        ("dpo", {"prompt": [U], "chosen": [A, A], "rejected": [A]}, "chosen is not one assistant turn"),
        ("dpo", {"prompt": [U], "chosen": [A], "rejected": [U]}, "rejected is not one assistant turn"),
        ("dpo", {"prompt": [U], "chosen": [A], "rejected": [A]}, "chosen and rejected are the same"),
        ("dpo", {"prompt": [U], "chosen": [A], "rejected": [{"role": "assistant", "content": ""}]}, "rejected is empty"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_is_named(kind, row, named, tmp_path):
    good = GOOD if kind == "sft" else preferences(1)[0]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (good, row, good, row)))
    with pytest.raises(SteelError) as caught:
        list(read_rows(file, kind))
    assert "2 of 4 rows cannot be trained on" in str(caught.value)
    assert named.replace("\\", "") in str(caught.value)


def test_all_bad_rows_are_counted_and_five_are_spelt_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff" + json.dumps(GOOD) + "\n\n" + '{"messages": [\n' * 7 + json.dumps(GOOD), encoding="utf-8")
    told = "7 of 9 rows cannot be trained on", "line 3: not JSON", "line 7: not JSON", "and 2 more"
    with pytest.raises(SteelError, match=r"(.|\n)*".join(told)):
        list(read_rows(file, "sft"))
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(SteelError, match="the file has no rows"):
        list(read_rows(file, "sft"))
    file.write_bytes(json.dumps({"messages": [U, A]}).encode() + "\n北京".encode("gbk"))
    with pytest.raises(SteelError, match="cannot be read"):
        list(read_rows(file, "sft"))


def test_every_wrong_setting_is_told_at_once():
    words = ["learning_rat=1", "max_steps=3.5", "foo", "output_dir=x", "gradient_accumulation_steps=4", "per_device_train_batch_size=0",
             "lr_scheduler_type=cosinus"]  # fmt: skip
    with pytest.raises(SteelError) as caught:
        settings.read_settings("sft", words)
    text = str(caught.value)
    for named in ("did you mean learning_rate?", "max_steps=3.5: invalid int value", "'foo' is no key=value", "output_dir is decided by --output",
                  "gradient_accumulation_steps is decided by --global-batch-size", "per_device_train_batch_size=0 is below 1",
                  "lr_scheduler_type=cosinus"):  # fmt: skip
        assert named in text
    with pytest.raises(SteelError, match="beta is not known"):
        settings.read_settings("sft", ["beta=0.1"])


def test_the_recipes_of_the_paper_are_the_defaults():
    sft, dpo = settings.read_settings("sft", []), settings.read_settings("dpo", [])
    assert [sft[key] for key in ("learning_rate", "num_train_epochs", "lr_scheduler_type")] == [2e-5, 4, "cosine"]
    assert [dpo[key] for key in ("learning_rate", "num_train_epochs", "beta")] == [5e-6, 3, 0.1]
    assert settings.GLOBAL_BATCH == {"sft": 256, "dpo": 128}
    assert settings.read_settings("dpo", ["beta=0.3", "loss_type=ipo,sigmoid"])["loss_type"] == ["ipo", "sigmoid"]


@pytest.mark.parametrize(
    ("kind", "words", "named"),
    [
        ("sft", ["num_train_epochs=0"], "num_train_epochs=0.0 is not above 0"),
        ("sft", ["num_train_epochs=nan", "max_steps=3"], "num_train_epochs=nan is no finite number"),
        ("sft", ["weight_decay=inf"], "weight_decay=inf is no finite number"),
        ("sft", ["max_grad_norm=nan"], "max_grad_norm=nan is no finite number"),
        ("sft", ["report_to=wandb"], "report_to is decided by this verb itself"),
        ("sft", ["dataloader_drop_last=true"], "dataloader_drop_last is decided by this verb itself"),
        ("dpo", ["beta=0"], "beta=0.0 is not above 0"),
        ("dpo", ["loss_type=ipo,sigmoyd"], "loss_type=sigmoyd is not known (known: sigmoid, hinge, ipo,"),
        ("dpo", ["loss_weights=1,nan"], "loss_weights=nan is no finite number"),
    ],
)
def test_what_cannot_train_is_no_setting(kind, words, named):
    with pytest.raises(SteelError) as caught:
        settings.read_settings(kind, words)
    assert named in str(caught.value)


def test_steps_need_no_epochs():
    assert settings.read_settings("sft", ["num_train_epochs=0", "max_steps=3"])["max_steps"] == 3


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_training_decides_is_no_setting(kind, gpu, tmp_path):
    from megatron_steel.post.tune.plan import Plan
    from megatron_steel.post.tune.trainers import _arguments

    plan = Plan(kind, "model", False, settings.read_settings(kind, []), 8, 1, None, None, False, {})
    made = _arguments(plan, tmp_path, gpu)
    decided = {key for key, value in made.items() if plan.settings.get(key, made) != value} - {"bf16"}
    assert len(decided) > 5
    assert decided <= settings._OWNED.keys()


def test_activations_cannot_leave_a_gpu_that_is_not_there(tmp_path):
    from megatron_steel.post.tune.plan import Plan
    from megatron_steel.post.tune.trainers import _arguments

    values = settings.read_settings("sft", ["activation_offloading=true"])
    plan = Plan("sft", "model", False, values, 8, 1, None, None, False, {})
    assert _arguments(plan, tmp_path, gpu=True)["activation_offloading"]
    with pytest.raises(SteelError, match="there is no GPU"):
        _arguments(plan, tmp_path, gpu=False)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "cut"),
    [(256, 8, 8, 4), (256, 8, 3, None), (4, 8, 1, None), (0, 1, 1, None), (8, 8, 1, 1)],
)
def test_the_global_batch_is_cut_whole_or_refused(batch, micro, ranks, cut):
    if cut is None:
        with pytest.raises(
            SteelError, match=f"a global batch of {batch} cannot be cut into micro-batches of {micro} on {ranks} rank"
        ):
            settings.accumulation(batch, micro, ranks)
    else:
        assert settings.accumulation(batch, micro, ranks) == cut


@pytest.mark.parametrize(
    ("text", "value"),
    [("", (16, 32)), ("r=4", (4, 8)), ("lora_alpha=5,r=2", (2, 5)), ("r=0", None), ("8", None), ("r=x", None)],
)
def test_lora_settings(text, value):
    if value is None:
        with pytest.raises(SteelError, match="is no setting of --lora"):
            read_lora(text)
    else:
        assert tuple(read_lora(text).values()) == value


def test_bad_models_data_and_outputs_are_named(letters, refused, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(2))
    assert "there is no such data" in refused("sft", letters, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has no train.jsonl" in refused("sft", letters, tmp_path / "empty")
    assert "it has no config.json" in refused("sft", tmp_path / "empty", rows)
    hollow = tmp_path / "hollow"
    shutil.copytree(letters, hollow)
    (hollow / "model.safetensors").unlink()
    assert "the folder has no weights" in refused("sft", hollow, rows)
    small = tmp_path / "small"
    shutil.copytree(letters, small)
    tree = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**tree, "vocab_size": 50}))
    assert "and the model only 50: it is another model's" in refused("sft", small, rows)
    assert "longer than the 512 tokens that the model reaches" in refused("sft", letters, rows, "max_length=600")
    assert "no row keeps anything to learn within 16 tokens" in refused("sft", letters, rows, "max_length=16")
    assert "cannot be cut into micro-batches" in refused("sft", letters, rows, "--global-batch-size", "12")
    assert "did you mean learning_rate" in refused("dpo", letters, rows, "learning_rte=1")
    assert "there is no DeepSpeed file" in refused("sft", letters, rows, "--deepspeed", "zero9.json")
    assert "these rows are conversations" in refused("dpo", letters, rows)
    assert "TRL refuses these settings" in refused("sft", letters, rows, "eval_strategy=steps")  # nothing is held out
    assert "TRL refuses these settings" in refused("sft", letters, rows, 'lr_scheduler_kwargs={"cycles": 1}')


def test_an_empty_file_of_held_out_rows_is_left_out(letters, tmp_path, capsys):
    write_rows(tmp_path / "data" / "train.jsonl", sums(2))
    (tmp_path / "data" / "heldout.jsonl").write_text("\n\n")
    words = ["--global-batch-size=8", "max_steps=1", "--output", tmp_path / "out"]
    assert run("sft", letters, tmp_path / "data", *words) == 0
    said = capsys.readouterr()
    assert "heldout.jsonl has no rows: nothing is held out" in said.err
    assert "held out" not in said.out
    write_rows(tmp_path / "data" / "heldout.jsonl", sums(1))
    assert data_files(str(tmp_path / "data")).keys() == {"train", "heldout"}


def test_an_output_that_holds_something_else_is_left_alone(letters, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", sums(2))
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        assert run("sft", letters, rows, "--output", tmp_path / "out") == EXIT_BAD_INPUT
        assert ("never overwritten" if name == "out" else "holds something else") in capsys.readouterr().err
        assert [file.name for file in (tmp_path / name).iterdir()] == ["mine.txt"]
        shutil.rmtree(tmp_path / name)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text("{}")
    assert run("sft", letters, rows, "--output", tmp_path / "out") == EXIT_BAD_INPUT
    assert "this is no run of sft or dpo" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    assert run("sft", "model", "data", "--output", tmp_path / "out") == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "trl is not installed" in said
    assert "pip install 'megatron-steel[sft]'" in said
