"""Files of strangers: no pickle of theirs runs, no path of theirs leads out of its folder.

The attacker may do everything: the manifest is sealed again, so that every hash agrees.
"""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_steel import cli
from megatron_steel.checkpoint import commit, zero
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model
from megatron_steel.recipe import Model

PACKAGE = Path(__file__).parents[2] / "megatron_steel"


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory):
    """A finished run of one rank for each kind of engine files."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in {
        "zero0-bf16": ["train.precision=bf16"],
        "zero1-bf16": ["train.precision=bf16"],
        "zero2-fp32": [],
        "zero3-fp32": [],
    }.items():
        config = f"deepspeed.config={name.split('-')[0]}.json"
        words = [*words, f"run.dir={folder / name}", config, "train.steps=1", "train.eval_every_steps=9"]
        assert cli.main(["pretrain", str(tiny_recipe), *words]) == 0
    return folder


def _seal_again(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / commit.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        entry |= {"size": len(data), "sha256": commit._sha256(checkpoint / name)}
    (checkpoint / commit.MANIFEST).write_text(json.dumps(commit.sealed(manifest)))


CASES = [
    ("zero0-bf16", "mp_rank_00_model_states.pt"),
    ("zero1-bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("zero2-fp32", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("zero2-fp32", "mp_rank_00_model_states.pt"),
    ("zero3-fp32", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ("zero3-fp32", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
]


@pytest.fixture
def poisoned(runs, tmp_path):
    """poisoned(run, file): a copy of a run in which that engine file holds a canary too; (run, checkpoint, canary)."""

    def make(run: str, file: str) -> tuple[Path, Path, Path]:
        shutil.copytree(runs / run, tmp_path / run)
        (checkpoint,) = commit.published(tmp_path / run / "checkpoints")
        canary = tmp_path / "canary"
        content = torch.load(checkpoint / "engine" / file, weights_only=False)
        torch.save({**content, "more": Canary(canary)}, checkpoint / "engine" / file)
        _seal_again(checkpoint)
        commit.verify(checkpoint)  # the hashes agree
        return tmp_path / run, checkpoint, canary

    return make


@pytest.mark.parametrize(("run", "file"), CASES)
def test_no_verb_runs_a_pickle_of_a_checkpoint(run, file, poisoned, tiny_recipe, tmp_path, capsys):
    folder, checkpoint, canary = poisoned(run, file)
    stage, precision = run.split("-")
    same = [f"deepspeed.config={stage}.json", f"train.precision={precision}", f"run.dir={folder}", "train.steps=2"]
    other = [*same, "deepspeed.config=zero2.json" if stage != "zero2" else "deepspeed.config=zero3.json"]
    verbs = [
        ["pretrain", str(tiny_recipe), *same],  # by DeepSpeed's own loading
        ["pretrain", str(tiny_recipe), *other],  # by ours, into another layout
        ["export", str(folder), str(tmp_path / "out")],
        ["audit", str(checkpoint)],
    ]
    for words in verbs:
        capsys.readouterr()
        assert cli.main(words) == 78
        told = capsys.readouterr().err
        assert "unsafe" in told, words
        assert "posix.mkdir" in told, words
        assert file in told, words
        assert "Traceback" not in told
        assert not canary.exists()
    assert cli.main(["inspect", str(folder)]) == 0  # it reads the manifest alone
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    torch.load(checkpoint / "engine" / file, weights_only=False)
    assert canary.is_dir()  # the canary sings where a pickle is run


def test_deepspeeds_own_loading_is_weights_only(poisoned, tiny_recipe, monkeypatch, capsys):
    """The second lock alone: DeepSpeed asks torch for whole pickles and does not get them, whatever the user's shell says."""
    folder, _, canary = poisoned(*CASES[3])
    monkeypatch.setattr(zero, "refuse_unsafe", lambda path: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    words = ["deepspeed.config=zero2.json", f"run.dir={folder}", "train.steps=2"]
    assert cli.main(["pretrain", str(tiny_recipe), *words]) == 70
    assert "posix.mkdir" in capsys.readouterr().err
    assert not canary.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("form", ["bare pickle", "text"])
def test_what_is_no_archive_of_torch_is_refused(form, runs, tmp_path):
    shutil.copytree(runs / "zero2-fp32", tmp_path / "run")
    (checkpoint,) = commit.published(tmp_path / "run" / "checkpoints")
    content = pickle.dumps(Canary(tmp_path / "canary")) if form == "bare pickle" else b"no archive"
    (checkpoint / "engine" / CASES[3][1]).write_bytes(content)
    with pytest.raises(SteelError, match="unsafe or damaged"):
        zero.contents(checkpoint)
    with pytest.raises(SteelError, match="unsafe or damaged"):
        zero.refuse_unsafe(checkpoint)
    assert not (tmp_path / "canary").exists()


def test_only_the_classes_of_real_files_are_allowed(runs):
    """What the real files ask for beside tensors and plain values, in every layout, is what is allowed, and no more."""
    asked = {
        name
        for file in runs.glob("*/checkpoints/*/engine/*.pt")
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    }
    # fp16's own, which no recipe can ask for and checkpoints of others hold (tests/convert/test_foreign_checkpoints).
    assert asked | {"deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"} == set(zero._ITS_CLASSES)


def test_a_link_out_of_a_checkpoint_is_refused(runs, tmp_path):
    shutil.copytree(runs / "zero2-fp32", tmp_path / "run")
    (checkpoint,) = commit.published(tmp_path / "run" / "checkpoints")
    inside = checkpoint / "engine" / CASES[3][1]
    outside = shutil.move(inside, tmp_path / "elsewhere.pt")
    inside.symlink_to(outside)
    with pytest.raises(SteelError, match="outside the checkpoint"):
        commit.verify(checkpoint)


@pytest.fixture
def hf_folder(tmp_path):
    """A small Llama with sharded .bin weights, as it could come from the Hub."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, tie_word_embeddings=False))
    folder = tmp_path / "hub" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    weights, shards = model.state_dict(), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    cut = {name: shards[number % 2] for number, name in enumerate(sorted(weights))}
    for shard in shards:
        torch.save({name: weights[name] for name in weights if cut[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": cut}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def _start_from(folder: Path) -> None:
    build_model(build_config(Model(path=str(folder))), 0, str(folder))


def test_a_pickle_among_a_models_weights_never_runs(hf_folder, tmp_path):
    _start_from(hf_folder)
    shard, canary = hf_folder / "pytorch_model-00002-of-00002.bin", tmp_path / "canary"
    torch.save({**torch.load(shard), "more": Canary(canary)}, shard)
    with pytest.raises(SteelError, match="unsafe"):
        _start_from(hf_folder)
    with pytest.raises(SteelError, match="unsafe"):
        import_hf(hf_folder, tmp_path / "out")
    as_steel = json.loads((hf_folder / "config.json").read_text()) | {
        "architectures": ["SteelForCausalLM"], "model_type": "qwen2", "FFN_type": "raw", "mlp_type": "senet",
        "mlp_div_ratio": 1,
    }  # fmt: skip
    (hf_folder / "config.json").write_text(json.dumps(as_steel))
    with pytest.raises(SteelError, match="unsafe"):
        import_hf(hf_folder, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_file_elsewhere_is_refused(hf_folder, tmp_path):
    file = hf_folder / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    shutil.copy(hf_folder / "pytorch_model-00002-of-00002.bin", hf_folder.parent / "secret.bin")
    second = {name: "../secret.bin" for name, at in index["weight_map"].items() if "00002-of" in at}
    assert second
    file.write_text(json.dumps({**index, "weight_map": index["weight_map"] | second}))
    for use in (_start_from, lambda folder: import_hf(folder, tmp_path / "out")):
        with pytest.raises(SteelError, match=r"outside the folder, \.\./secret\.bin"):
            use(hf_folder)
    assert not (tmp_path / "out").exists()


def test_links_stay_in_the_folder_or_in_the_caches_blobs(hf_folder, tmp_path):
    shard = hf_folder / "pytorch_model-00002-of-00002.bin"
    blob = hf_folder.parents[1] / "blobs" / "0123"
    blob.parent.mkdir()
    shutil.move(shard, blob)
    shard.symlink_to(Path("../../blobs/0123"))
    _start_from(hf_folder)  # as the Hugging Face cache lays it out
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (hf_folder / "tokenizer_config.json").symlink_to(secret)
    for use in (_start_from, lambda folder: import_hf(folder, tmp_path / "out")):
        with pytest.raises(SteelError, match="unsafe: it leads out of it"):
            use(hf_folder)
    assert not (tmp_path / "out").exists()


def test_nothing_in_the_package_unpickles():
    """torch.load says weights_only=True each time, and no other reader of pickles is called."""
    calls = [
        (file.relative_to(PACKAGE), node)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    loads = [(file, node) for file, node in calls if ast.unparse(node.func) == "torch.load"]
    assert len(loads) >= 2
    for file, node in loads:
        assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", file
    readers = {"pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "numpy.load", "joblib.load", "dill.load",
               "marshal.loads", "shelve.open", "eval", "exec", "yaml.unsafe_load", "pd.read_pickle"}  # fmt: skip
    assert [(str(file), ast.unparse(node)) for file, node in calls if ast.unparse(node.func) in readers] == []
