"""Generation equals a plain loop over the model's own logits; foreign code does not run unasked."""

import shutil

import pytest
import torch

from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_model
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.own import OWN
from megatron_steel.post.generate import generate


@pytest.fixture(scope="module")
def steel(tmp_path_factory, tiny_tokenizer):
    """A folder as export writes it, with random weights; and the model."""
    folder = tmp_path_factory.mktemp("steel")
    config = SteelConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, eos_token_id=1, pad_token_id=0, initializer_range=0.3)  # fmt: skip
    model = build_model(config, 3).eval()
    model.save_pretrained(folder)
    for file in [*tiny_tokenizer.iterdir(), *OWN["steel"].files]:
        shutil.copy(file, folder / file.name)
    return folder, model


def test_greedy_text_is_the_argmax_of_the_model(steel):
    folder, model = steel
    ids = [17, 42]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    shown = [f"w{i}" for i in ids if i >= 3]  # special tokens are not
    assert 1 not in ids  # it did not end the document
    assert len(shown) >= 6
    assert generate(str(folder), "w17 w42", 6, greedy=True).split() == shown


def test_sampling_repeats_differs_from_greedy_and_leaves_the_generators_alone(steel):
    folder, _ = steel
    torch.manual_seed(9)
    first = generate(str(folder), "w17", 12)
    after = torch.rand(1)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(1))
    assert first.startswith("w17 ")
    assert first == generate(str(folder), "w17", 12)
    assert first != generate(str(folder), "w17", 12, greedy=True)


def test_an_empty_prompt_begins_a_document(steel):
    folder, model = steel
    with torch.no_grad():
        likeliest = int(model(input_ids=torch.tensor([[1]])).logits[0, -1].argmax())
    assert generate(str(folder), "", 1, greedy=True).strip() == f"w{likeliest}"


def test_changed_code_needs_trust_and_does_not_run_without(steel, tmp_path):
    folder = shutil.copytree(steel[0], tmp_path / "foreign")
    ran = tmp_path / "ran"
    code = folder / "modeling_steel.py"
    code.write_text(code.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    with pytest.raises(SteelError, match="brings its own code for model_type 'steel'"):
        generate(str(folder), "w17", 2)
    assert not ran.exists()
    assert generate(str(folder), "w17", 2, greedy=True, trust_code=True) == generate(
        str(steel[0]), "w17", 2, greedy=True
    )
    assert ran.exists()


def test_own_code_is_not_asked_about(steel, monkeypatch):
    def ask(*_):
        raise AssertionError("transformers asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    assert generate(str(steel[0]), "w17", 1)


def test_bad_input(steel, tmp_path):
    with pytest.raises(SteelError, match=r"no config\.json"):
        generate(str(tmp_path), "w17", 2)
    with pytest.raises(SteelError, match="0 new tokens"):
        generate(str(steel[0]), "w17", 0)
    bare = shutil.copytree(steel[0], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(SteelError, match="has no tokenizer"):
        generate(str(bare), "w17", 2)
    (bare / "config.json").write_text("{")
    with pytest.raises(SteelError, match=r"config\.json cannot be read"):
        generate(str(bare), "w17", 2)
