"""Rows of one set to lines of fine-tuning data: read, judged, control strings made harmless, measured.

A line is what TRL and LLaMA-Factory read (`messages`; for preferences `prompt`, `chosen`, `rejected`; for a reward
`prompt`, `answer`, `options`), and the set, file and row that it comes from. Each usable row also gets numbers from its
content and the seed alone: whether it is drawn, where it goes and on which side it stands depend on nothing else; rows
whose first questions are one, but for white space and the width of characters, stand on one side. Must not know how many rows are wanted.
"""

import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron_steel.data import readers
from megatron_steel.data.decontaminate import Matcher
from megatron_steel.data.sources import Broken, Rejected
from megatron_steel.post.sft_data.examples import Example, check
from megatron_steel.post.sft_data.sources import Source, holds_placeholder, table
from megatron_steel.post.sft_data.spec import Spec
from megatron_steel.post.template import Template

_BATCH, _NAMED = 256, 5


@dataclass
class Outcome:
    """What became of some rows; the arrays have one entry for each usable row, in order."""

    rows: int = 0
    malformed: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """The first row of each reason, "file, row n"."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Where, and what is wrong, for the first few malformed rows."""
    files: Counter[str] = field(default_factory=Counter)
    """Rows of each file."""
    items: Counter[int] = field(default_factory=Counter)
    """Rows rejected for a benchmark's item, by item."""
    control_strings: int = 0
    placeholders: int = 0
    sizes: array = field(default_factory=lambda: array("I"))
    """Bytes of the line."""
    tokens: array = field(default_factory=lambda: array("I"))
    keys: array = field(default_factory=lambda: array("Q"))
    """Of the content: rows with equal keys are one; a draw takes the smallest."""
    places: array = field(default_factory=lambda: array("Q"))
    """The order of the mixture."""
    heldout: array = field(default_factory=lambda: array("b"))

    def add(self, other: "Outcome") -> None:
        """Append what became of the next rows."""
        self.first = other.first | self.first
        self.problems = (self.problems + other.problems)[:_NAMED]
        for key in ("rows", "malformed", "control_strings", "placeholders"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for counter in ("rejected", "files", "items"):
            getattr(self, counter).update(getattr(other, counter))
        for name in ("sizes", "tokens", "keys", "places", "heldout"):
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True)
class Task:
    """One unit of one set: the set's number in the specification, its file's name, the rows before it, where lines go."""

    part: int
    name: str
    unit: readers.Unit
    before: int
    output: str


