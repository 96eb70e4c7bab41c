"""Resampling by loss: the losses are the model's, the draw has the stated probabilities, the bytes are the sources'."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_steel import cli
from megatron_steel.data import manifest
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path
from megatron_steel.errors import SteelError
from megatron_steel.post import resample as rooms
from megatron_steel.post.resample import draw, noise, resample

SIZES = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round") / "one"
    torch.manual_seed(5)
    made = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5))
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two data sets: documents of 0 to 150 tokens, the model takes 64."""
    folder = tmp_path_factory.mktemp("corpora")
    generator = np.random.default_rng(1)
    for name, lengths in (("a", [0, 1, 2, 3, 63, 64, 65, 127, 128, 150, 40]), ("b", [30] * 20)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for length in lengths:
                writer.add_document(generator.integers(3, 128, length))
    return [str(folder / "a"), str(folder / "b")]


def _bytes(prefix):
    return bin_path(prefix).read_bytes() + idx_path(prefix).read_bytes()


def _plain_loss(model, ids):
    """Token by token, each predicted from its own window; None for a document without one to predict."""
    total = 0.0
    for at in range(0, len(ids) - 1, 63):
        window = torch.tensor(ids[at : at + 64].astype(np.int64))[None]
        with torch.no_grad():
            total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    return total / (len(ids) - 1) if len(ids) > 1 else None


def test_draws_are_without_replacement_in_proportion_to_exp_loss():
    losses = [np.array([0.0, 1.0, np.nan], np.float32), np.array([2.0, 0.5], np.float32)]
    weights = {(0, 0): 1.0, (0, 1): math.e, (1, 0): math.exp(2), (1, 1): math.exp(0.5)}
    exact = dict.fromkeys(itertools.combinations(sorted(weights), 2), 0.0)
    for first, second in itertools.permutations(weights, 2):
        p = weights[first] / sum(weights.values()) * weights[second] / (sum(weights.values()) - weights[first])
        exact[tuple(sorted((first, second)))] += p
    found, draws = dict.fromkeys(exact, 0), 10_000
    for seed in range(draws):
        numbers = draw(losses, [noise(seed, "ab" * 32, 3), noise(seed, "cd" * 32, 2)], 0.5)
        found[tuple(sorted((i, int(n)) for i, each in enumerate(numbers) for n in each))] += 1
    assert sum(exact.values()) == pytest.approx(1)
    for pair, p in exact.items():
        assert found[pair] / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws)), pair


def test_what_is_drawn_is_the_source_byte_for_byte(model, corpora, tmp_path, capsys):
    output = str(tmp_path / "two")
    assert cli.main(["resample", str(model), *corpora, "--output", output, "--share", "0.4", "--seed", "3"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(model)
    open_sets = [IndexedDataset(p) for p in corpora]
    sources = [[data.document(i) for i in range(data.documents)] for data in open_sets]
    plain = [np.array([_plain_loss(loaded, ids) or np.nan for ids in each]) for each in sources]
    chosen = draw(
        plain,
        [noise(3, manifest.trust(p).digest, data.documents) for p, data in zip(corpora, open_sets, strict=True)],
        0.4,
    )
    assert sum(map(len, chosen)) == round(0.4 * 29)
    with IndexedDataset(output) as drawn:
        wanted = [sources[i][n] for i, numbers in enumerate(chosen) for n in numbers]
        assert drawn.dtype == np.uint16
        assert drawn.documents == len(wanted)
        assert all(np.array_equal(drawn.document(i), ids) for i, ids in enumerate(wanted))
    made = manifest.verify(output)
    assert [(e["name"], e["documents"]) for e in made.provenance] == [("a", len(chosen[0])), ("b", len(chosen[1]))]
    assert [e["resampled"]["digest"] for e in made.provenance] == [manifest.trust(p).digest for p in corpora]
    report = json.loads((tmp_path / "two.report.json").read_text(encoding="utf-8"))
    for told, losses, numbers, each in zip(report["data"], plain, chosen, sources, strict=True):
        assert told["mean_loss"] == pytest.approx(np.nanmean(losses), rel=1e-5)
        assert told["drawn_mean_loss"] == pytest.approx(losses[numbers].mean(), rel=1e-5)
        assert told["drawn_tokens"] == sum(len(each[n]) for n in numbers)
    assert [told["unscored"] for told in report["data"]] == [2, 0]
    assert "mean loss" in capsys.readouterr().out


def test_a_stopped_command_goes_on_and_changes_nothing(model, corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "_CHUNK", 4)
    resample(str(model), corpora, str(tmp_path / "straight"), 0.5)
    scored, losses = [], rooms._Scorer.losses

    def stops(self, documents):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(len(documents))
        return losses(self, documents)

    monkeypatch.setattr(rooms._Scorer, "losses", stops)
    with pytest.raises(KeyboardInterrupt):
        resample(str(model), corpora, str(tmp_path / "cut"), 0.5)
    assert not bin_path(tmp_path / "cut").exists()
    monkeypatch.setattr(rooms._Scorer, "losses", lambda s, d: scored.append(len(d)) or losses(s, d))
    resample(str(model), corpora, str(tmp_path / "cut"), 0.5)
    assert sum(scored) == 31  # each document once
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "straight")
    resample(str(model), corpora[::-1], str(tmp_path / "cut"), 0.5)  # the order of names moves documents, not the draw
    assert sum(scored) == 31
    assert sorted(_documents(tmp_path / "cut")) == sorted(_documents(tmp_path / "straight"))


def _documents(prefix):
    with IndexedDataset(prefix) as data:
        return [data.document(i).tobytes() for i in range(data.documents)]


def test_a_second_round_trains_on_it(model, tiny_recipe, tiny_data, tmp_path, metrics):
    output = tmp_path / "second"
    resample(str(model), [str(tiny_data / "train")], str(output), 0.5)
    fields = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
    words = [
        "model.type=llama",
        f"model.config={{{fields}}}",
        f"model.init_from={model}",
        f"data.train={output}",
        "train.steps=1",
    ]
    assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/run", *words]) == 0
    # One step over most of what was drawn: its loss lies near the mean loss of the drawn documents under the same weights.
    told = json.loads((tmp_path / "second.report.json").read_text(encoding="utf-8"))["data"][0]
    assert told["drawn_mean_loss"] > told["mean_loss"]
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(told["drawn_mean_loss"], rel=0.15)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"share": 0.0}, "a share of 0.0 is none"),
        ({"share": 0.01}, "of 29 documents with two tokens or more is none"),
        ({"sequence_length": 65}, "do not suit a model of 64 positions"),
    ],
)
def test_bad_input_is_named(changes, says, model, corpora, tmp_path):
    with pytest.raises(SteelError, match=says):
        resample(str(model), corpora, str(tmp_path / "x"), **{"share": 0.5, **changes})
    with pytest.raises(SteelError, match="the same data twice"):
        resample(str(model), [corpora[0]] * 2, str(tmp_path / "x"), 0.5)
