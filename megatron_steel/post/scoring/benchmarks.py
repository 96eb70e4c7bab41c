"""The three benchmarks of multiple choice that have a local form: C-Eval, CMMLU, MMLU; their files, questions and subjects.

One table says how each is published: folder, splits, columns. `read` gives the questions of a local folder, checked;
`document` and `question` turn a question into the row that lm-evaluation-harness expects, and back. The subjects, their
prompts and MMLU's categories are the harness's own task files; nothing else of the harness is used here. Must not know
models or scores.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.post.scoring import categories

LETTERS = "ABCD"
FEW_SHOT = 5


@dataclass(frozen=True)
class Question:
    """One question of a benchmark. `answer` is a letter from A to D; `number` counts within the subject's file from 0."""

    subject: str
    number: int
    text: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is published and what the harness calls it."""

    task: str  # the harness's group; its subjects are TASK_SUBJECT
    task_files: str  # the harness's task files, below its tasks folder
    folder: str  # its place below a data folder that holds several benchmarks
    scored: str  # the split that is scored; the examples come from `dev`
    file: str
    columns: tuple[str, ...] | None  # question, A to D, answer, as the header names them; None: there is no header
    numbered: bool  # the harness's rows hold a list of choices and the answer's number
    prompt: str
    source: str  # of the categories

    def path(self, split: str, subject: str) -> str:
        return f"{split}/{self.file.format(subject=subject, split=split)}"


BENCHMARKS = {
    one.task: one
    for one in (
        Benchmark("ceval-valid", "ceval/ceval-valid_*.yaml", "ceval-exam", "val", "{subject}_{split}.csv",
                  ("question", "A", "B", "C", "D", "answer"), False,
                  "description of the subject, {question}\\nA. ..\\nD. ..\\n答案：, log-likelihood of ' A' to ' D'",
                  "hkust-nlp/ceval subject_mapping.json; hard: the eight subjects of C-Eval Hard, arXiv 2305.08322"),
        Benchmark("cmmlu", "cmmlu/cmmlu_*.yaml", "cmmlu", "test", "{subject}.csv",
                  ("Question", "A", "B", "C", "D", "Answer"), False,
                  "description of the subject, {question}\\nA. ..\\nD. ..\\n答案：, log-likelihood of ' A' to ' D'",
                  "haonan-li/CMMLU src/categories.py, arXiv 2306.09212 (a subject may also be China specific)"),
        Benchmark("mmlu", "mmlu/default/mmlu_*.yaml", "mmlu", "test", "{subject}_{split}.csv", None, True,
                  "description of the subject, {question}\\nA. ..\\nD. ..\\nAnswer:, log-likelihood of ' A' to ' D'",
                  "the harness's tags, after hendrycks/test categories.py, arXiv 2009.03300"),
    )
}  # fmt: skip


def read(benchmark: Benchmark, data: Path) -> dict[str, dict[str, list[Question]]]:
    """{subject: {"dev": questions, scored split: questions}} of every subject whose two files are there.

    Args:
        data: the benchmark's own folder, or one that holds it under its name (`Benchmark.folder`).

    Raises:
        SteelError: no subject has its files, a file of another shape, a scored question that also is an example.
    """
    found = {}
    folder = data / benchmark.folder if (data / benchmark.folder).is_dir() else data
    for subject in shipped_files(benchmark):
        files = {split: folder / benchmark.path(split, subject) for split in ("dev", benchmark.scored)}
        if all(file.is_file() for file in files.values()):
            found[subject] = {split: _questions(benchmark, subject, file) for split, file in files.items()}
            _refuse_shared(benchmark, found[subject], files[benchmark.scored])
    if not found:
        wanted = " and ".join(benchmark.path(split, "SUBJECT") for split in ("dev", benchmark.scored))
        raise SteelError(f"there is no {benchmark.task} subject here", data,
                         f"name the folder that holds {benchmark.folder}/ with {wanted}, or that folder itself")  # fmt: skip
    return found


@functools.cache
def shipped_files(benchmark: Benchmark) -> dict[str, Path]:
    """The harness's own task file of each subject that it has a prompt for."""
    import lm_eval.tasks

    files = Path(str(lm_eval.tasks.__file__)).parent.glob(benchmark.task_files)
    return {file.stem.removeprefix(f"{benchmark.task}_"): file for file in sorted(files)}


