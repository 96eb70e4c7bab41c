"""C-Eval from a local folder, as the harness's own tasks `ceval-valid_SUBJECT`.

Prompts, few-shot rule and metric are the harness's; only the rows come from here (C-Eval, arXiv 2305.08322: validation
split, examples from the dev split). The folder is the published one: `dev/SUBJECT_dev.csv` and `val/SUBJECT_val.csv`
with the columns id, question, A, B, C, D, answer (and explanation in dev). Must not know models.
"""

import csv
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError

TASK = "ceval-valid"
FEW_SHOT = 5
PROMPT = (
    "description of the subject, {question}\\nA. ..\\nB. ..\\nC. ..\\nD. ..\\n答案：, log-likelihood of ' A' to ' D'"
)
_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_SPLITS = ("dev", "val")


def shipped_files() -> dict[str, Path]:
    """The harness's own task file of each subject that it has a prompt for."""
    import lm_eval.tasks

    files = Path(str(lm_eval.tasks.__file__)).parent.glob(f"ceval/{TASK}_*.yaml")
    return {file.stem.removeprefix(f"{TASK}_"): file for file in sorted(files)}


def shipped_task(file: Path) -> dict[str, Any]:
    """The harness's specification in a task file, with what that includes."""
    import yaml

    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    common = tree.pop("include", None)
    return {**(yaml.safe_load((file.parent / common).read_text(encoding="utf-8")) if common else {}), **tree}


def local_tasks(folder: Path) -> list[dict[str, Any]]:
    """One task specification a subject whose two files are there.

    Raises:
        SteelError: no subject has its files, a column is missing, an answer is none of A to D, a question of val also
            stands in dev (the prompt would hold its answer).
    """
    specs = []
    for subject, shipped in shipped_files().items():
        files = {split: folder / split / f"{subject}_{split}.csv" for split in _SPLITS}
        if all(file.is_file() for file in files.values()):
            specs.append(
                _task(shipped_task(shipped), {split: _rows(file) for split, file in files.items()}, files["val"])
            )
    if not specs:
        raise SteelError("there is no C-Eval subject here", folder,
                         "name the folder that holds dev/SUBJECT_dev.csv and val/SUBJECT_val.csv")  # fmt: skip
    return specs


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The harness's results as {"acc": unweighted mean over subjects, "n": questions, "subjects": {...}, ...}."""
    parts: dict[str, dict[str, Any]] = {}
    for task, result in sorted(found["results"].items()):
        if task.startswith(f"{TASK}_"):
            parts[task.removeprefix(f"{TASK}_")] = {
                "acc": result["acc,none"],
                "n": found["n-samples"][task]["effective"],
                "few_shot": found["n-shot"][task],
            }
    n = sum(part["n"] for part in parts.values())
    shots = sorted({part["few_shot"] for part in parts.values()})
    return {
        "acc": sum(part["acc"] for part in parts.values()) / len(parts),
        "acc_over_questions": sum(part["acc"] * part["n"] for part in parts.values()) / n,
        "n": n,
        "few_shot": shots[0] if len(shots) == 1 else shots,
        "version": next(iter(found["versions"].values())),
        "prompt": PROMPT,
        "subjects": parts,
        "absent": sorted(set(shipped_files()) - set(parts)),
    }


def _task(shipped: dict[str, Any], rows: dict[str, list[dict[str, str]]], where: Path) -> dict[str, Any]:
    both = {row["question"] for row in rows["dev"]} & {row["question"] for row in rows["val"]}
    if both:
        raise SteelError(f"a question stands in dev and in val: {next(iter(both))[:40]!r}", where,
                         "take the examples from questions that are not scored")  # fmt: skip

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(rows[split]) for split in _SPLITS}

    return {
        **shipped,
        "custom_dataset": dataset,
        "dataset_name": None,
        "num_fewshot": min(FEW_SHOT, len(rows["dev"])),
    }


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            rows = [dict(row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise SteelError(f"the file is not CSV in UTF-8: {error}", file, "restore the published file") from None
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or [])]
    if missing or not rows:
        what = f"the column {missing[0]!r} is missing" if missing else "the file holds no question"
        raise SteelError(what, file, f"give it the columns {', '.join(_COLUMNS)}")
    for number, row in enumerate(rows, start=1):
        empty = [column for column in _COLUMNS if not row[column]]
        if empty or row["answer"] not in ("A", "B", "C", "D"):
            what = (
                f"question {number} has no {empty[0]}"
                if empty
                else f"the answer of question {number} is {row['answer']!r}"
            )
            raise SteelError(what, file, "give it a question, four choices and an answer from A to D")
    return [{column: row[column] for column in ("id", *_COLUMNS) if row.get(column) is not None} for row in rows]