class Maker:
    """Rows to lines; one in each process. Raises SteelError for a bad tokenizer or benchmark."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.template = Template(spec.tokenizer)
        self.matcher = Matcher(spec.benchmarks) if spec.benchmarks else None
        self.sources = [table(spec.kind, part.name, part.author)[part.type] for part in spec.sources]

    def example(self, source: Source, row: readers.Record, outcome: Outcome) -> Example:
        """The example of a row, judged by itself. Raises Rejected and Broken."""
        if row.problem:
            raise Broken(row.problem)
        fields = row.fields or {}
        outcome.placeholders += source.placeholder and holds_placeholder(fields)
        example = source.read(fields)
        if self.spec.kind == "grpo" and not example.answer:
            raise Rejected("no single answer to judge by")
        check(example)
        example, count = self._harmless(example)
        outcome.control_strings += count
        return example

    def contamination(self, example: Example) -> list[int]:
        """Numbers of the benchmark items that an example holds."""
        return [hit.item for hit in self.matcher.find(example.content())] if self.matcher else []

    def renderings(self, example: Example) -> list[str]:
        """The conversation with each of its replies, as the model reads it. Raises Rejected."""
        replies = 0 if self.spec.kind == "grpo" else len(example.replies)
        rendered = [self.template.render(example.turns(i)) for i in range(replies)]
        rendered = rendered or [self.template.render(list(example.prompt))]
        if not all(rendered):
            raise Rejected("the chat template refuses it")
        return [text for text in rendered if text]

    def _harmless(self, example: Example) -> tuple[Example, int]:
        total = 0

        def clean(text: str) -> str:
            nonlocal total
            text, count = self.template.harmless(text)
            total += count
            return text

        prompt = tuple((role, clean(content)) for role, content in example.prompt)
        if self.spec.system is not None and prompt[0][0] != "system":
            prompt = (("system", self.spec.system), *prompt)
        return Example(prompt, tuple(map(clean, example.replies)), example.answer, example.options), total


def make(task: Task, maker: Maker) -> Outcome:
    """One unit to its lines. Raises SteelError where the file itself is broken."""
    outcome, source = Outcome(), maker.sources[task.part]
    batch: list[tuple[Example, list[str], int]] = []
    with open(task.output, "wb") as file:

        def flush() -> None:
            lengths = iter(maker.template.lengths([text for _, texts, _ in batch for text in texts]))
            for example, texts, number in batch:
                longest = max(next(lengths) for _ in texts)
                with _Verdict(outcome, f"{task.name}, row {number}"):
                    if longest > maker.spec.max_tokens:
                        raise Rejected("too long")
                    if items := maker.contamination(example):
                        outcome.items.update(items)
                        raise Rejected("holds a benchmark question")
                    _write(file, example, f"{task.name}:{number}", longest, maker.spec, task.part, outcome)
            batch.clear()

        for row in readers.records(task.unit):
            if row.fields is None and not row.problem:
                continue  # an empty line
            outcome.rows += 1
            number = task.before + row.number
            with _Verdict(outcome, f"{task.name}, row {number}"):
                example = maker.example(source, row, outcome)
                batch.append((example, maker.renderings(example), number))
            if len(batch) >= _BATCH:
                flush()
        flush()
    outcome.files[task.name] = outcome.rows
    return outcome


class _Verdict:
    """Counts a row that is refused inside, and goes on."""

    def __init__(self, outcome: Outcome, where: str):
        self._outcome, self._where = outcome, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, verdict: BaseException | None, trace: object) -> bool:
        if isinstance(verdict, Rejected):
            self._outcome.rejected[str(verdict)] += 1
            self._outcome.first.setdefault(str(verdict), self._where)
        elif isinstance(verdict, Broken):
            self._outcome.malformed += 1
            if len(self._outcome.problems) < _NAMED:
                self._outcome.problems.append((self._where, str(verdict)))
        return isinstance(verdict, (Rejected, Broken))


def _write(file: Any, example: Example, origin: str, tokens: int, spec: Spec, part: int, outcome: Outcome) -> None:
    tree = _tree(example, spec.kind) | {"source": spec.sources[part].type, "origin": origin}
    line = json.dumps(tree, ensure_ascii=False).encode() + b"\n"
    content = json.dumps([example.prompt, example.replies], ensure_ascii=False).encode()
    asked = next(content for role, content in example.prompt if role == "user")
    question = " ".join(unicodedata.normalize("NFKC", asked).split())
    file.write(line)
    digest = _digest(spec.seed, "row", content)
    outcome.sizes.append(len(line))
    outcome.tokens.append(tokens)
    outcome.keys.append(int.from_bytes(digest[:8], "big"))
    outcome.places.append(int.from_bytes(digest[8:], "big"))
    side = int.from_bytes(_digest(spec.seed, "side", question.encode())[:8], "big")
    outcome.heldout.append(side < spec.heldout_ratio * 2**64)


def _tree(example: Example, kind: str) -> dict[str, Any]:
    def messages(turns: Any) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in turns]

    if kind == "sft":
        return {"messages": messages(example.turns())}
    prompt = {"prompt": messages(example.prompt)}
    if kind == "dpo":
        chosen, rejected = ([{"role": "assistant", "content": reply}] for reply in example.replies)
        return prompt | {"chosen": chosen, "rejected": rejected}
    return prompt | {"answer": example.answer, "options": list(example.options)}


def _digest(seed: int, use: str, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=f"{seed} {use}".encode()).digest()
