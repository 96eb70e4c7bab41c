"""A model with another vocabulary: equal logits where rows are kept, means where pieces are new, everything else as it was."""

import json
import shutil

import pytest
import torch
from published_models import as_bin, load, tensors, write_model
from test_import import publish

from megatron_steel import cli
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.convert.pieces import read_pieces
from megatron_steel.convert.resize import plan_rows
from megatron_steel.data.prune_tokenizer import KEPT_IDS, prune_tokenizer
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.errors import SteelError

SIZE, FEWER, OTHER, ROWS = 340, 310, 310, 352
ZH = "钢铁是怎样炼成的？炼钢需要铁、碳和高温。"
EN = "the quick brown fox returns def (12) the lazy dog"


def train(text, size, folder):
    """A byte-level BPE of exactly `size` ids; `<|endoftext|>` pads and `<|im_end|>` ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text] * 3, trainer)
    assert inner.get_vocab_size() == size
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[2], pad_token=special[0],
                                        additional_special_tokens=special[1:2])  # fmt: skip
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`old`, `pruned` from it by Chinese data, and `other`, trained on another text: byte-level tokenizers."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train(ZH + " " + EN, SIZE, folder / "old")
    (folder / "zh.jsonl").write_text(json.dumps({"text": ZH}, ensure_ascii=False), encoding="utf-8")
    tokenize([folder / "zh.jsonl"], folder / "old", folder / "zh", workers=1)
    prune_tokenizer(folder / "old", [folder / "zh"], FEWER, folder / "pruned")
    train("overlapping brownies are returned by " + EN, OTHER, folder / "other")
    return folder


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    """A sentencepiece-like tokenizer in a folder: `▁` for a space, bytes as `<0x41>`, unk, bos and eos of Llama's names."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"thequickbrownfx钢铁",
        "th",
        "▁th",
        "▁the",
        "he",
    ]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("h", "e")]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder = tmp_path_factory.mktemp("spaces")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def others_equal(old, new, but):
    assert {*old} - {*but} == {*new} - {*but}
    return all(torch.equal(new[n], t) and new[n].dtype == t.dtype for n, t in old.items() if n not in but)


EMBED = {"llama": "model.embed_tokens.weight", "gpt_neox": "gpt_neox.embed_in.weight", "gpt2": "transformer.wte.weight",
         "phi": "model.embed_tokens.weight", "gemma": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight",
         "steel softmoe": "model.embed_tokens.weight", "qwen2": "model.embed_tokens.weight"}  # fmt: skip
HEAD = {name: ("embed_out.weight" if name == "gpt_neox" else "lm_head.weight", "lm_head.bias") for name in EMBED}


@pytest.mark.parametrize(("family", "tied"), [
    ("llama", False), ("qwen2", True), ("gpt_neox", False), ("phi", False),
    ("steel softmoe", False), slow("gpt2", True), slow("gemma", True), slow("opt", True),
])  # fmt: skip
@torch.no_grad()
def test_a_pruned_vocabulary_gives_the_logits_of_the_kept_ids(family, tied, made, tmp_path):
    model = write_model(tmp_path / "in", family, ROWS, tied=tied, tokenizer=made / "old")
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=made / "pruned")
    kept = torch.tensor(json.loads((made / "pruned" / KEPT_IDS).read_text()))
    old = load_tokenizer(made / "old").encode_batch([ZH])[0]
    new = load_tokenizer(made / "pruned").encode_batch([ZH])[0]
    assert kept[list(new)].tolist() == list(old)
    got = load(tmp_path / "out")(input_ids=torch.tensor([new]), use_cache=False).logits
    expected = model(input_ids=torch.tensor([old]), use_cache=False).logits
    assert got.shape[-1] == FEWER
    assert (got - expected[..., kept]).abs().max() <= 1e-5
    names = {EMBED[family], *HEAD[family]}
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert others_equal(before, after, names)
    assert all(torch.equal(after[name], before[name][kept]) for name in names & before.keys())
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tree["vocab_size"], tree["eos_token_id"]) == (FEWER, load_tokenizer(made / "pruned").eos_id)
    assert (HEAD[family][0] in after) == (not tied)


