"""Any Hugging Face definition: a modelling file of nobody's trains under ZeRO-3, is audited and exported; unasked it never runs."""

import json

import pytest
import torch
from foreign import CAUSAL, LEAKING, write_foreign
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_steel import cli
from megatron_steel.checkpoint.zero import stream_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory, launch_many, tiny_recipe):
    """A folder with the runs `causal` and `leaking` and their modelling folders, trained by two ranks."""
    folder = tmp_path_factory.mktemp("foreign")
    runs = []
    for name, mean in (("causal", CAUSAL), ("leaking", LEAKING)):
        code = write_foreign(folder / f"{name}-code", folder / "ran", mean)
        runs.append([f"run.dir={folder / name}", f"model.path={code}", "model.trust_code=true", "train.steps=4"])
    launch_many(2, tiny_recipe, *runs)
    return folder


@pytest.mark.parametrize("name", ["causal", "leaking"])
def test_it_trains_under_zero3_and_the_run_says_what_it_is(name, trained, metrics):
    rows = metrics(trained / name)
    assert rows[4]["loss"] < rows[1]["loss"]
    verdict = json.loads((trained / name / "audit.json").read_text())
    assert verdict["causal"] == (name == "causal")
    board = EventAccumulator(str(trained / name / "tensorboard"))
    board.Reload()
    assert ("loss" if name == "causal" else "loss (sees future)") in board.Tags()["scalars"]
    if name == "leaking":
        assert verdict["verdict"] == "NOT CAUSAL: MeanMixer in layers 0-1 reads later tokens"


@pytest.mark.parametrize("name", ["causal", "leaking"])
def test_it_exports_with_its_code_and_the_verb_tells_it_apart(name, trained, tmp_path, capsys):
    out = tmp_path / f"{name}-out"  # one process of transformers keeps the code of one folder name
    proof = ["--verify"] if name == "causal" else []
    assert cli.main(["export", str(trained / name), str(out), "--dtype", "float32", *proof]) == 0
    assert ("verified in a fresh process" in capsys.readouterr().out) == bool(proof)
    assert {p.name for p in out.glob("*.py")} == {"configuration_mean.py", "modeling_mean.py"}
    weights = load_file(out / "model.safetensors")
    trained_weights = dict(stream_weights(trained / name / "checkpoints" / "step-00000004"))
    assert weights.keys() == trained_weights.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in trained_weights.items())
    verdicts = []
    for source in (trained / name, out):
        assert cli.main(["audit", str(source), "--trust-code", "--json", str(tmp_path / "a.json")]) == 0
        verdicts.append(json.loads((tmp_path / "a.json").read_text()))
    assert [v["causal"] for v in verdicts] == [name == "causal"] * 2
    assert [v["loss"] for v in verdicts] == [verdicts[0]["loss"]] * 2
    assert json.loads((out / "audit.json").read_text())["causal"] == (name == "causal")
    assert ("sees the future" in (out / "README.md").read_text()) == (name == "leaking")


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "{recipe}", "run.dir={out}", "model.path={code}"],
        ["audit", "{code}"], ["import", "{code}", "{out}"], ["generate", "{code}", "--prompt", "w5"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_unasked_it_is_refused_and_never_runs(command, tiny_recipe, tmp_path, capsys):
    code = write_foreign(tmp_path / "code", tmp_path / "canary")
    words = [word.format(recipe=tiny_recipe, code=code, out=tmp_path / "out") for word in command]
    assert cli.main(words) == 78
    assert "brings its own code for model_type 'mean_mixer', and running it is not allowed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code"]
