"""Toy parts for scores: a random Steel model over single characters, and small benchmark folders as they are published."""

import csv

from megatron_steel.model.build import build_model
from megatron_steel.model.configuration_steel import SteelConfig

LETTERS = "ABCD"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHOWN = "".join(chr(c) for c in range(32, 127)) + "\n：以下是中国关于法学逻辑的单项选择题，请选出其中正确答案。问"


def write_letters(folder, seed: int = 5, only: str = "", template: str | None = CHATML):
    """A Hugging Face folder; returns the model and {token: id}.

    `only`: the model writes no other characters than these, and the end of its turn.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = {word: i for i, word in enumerate([*special, *dict.fromkeys(_SHOWN)])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                        additional_special_tokens=special[3:])  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = SteelConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, eos_token_id=0, pad_token_id=1, initializer_range=0.4,
                         max_position_embeddings=1024)  # fmt: skip
    model = build_model(config, seed).eval()
    if only:
        with torch.no_grad():
            for word, i in words.items():
                if word not in [*only, "<|im_end|>"]:
                    model.lm_head.weight[i] = 0
    model.save_pretrained(folder)
    return model, words


def rows(subject: str, split: str, count: int) -> list[dict[str, str]]:
    """Questions whose answers are not all the same, of words that differ between subjects and splits."""
    shift = len(subject) * 7 + len(split)
    return [
        {"id": str(i), "question": f"{subject} {split} 问题{'?' * (1 + i % 3)}{i}?",
         **{x: f"{(shift * (i + 3) + j * 5) % 97}" for j, x in enumerate(LETTERS)}, "answer": LETTERS[(i * 3 + shift) % 4]}
        for i in range(count)
    ]  # fmt: skip


def write_ceval(folder, subjects, dev: int = 3, val: int = 4) -> None:
    for subject in subjects:
        for split, count in (("dev", dev), ("val", val)):
            columns = ["id", "question", *LETTERS, "answer", *(["explanation"] if split == "dev" else [])]
            _write(folder / split / f"{subject}_{split}.csv", columns, rows(subject, split, count))


def write_cmmlu(folder, subjects, dev: int = 5, test: int = 4) -> None:
    for subject in subjects:
        for split, count in (("dev", dev), ("test", test)):
            published = [{"": row["id"], "Question": row["question"], **{x: row[x] for x in LETTERS}, "Answer": row["answer"]}
                         for row in rows(subject, split, count)]  # fmt: skip
            _write(folder / split / f"{subject}.csv", ["", "Question", *LETTERS, "Answer"], published)


def write_mmlu(folder, subjects, dev: int = 5, test: int = 4) -> None:
    for subject in subjects:
        for split, count in (("dev", dev), ("test", test)):
            columns = ["question", *LETTERS, "answer"]
            _write(folder / split / f"{subject}_{split}.csv", columns, rows(subject, split, count), header=False)


def _write(file, columns, rows, header: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="because", extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