@functools.cache
def shipped_task(file: Path) -> dict[str, Any]:
    """The harness's specification in a task file, with what that includes."""
    import yaml

    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    common = tree.pop("include", None)
    return {**(yaml.safe_load((file.parent / common).read_text(encoding="utf-8")) if common else {}), **tree}


def categories_of(benchmark: Benchmark, subject: str) -> tuple[str, ...]:
    """The categories that a subject counts in; a subject may stand in two."""
    if benchmark.task == "mmlu":
        return (shipped_task(shipped_files(benchmark)[subject])["tag"].removeprefix("mmlu_").removesuffix("_tasks"),)
    table = categories.CEVAL if benchmark.task == "ceval-valid" else categories.CMMLU
    return tuple(name for name, subjects in table.items() if subject in subjects)


def document(benchmark: Benchmark, question: Question) -> dict[str, Any]:
    """A question as a row of the published data set, which the harness's prompts are made for."""
    if benchmark.numbered:
        answer = LETTERS.index(question.answer)
        return {"question": question.text, "choices": list(question.options), "answer": answer}
    text, *options, answer = benchmark.columns or ()
    return {text: question.text, **dict(zip(options, question.options, strict=True)), answer: question.answer}


def question(benchmark: Benchmark, subject: str, number: int, row: dict[str, Any]) -> Question:
    """The question in a row of the published data set; `datasets` may have taken a column of numbers for numbers."""
    if benchmark.numbered:
        return Question(subject, number, row["question"], tuple(map(str, row["choices"])), LETTERS[row["answer"]])
    text, *options, answer = benchmark.columns or ()
    return Question(subject, number, row[text], tuple(str(row[option]) for option in options), row[answer])


def _questions(benchmark: Benchmark, subject: str, file: Path) -> list[Question]:
    rows = _rows(benchmark, file)
    found = []
    for number, values in enumerate(rows):
        empty = [
            name for name, value in zip(("question", *LETTERS, "answer"), values, strict=True) if not value.strip()
        ]
        if empty or values[5] not in tuple(LETTERS):
            told = f"has no {empty[0]}" if empty else f"has the answer {values[5]!r}"
            raise SteelError(
                f"question {number + 1} {told}", file, "give it a question, four choices and an answer from A to D"
            )
        found.append(Question(subject, number, values[0], tuple(values[1:5]), values[5]))
    return found


def _rows(benchmark: Benchmark, file: Path) -> list[list[str]]:
    """[question, A, B, C, D, answer] of each row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream, strict=True) if row]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise SteelError(f"the file is not CSV in UTF-8: {error}", file, "restore the published file") from None
    places: list[int] = list(range(6))
    remedy = "give it six columns without a header: question, four choices, answer"
    if benchmark.columns is not None:
        header, *rows = rows or [[]]
        remedy = f"give it the columns {', '.join(benchmark.columns)}"
        missing = [column for column in benchmark.columns if column not in header]
        if missing:
            raise SteelError(f"the column {missing[0]!r} is missing", file, remedy)
        places = [header.index(column) for column in benchmark.columns]
    if not rows:
        raise SteelError("the file holds no question", file, remedy)
    width = len(header) if benchmark.columns is not None else 6
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise SteelError(f"question {number} has {len(row)} columns instead of {width}", file, remedy)
    return [[row[place] for place in places] for row in rows]


def _refuse_shared(benchmark: Benchmark, splits: dict[str, list[Question]], file: Path) -> None:
    # With its choices: published files ask "which of these is right?" in both splits, about different things.
    dev, scored = ({(asked.text, asked.options) for asked in splits[split]} for split in ("dev", benchmark.scored))
    if dev & scored:
        raise SteelError(f"a question stands in dev and in {benchmark.scored}: {min(dev & scored)[0][:40]!r}", file,
                         "take the examples from questions that are not scored")  # fmt: skip
