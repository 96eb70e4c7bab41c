"""Scores of an exported model by lm-evaluation-harness (extra `eval`), offline where a local folder is given.

1. The model is opened by `load`, so that no foreign code runs unasked.
2. `ceval` turns a local C-Eval folder into the harness's own tasks: its prompts, our rows.
3. A model that sees the future is said to, by the folder's `audit.json` or, where there is none, by the caller's audit.
4. The harness scores; each figure is kept with task version, number of examples in the prompt, and prompt style.

Must not know checkpoints or runs. A score means nothing without its protocol, so the two are never separated.
"""

import json as json_format
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.model import verdict
from megatron_steel.post import ceval
from megatron_steel.post.load import Loaded, load

_BATCH = 8


def evaluate(
    model_dir: str,
    tasks: list[str],
    data: str | None = None,
    json: str | None = None,
    trust_code: bool = False,
    audit: Callable[[Path, bool], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Score a Hugging Face folder.

    Args:
        tasks: names of harness tasks or groups, `ceval-valid` among them.
        data: a local C-Eval folder with `dev/SUBJECT_dev.csv` and `val/SUBJECT_val.csv`; then nothing is downloaded.
        json: write the result here too.
        trust_code: allow foreign modelling code that lies in the folder.
        audit: gives the report on a folder without `audit.json`, from the folder and `trust_code`.

    Returns: {task: {"acc": 0..1, "n": questions, ...}} and, under "protocol", what the figures depend on.
    Raises:
        SteelError: the extra is not installed, an unknown task, a data folder of another shape, an unusable model.
    """
    _require_harness()
    if json is not None and not Path(json).absolute().parent.is_dir():
        raise SteelError("the folder for the scores does not exist", json, "make it first, or name another file")
    manager = _task_manager(local=data is not None)
    specs = {task: _spec(task, data, manager) for task in tasks}
    loaded = load(model_dir, trust_code)
    if loaded.tokenizer is None:
        raise SteelError("the harness needs a Hugging Face tokenizer, and the folder has none", model_dir,
                         "train with a tokenizer folder instead of a .model file")  # fmt: skip
    report = verdict.read_verdict(Path(model_dir))
    if report is None and audit is not None:
        report = audit(Path(model_dir), trust_code)
    blind = not verdict.sees_future(loaded.model.config, report)
    if not blind:
        dist.log.warning("this model sees the future: it scores texts that it was trained to see whole, and what it writes is "
                         "worse than its loss promises")  # fmt: skip
    model = _harness_model(loaded, blind)
    result: dict[str, Any] = {task: _score(model, task, spec, manager) for task, spec in specs.items()}
    result["protocol"] = _protocol(model_dir, loaded, model) | _verdict(report, blind)
    _print(result)
    if json is not None:
        _write(Path(json), result)
    return result


def _require_harness() -> None:
    # Before the import, which reads it; and scoring a local folder must not touch the network.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise SteelError("lm-evaluation-harness is not installed", "evaluate",
                         "pip install 'megatron-steel[eval]'") from None  # fmt: skip
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _task_manager(local: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not local)  # to read the harness's thousands of task files takes long


def _spec(task: str, data: str | None, manager: Any) -> list[Any]:
    """What the harness shall run for a task: its name, or local rows."""
    if data is None:
        if task not in manager.all_tasks:
            raise SteelError(f"the harness knows no task {task!r}", "--tasks", "see `lm-eval ls tasks`")
        return [task]
    if task != ceval.TASK:
        raise SteelError(f"--data holds C-Eval, and {task!r} is another task", "--tasks",
                         f"run {ceval.TASK} alone with --data, and the others without it")  # fmt: skip
    return ceval.local_tasks(Path(data))


def _harness_model(loaded: Loaded, blind: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    # The harness fills a batch up with padding, which a model that sees the future would read.
    batch = _BATCH if blind else 1
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch, device=str(loaded.device))


def _score(model: Any, task: str, spec: list[Any], manager: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    shots = ceval.FEW_SHOT if spec == [ceval.TASK] else None  # the harness's task leaves the number open
    found = simple_evaluate(
        model=model, tasks=spec, task_manager=manager, num_fewshot=shots, bootstrap_iters=0, log_samples=False
    )
    if task == ceval.TASK:
        return ceval.summary(found)
    own = found["results"].get(task, {})  # a tag has no figure of its own
    metrics = {key.removesuffix(",none"): value for key, value in own.items() if key.endswith(",none")}
    used = sorted(set(found["n-shot"].values()))
    return {
        **metrics,
        "n": sum(counts["effective"] for counts in found["n-samples"].values()),
        "version": found["versions"].get(task),
        "few_shot": used[0] if len(used) == 1 else used,
        "parts": found["results"] if len(found["n-samples"]) > 1 else {},
    }


def _protocol(model_dir: str, loaded: Loaded, model: Any) -> dict[str, Any]:
    import importlib.metadata

    names = ("lm_eval", "transformers", "torch")
    return {
        "model": Path(model_dir).absolute().name,
        "scored_by": "log-likelihood of each choice, no chat template",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "max_length": model.max_length,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _verdict(report: dict[str, Any] | None, blind: bool) -> dict[str, Any]:
    """`causal` is None where nobody has found out."""
    causal = False if not blind else None if report is None else report["causal"]
    return {"causal": causal, "loss_sees_future": not blind, "audit": report and report.get("verdict")}


def _print(result: dict[str, Any]) -> None:
    if result["protocol"]["loss_sees_future"]:
        print("THIS MODEL SEES THE FUTURE: its scores do not compare with those of causal models")
    for task, score in result.items():
        if task == "protocol":
            continue
        for subject, part in score.get("subjects", {}).items():
            print(f"  {subject:45} {part['acc']:7.2%}  of {part['n']}")
        if score.get("absent"):
            print(f"  left out, {len(score['absent'])} subjects without files: {', '.join(score['absent'])}")
        shown = f"{score['acc']:.2%}" if "acc" in score else json_format.dumps(score)
        print(f"{task}: {shown} ({score['n']} questions, {score['few_shot']}-shot, version {score['version']})")


def _write(file: Path, result: dict[str, Any]) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as out:
            json_format.dump(result, out, indent=1, ensure_ascii=False)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except OSError as error:
        raise SteelError(f"the scores could not be written: {error.strerror}", file, "name another file") from error
    finally:
        aside.unlink(missing_ok=True)