def test_tokenizer_files_and_generation_settings_follow(made, tmp_path):
    write_model(tmp_path / "in", "llama", ROWS, torch.bfloat16, tokenizer=made / "old")
    old = read_pieces(made / "old")
    stops = [i for i, name in old.names.items() if name in ("<|im_end|>", "<|endoftext|>")]
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": ROWS - 1, "eos_token_id": stops, "pad_token_id": 3, "top_p": 0.8, "forced_bos_token_id": ROWS - 1}))  # fmt: skip
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=made / "pruned", vocab_size=320)
    for file in (made / "pruned").glob("tokenizer*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    tree = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    new = read_pieces(made / "pruned")
    assert {new.names[i] for i in tree["eos_token_id"]} == {"<|im_end|>", "<|endoftext|>"}
    assert tree["eos_token_id"][0] == load_tokenizer(made / "pruned").eos_id
    assert (tree["top_p"], "bos_token_id" in tree, "forced_bos_token_id" in tree) == (0.8, False, False)
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (model.dtype, model.config.vocab_size, len(AutoTokenizer.from_pretrained(tmp_path / "out"))) == (
        torch.bfloat16,
        320,
        FEWER,
    )
    assert cli.main(["generate", str(tmp_path / "out"), "--prompt", "钢铁", "--max-new-tokens", "3"]) == 0


@torch.no_grad()
def test_any_other_tokenizer_copies_what_both_have_and_averages_the_rest(made, tmp_path, capsys):
    write_model(tmp_path / "in", "llama", ROWS, tokenizer=made / "old")
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=made / "other", vocab_size=320)
    told = capsys.readouterr().out
    old, new = read_pieces(made / "old"), read_pieces(made / "other")
    by_name = {name: number for number, name in old.names.items()}
    tokenizer = load_tokenizer(made / "old")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    copied = averaged = 0
    for name in (EMBED["llama"], "lm_head.weight"):
        for number, piece in new.names.items():
            if piece in by_name:
                copied += 1
                assert torch.equal(after[name][number], before[name][by_name[piece]])
            else:
                averaged += 1
                text = load_tokenizer(made / "other").decode([number])
                parts = tokenizer.encode_batch([text])[0]
                assert torch.allclose(after[name][number], before[name][list(parts)].mean(0), atol=1e-7)
        assert torch.allclose(after[name][OTHER:], before[name][:SIZE].mean(0), atol=1e-7)
    assert copied
    assert averaged
    assert f"{copied // 2} of {OTHER} rows copied" in told
    assert f"{averaged // 2} means" in told
    assert "10 for no piece" in told


def test_the_same_tokenizer_moves_no_row(made, tmp_path):
    write_model(tmp_path / "in", "llama", ROWS, tokenizer=made / "old")
    rows = plan_rows(tmp_path / "in", ROWS, made / "old", load_tokenizer(made / "old"), None)
    assert rows.parts == [(i,) for i in range(SIZE)]


def test_a_byte_level_and_a_sentencepiece_tokenizer_are_compared_by_bytes(made, spaces, tmp_path):
    shutil.copytree(made / "old", tmp_path / "bytes")
    there = plan_rows(tmp_path / "bytes", SIZE, spaces, load_tokenizer(spaces), None)
    old, new = read_pieces(made / "old"), read_pieces(spaces)
    number = {name: i for i, name in new.names.items()}
    of = {name: i for i, name in old.names.items()}
    assert there.parts[number["▁the"]] == (of["Ġthe"],)
    assert there.parts[number["t"]] == (of["t"],)
    assert there.parts[number["<0xE9>"]] == (of["é"],)  # the letter that stands for this byte
    assert there.parts[number["</s>"]] == (old.roles["eos"],)  # by role: no token of that name
    back = plan_rows(spaces, len(new.names), made / "old", load_tokenizer(made / "old"), None)
    assert back.parts[of["Ġthe"]] == (number["▁the"],)
    assert back.parts[of["Ġ"]] == (number["▁"],)
    assert back.parts[of["é"]] == (number["<0xE9>"],)
    assert back.parts[of["t"]] == (number["t"],)  # the piece, not the byte of the same meaning
    two = next(
        i for i, keys in old.keys.items() if keys[0] == ("text", "钢铁"[:1].encode()[:2]) or keys[0][1] == b"\xe9\x92"
    )
    assert back.parts[two] == (number["<0xE9>"], number["<0x92>"])  # part of a character: the mean of its bytes
    assert back.parts[of["<|im_end|>"]] == (number["</s>"],) or back.parts[of["<|endoftext|>"]] == (number["</s>"],)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("phi", False), slow("gpt2", True)])
