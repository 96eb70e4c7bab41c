"""From questions answered to scores: by subject, by category, over all; as JSON, as lines, as text on the screen.

Works on items, whichever protocol made them. Must not know models or how an answer was found.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_steel.errors import SteelError
from megatron_steel.post.scoring.benchmarks import Benchmark, categories_of, shipped_files


def summary(benchmark: Benchmark, protocol: str, items: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The score of one benchmark.

    Args:
        items: one a question, with `subject`, `right` and `given` (None: the reply gave no answer).
        protocol: its name. facts: of the protocol, kept with the score.

    Returns: {"acc": mean of the subjects' accuracies, each weighing the same, "acc_over_questions", "n": questions,
        "invalid": replies without an answer, "subjects", "categories", "absent", "protocol", ...}.
    """
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        by_subject.setdefault(item["subject"], []).append(item)
    subjects = {subject: _accuracy(found) for subject, found in sorted(by_subject.items())}
    categories: dict[str, list[str]] = {}
    for subject in subjects:
        for category in categories_of(benchmark, subject):
            categories.setdefault(category, []).append(subject)
    return {
        "acc": _mean([one["acc"] for one in subjects.values()]),
        "acc_over_questions": _mean([float(item["right"]) for item in items]),
        "n": len(items),
        "invalid": sum(item["given"] is None for item in items),
        "protocol": protocol,
        "prompt": benchmark.prompt,
        **facts,
        "categories": {
            name: {"acc": _mean([subjects[s]["acc"] for s in members]), "n": sum(subjects[s]["n"] for s in members),
                   "subjects": len(members)}
            for name, members in categories.items()
        },
        "categories_source": benchmark.source,
        "subjects": subjects,
        "absent": sorted(set(shipped_files(benchmark)) - set(subjects)),
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print one model's scores."""
    about = about_of(result)
    print(f"{about['model']}: {about['dtype']} on {about['device']}, {_verdict(about)}")
    if about["loss_sees_future"]:
        print("THIS MODEL SEES THE FUTURE: its scores do not compare with those of causal models")
    for task, score in result.items():
        for one in protocols(score):
            _show_one(task, one)


def protocols(score: dict[str, Any]) -> list[dict[str, Any]]:
    """A task's scores, one a protocol that it was scored by."""
    return [score, *([score["steel-chat"]] if "steel-chat" in score else [])]


def about_of(result: dict[str, Any]) -> dict[str, Any]:
    """What all scores of one model share: which model, how it was run, what its audit says."""
    facts: dict[str, Any] = next(iter(result.values()))["protocol"]
    return facts


def _show_one(task: str, score: dict[str, Any]) -> None:
    for subject, part in score.get("subjects", {}).items():
        print(f"  {subject:45} {part['acc']:7.2%}  of {part['n']}")
    for category, part in score.get("categories", {}).items():
        print(f"  {category + ' (' + str(part['subjects']) + ' subjects)':45} {part['acc']:7.2%}  of {part['n']}")
    if score.get("absent"):
        print(f"  left out, {len(score['absent'])} subjects without files: {', '.join(score['absent'])}")
    how_made = score["protocol"]["name"]
    shown = f"{score['acc']:.2%}" if "acc" in score else json.dumps(score)
    how = [f"{score['n']} questions", f"{score['few_shot']}-shot"]
    how += [f"version {score['version']}"] if score.get("version") is not None else []
    how += [f"{score['invalid']} replies without an answer"] if score.get("invalid") else []
    how += [f"{score['truncated']} PROMPTS CUT OFF"] if score.get("truncated") else []
    print(f"{task}: {shown} by {how_made} ({', '.join(how)})")


def _verdict(about: dict[str, Any]) -> str:
    return about["audit"] or "not audited"


def _accuracy(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"acc": _mean([float(item["right"]) for item in items]), "n": len(items)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def require_folder(file: str | None, what: str) -> None:
    """Raises SteelError, before anything is computed, where `file` could not be written."""
    if file is not None and Path(file).is_dir():
        raise SteelError(f"a folder stands where the {what} should go", file, "name a file in it")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise SteelError(f"the folder for the {what} does not exist", file, "make it first, or name another file")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """A text file that takes its place when it is whole. Raises SteelError when it cannot be written."""
    aside = file.with_name(f".{file.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except OSError as error:
        raise SteelError(f"the file could not be written: {error.strerror}", file, "name another file") from error
    finally:
        aside.unlink(missing_ok=True)
