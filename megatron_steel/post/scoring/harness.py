"""Log-likelihood scores by lm-evaluation-harness: its prompts and its metric, on its rows or on local ones.

1. A benchmark's local folder becomes the harness's own tasks, unchanged but for where their rows come from.
2. The harness scores; every question comes back as an item that says what was asked, wanted and found.

Must not know how scores are summed up, shown or compared.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.post.load import Loaded
from megatron_steel.post.scoring.benchmarks import (
    BENCHMARKS,
    FEW_SHOT,
    LETTERS,
    Benchmark,
    Question,
    document,
    question,
    read,
    shipped_files,
    shipped_task,
)

NAME = "loglikelihood"
_BATCH = 8
Rows = Mapping[str, Mapping[str, list[Question]]]  # {subject: {split: questions}}


def require_harness() -> None:
    """Raises SteelError where the extra is not installed."""
    # Before the import, which reads it; and scoring a local folder must not touch the network.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise SteelError("lm-evaluation-harness is not installed", "evaluate",
                         "pip install 'megatron-steel[eval]'") from None  # fmt: skip
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Harness:
    """The harness's tasks, and where their rows come from.

    Args:
        tasks: names of tasks or groups; with `data`, of benchmarks.
        data: a folder that holds them locally; then nothing is downloaded.

    Raises:
        SteelError: an unknown task, one that has no local form, a data folder of another shape.
    """

    def __init__(self, tasks: list[str], data: str | None):
        from lm_eval.tasks import TaskManager

        self.local = data is not None
        # To read the harness's thousands of task files takes long, and local tasks need none of them.
        self._manager = TaskManager(include_defaults=not self.local)
        for task in tasks:
            if self.local and task not in BENCHMARKS:
                raise SteelError(f"the task {task!r} has no local form", "--tasks",
                                 f"with --data choose from {', '.join(BENCHMARKS)}; run the others without it")  # fmt: skip
            if not self.local and task not in self._manager.all_tasks:
                raise SteelError(f"the harness knows no task {task!r}", "--tasks", "see `lm-eval ls tasks`")
        self._rows: dict[str, Rows] = {t: read(BENCHMARKS[t], Path(data)) for t in tasks} if data is not None else {}

    def model(self, loaded: Loaded, batch: bool) -> Any:
        """A loaded model as the harness wants it. `batch` off: nothing is padded, for a model that would read it."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=_BATCH if batch else 1,
                    device=str(loaded.device))  # fmt: skip

    def score(self, model: Any, task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the harness finds for any task, as it says it: metrics, "n", "version", "few_shot", "parts", "truncated"; its items."""
        found = self._run(model, [task], None)
        own = found["results"].get(task, {})  # a tag has no figure of its own
        metrics = {key.removesuffix(",none"): value for key, value in own.items() if key.endswith(",none")}
        used = sorted(set(found["n-shot"].values()))
        score = {
            **metrics,
            "n": sum(counts["effective"] for counts in found["n-samples"].values()),
            "version": found["versions"].get(task),
            "few_shot": used[0] if len(used) == 1 else used,
            "parts": found["results"] if len(found["n-samples"]) > 1 else {},
        }
        items = [
            {"subject": name, "number": sample["doc_id"], "document": sample["doc"], "target": sample["target"],
             "truncated": _truncated(model, sample),
             **{metric: sample[metric] for metric in sample["metrics"]}}
            for name, samples in sorted(found["samples"].items())
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]  # fmt: skip
        return {**score, "truncated": _count_truncated(task, model, items)}, items

    def items(self, model: Any, benchmark: Benchmark) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Every question of a benchmark, scored; and the task's version, number of examples in the prompt and of cut prompts."""
        rows = self._rows.get(benchmark.task)
        tasks = [benchmark.task] if rows is None else local_tasks(benchmark, rows)
        found = self._run(model, tasks, FEW_SHOT if rows is None else None)
        items = []
        for name, samples in sorted(found["samples"].items()):
            subject = name.removeprefix(f"{benchmark.task}_")
            for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
                asked = question(benchmark, subject, sample["doc_id"], sample["doc"])
                items.append({**_item(asked, sample), "truncated": _truncated(model, sample)})
        shots = sorted(set(found["n-shot"].values()))
        versions = {found["versions"][name] for name in found["samples"]}
        return items, {"version": versions.pop(), "few_shot": shots[0] if len(shots) == 1 else shots,
                       "truncated": _count_truncated(benchmark.task, model, items)}  # fmt: skip

    def questions(self, benchmark: Benchmark) -> list[Question]:
        """The scored questions of a benchmark, for a protocol that asks them in its own way."""
        rows = self._rows.get(benchmark.task)
        if rows is not None:
            return [asked for splits in rows.values() for asked in splits[benchmark.scored]]
        found = []
        for subject in shipped_files(benchmark):
            task = self._manager.load([f"{benchmark.task}_{subject}"])["tasks"][f"{benchmark.task}_{subject}"]
            found += [question(benchmark, subject, number, row) for number, row in enumerate(task.eval_docs)]
        return found

    def _run(self, model: Any, tasks: list[Any], shots: int | None) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        return simple_evaluate(model=model, tasks=tasks, task_manager=self._manager, num_fewshot=shots, bootstrap_iters=0,
                               log_samples=True)  # fmt: skip


def local_tasks(benchmark: Benchmark, rows: Rows) -> list[dict[str, Any]]:
    """One specification of the harness a subject: its own, with our rows."""
    files = shipped_files(benchmark)
    return [_local_task(benchmark, shipped_task(files[subject]), splits) for subject, splits in rows.items()]


def _local_task(benchmark: Benchmark, shipped: dict[str, Any], splits: Mapping[str, list[Question]]) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {
            split: Dataset.from_list([document(benchmark, asked) for asked in rows]) for split, rows in splits.items()
        }

    return {
        **{key: value for key, value in shipped.items() if key != "tag"},  # a tag would gather the harness's own rows
        "custom_dataset": dataset,
        "dataset_name": None,
        "num_fewshot": min(FEW_SHOT, len(splits["dev"])),
    }


def _truncated(model: Any, sample: dict[str, Any]) -> bool:
    """Whether a prompt was longer than the model reaches: the harness cuts its start off, examples first, and scores the rest."""

    def cut(context: str, *rest: Any) -> bool:
        if not rest:
            return False  # a whole text: it is read in windows
        if isinstance(rest[0], str):  # the last token of a continuation is never read
            return len(model.tok_encode(context + rest[0])) > model.max_length + 1
        return len(model.tok_encode(context)) > model.max_length - rest[0].get("max_gen_toks", model.max_gen_toks)

    return any(cut(*request) for request in sample["arguments"])


def _count_truncated(task: str, model: Any, items: list[dict[str, Any]]) -> int:
    count = len({(item["subject"], item["number"]) for item in items if item["truncated"]})
    if count:
        dist.log.warning("%s: %d prompts are longer than the %d tokens that the model reaches: their first examples were cut "
                         "off, so the score is not of the stated number of examples", task, count, model.max_length)  # fmt: skip
    return count


def _item(asked: Question, sample: dict[str, Any]) -> dict[str, Any]:
    found = [float(answer[0]) for answer in sample["filtered_resps"]]
    return {
        "subject": asked.subject,
        "number": asked.number,
        "question": asked.text,
        "options": list(asked.options),
        "answer": asked.answer,
        "given": LETTERS[max(range(len(found)), key=found.__getitem__)],
        "right": bool(sample["acc"]),
        "log_likelihoods": found,
    }