@torch.no_grad()
def test_a_size_alone_leaves_the_logits_of_old_rows(family, tied, made, tmp_path):
    model = write_model(tmp_path / "in", family, ROWS, tied=tied, tokenizer=made / "old")
    as_bin(tmp_path / "in")
    ids = torch.arange(40).reshape(2, 20) * 7 % SIZE
    expected = model(input_ids=ids, use_cache=False).logits
    for size in (384, SIZE):
        import_hf(tmp_path / "in", tmp_path / str(size), vocab_size=size)
        got = load(tmp_path / str(size))(input_ids=ids, use_cache=False).logits
        assert got.shape[-1] == size
        both = min(size, ROWS)
        assert (got[..., :both] - expected[..., :both]).abs().max() <= 1e-6
        mean = expected[..., :SIZE].mean(-1, keepdim=True)
        assert got[..., ROWS:].shape[-1] == 0 or (got[..., ROWS:] - mean).abs().max() <= 1e-5
        assert (tmp_path / str(size) / "tokenizer.json").read_bytes() == (made / "old" / "tokenizer.json").read_bytes()


@torch.no_grad()
def test_both_at_once_for_a_published_steel_llm(made, tmp_path):
    _, model = publish(tmp_path / "in", "sharded safetensors", torch.float32, vocab_size=ROWS, num_hidden_layers=3)
    shutil.copytree(made / "old", tmp_path / "in", dirs_exist_ok=True)
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=made / "pruned", layers=[0, 2])
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    kept = torch.tensor(json.loads((made / "pruned" / KEPT_IDS).read_text()))
    new = torch.tensor(load_tokenizer(made / "pruned").encode_batch([ZH]))
    got = load(tmp_path / "out")(input_ids=new, use_cache=False).logits
    assert (got - model.eval()(input_ids=kept[new], use_cache=False).logits[..., kept]).abs().max() <= 1e-5


def _break(folder, made, what):
    """Bring a model and a tokenizer into a bad state; returns the settings to import with."""
    write_model(folder / "in", "llama", ROWS, tokenizer=made / "old")
    shutil.copytree(made / "pruned", folder / "new")
    if what == "kept_ids of another tokenizer":
        shutil.copytree(made / "other", folder / "in", dirs_exist_ok=True)
    if what == "kept_ids too short":
        (folder / "new" / KEPT_IDS).write_text("[1, 2]")
    if what == "kept_ids broken":
        (folder / "new" / KEPT_IDS).write_text("[1, ")
    if what == "tokenizer broken":
        (folder / "new" / "tokenizer.json").write_text("{")
    if what == "no tokenizer at the model":
        for file in (folder / "in").glob("tokenizer*"):
            file.unlink()
    if what == "the model's tokenizer too large":
        write_model(folder / "in", "llama", SIZE - 10)
    if what == "embedding of other size":
        tree = json.loads((folder / "in" / "config.json").read_text())
        (folder / "in" / "config.json").write_text(json.dumps({**tree, "vocab_size": ROWS + 1}))
    return {"tokenizer": folder / ("none" if what == "no such tokenizer" else "new")}


@pytest.mark.parametrize(("what", "says"), [
    ("kept_ids of another tokenizer", "not the one that was pruned: id "), ("kept_ids too short", "names 2 ids"),
    ("kept_ids broken", "cannot be read"), ("tokenizer broken", "cannot load this tokenizer"),
    ("no tokenizer at the model", "holds no tokenizer"), ("no such tokenizer", "there is no such tokenizer"),
    ("the model's tokenizer too large", f"has {SIZE} ids and its embedding {SIZE - 10} rows"),
    ("embedding of other size", rf"embed_tokens\.weight has {ROWS} rows, and config\.json says vocab_size {ROWS + 1}"),
])  # fmt: skip
def test_what_does_not_fit_is_named(what, says, made, tmp_path):
    settings = _break(tmp_path, made, what)
    with pytest.raises(SteelError, match=says):
        import_hf(tmp_path / "in", tmp_path / "out", **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "new"]


@pytest.mark.parametrize(("size", "new", "says"), [(SIZE - 1, None, f"has {SIZE} ids, and {SIZE - 1} rows"),
                                                  (FEWER - 1, "pruned", f"has {FEWER} ids, and {FEWER - 1} rows"),
                                                  (0, "pruned", "0 rows"), (-5, None, "-5 rows"), (0, None, "0 rows")])  # fmt: skip
def test_fewer_rows_than_ids(size, new, says, made, tmp_path, capsys):
    write_model(tmp_path / "in", "llama", ROWS, tokenizer=made / "old")
    more = ["--tokenizer", str(made / new)] if new else []
    command = ["import", str(tmp_path / "in"), str(tmp_path / "out"), f"--vocab-size={size}", *more]
    assert cli.main(command) == 78
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
