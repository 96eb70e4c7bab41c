"""Scores of exported models: by the likeliest choice (lm-evaluation-harness, extra `eval`), by written answers, or both.

1. Each folder is opened by `load`, so that no foreign code runs unasked; several folders are scored in the order of steps.
2. `harness` gives the questions, its own rows or a local folder's, and the log-likelihood scores.
3. `chat_protocol` asks the same questions in a chat and reads the replies.
4. A model that sees the future is said to, by the folder's `audit.json` or, where there is none, by the caller's audit.
5. Every figure is kept with its protocol: task version, examples in the prompt, prompt, decoding.

Must not know checkpoints or how runs are made. A score means nothing without its protocol, so the two are never separated.
"""

import json as json_format
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.model import verdict
from megatron_steel.post.load import Loaded, load, load_tokenizer
from megatron_steel.post.scoring import chat_protocol, harness, scores
from megatron_steel.post.scoring.benchmarks import BENCHMARKS
from megatron_steel.post.turns import chat_ids

PROTOCOLS = (harness.NAME, chat_protocol.NAME, "both")
Audit = Callable[[Path, bool], dict[str, Any]]


def evaluate(
    models: str | Sequence[str],
    tasks: list[str],
    data: str | None = None,
    json: str | None = None,
    trust_code: bool = False,
    audit: Audit | None = None,
    protocol: str = harness.NAME,
    max_new_tokens: int | None = None,
    items: str | None = None,
    tensorboard: str | None = None,
    picture: str | None = None,
) -> dict[str, Any]:
    """Score Hugging Face folders.

    Args:
        models: one folder or several; a folder of folders (a run, or its `exports`) means every one in it.
        tasks: names of harness tasks or groups, `ceval-valid`, `cmmlu` and `mmlu` among them.
        data: a local folder with these three's files (see `benchmarks`); then nothing is downloaded.
        json: write the result here too.
        trust_code: allow foreign modelling code that lies in a folder.
        audit: gives the report on a folder without `audit.json`, from the folder and `trust_code`.
        protocol: `loglikelihood`, `steel-chat` (answers in writing), or both.
        max_new_tokens: longest reply of `steel-chat`, instead of the protocol's own.
        items: write one JSON line a question here.
        tensorboard: write the scores against the steps here.
        picture: write a bar chart beside published scores here (PNG).

    Returns: {task: {"acc": 0..1, "n": questions, "protocol": what the figures depend on, ...}}; with `both` each task's
        written answers stand under "steel-chat" in it. For several folders {"checkpoints": [...]}, each of them such a
        result.
    Raises:
        SteelError: the extra is not installed, no task, an unknown one or one twice, an unknown protocol, a data folder of another shape, an unusable
            model, a tokenizer without chat template, a folder whose step is wanted and not known.
    """
    from megatron_steel.post.scoring import compare

    _check(tasks, protocol, max_new_tokens, picture)
    for file, what in ((json, "scores"), (items, "items"), (picture, "picture")):
        scores.require_folder(file, what)
    folders = compare.model_folders([models] if isinstance(models, str) else list(models))
    if tensorboard is not None:
        if Path(tensorboard).exists() and not Path(tensorboard).is_dir():
            raise SteelError("a file stands where TensorBoard's folder should go", tensorboard, "name another folder")
        compare.require_steps(folders)
    harness.require_harness()
    questions = harness.Harness(tasks, data)
    for folder in folders:  # all of them before the first is scored, which may take hours
        _check_folder(folder, protocol, trust_code)
    lines: list[dict[str, Any]] = []
    results = []
    for folder in folders:
        results.append(_score_folder(folder, tasks, questions, protocol, max_new_tokens, trust_code, audit, lines))
        scores.show(results[-1])
    whole = results[0] if len(results) == 1 else {"checkpoints": results}
    if len(results) > 1:
        print(compare.table(results))
    _write(whole, lines, json, items)
    if tensorboard is not None:
        compare.to_tensorboard(results, tensorboard)
    if picture is not None:
        from megatron_steel.post.scoring.picture import draw

        draw(results, Path(picture))
    return whole


def _check(tasks: list[str], protocol: str, max_new_tokens: int | None, picture: str | None) -> None:
    twins = [task for task in tasks if tasks.count(task) > 1]
    if twins or not tasks:
        raise SteelError(f"the task {twins[0]!r} is named twice" if twins else "no task is named", "--tasks",
                         f"name each task once: {', '.join(BENCHMARKS)}, or another of the harness")  # fmt: skip
    if protocol not in PROTOCOLS:
        raise SteelError(f"there is no protocol {protocol!r}", "--protocol", f"use one of {', '.join(PROTOCOLS)}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise SteelError(f"{max_new_tokens} new tokens are none", "--max-new-tokens", "ask for at least 1")
    if picture is not None and not set(tasks) & set(BENCHMARKS):
        raise SteelError("there is nothing to draw", "--picture", f"score one of {', '.join(BENCHMARKS)}")
    silent = [task for task in tasks if task not in BENCHMARKS] if protocol != harness.NAME else []
    if silent:
        raise SteelError(f"{protocol} does not know how to ask {silent[0]!r}", "--tasks",
                         f"choose from {', '.join(BENCHMARKS)}, or --protocol {harness.NAME}")  # fmt: skip


def _check_folder(folder: Path, protocol: str, trust_code: bool) -> None:
    tokenizer = load_tokenizer(str(folder), trust_code)
    if tokenizer is None:
        raise SteelError("the harness needs a Hugging Face tokenizer, and the folder has none", folder,
                         "train with a tokenizer folder instead of a .model file")  # fmt: skip
    if protocol != harness.NAME:
        chat_ids(tokenizer, [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}])


def _score_folder(
    folder: Path,
    tasks: list[str],
    questions: harness.Harness,
    protocol: str,
    max_new_tokens: int | None,
    trust_code: bool,
    audit: Audit | None,
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    from megatron_steel.post.scoring.compare import step_of

    loaded = load(str(folder), trust_code)
    report = verdict.read_verdict(folder)
    if report is None and audit is not None:
        report = audit(folder, trust_code)
    blind = not verdict.sees_future(loaded.model.config, report)
    if not blind:
        dist.log.warning("this model sees the future: it scores texts that it was trained to see whole, and what it writes is "
                         "worse than its loss promises")  # fmt: skip
    model = questions.model(loaded, blind)
    result: dict[str, Any] = {}
    for task in tasks:
        result[task], found = _score_task(task, questions, loaded, model, protocol, max_new_tokens, blind)
        lines += [{"model": folder.name, "task": task, **item} for item in found]
    about = {"model": folder.absolute().name, "step": step_of(folder), **_protocol(loaded, model)}
    about |= _verdict(report, blind)
    for score in result.values():
        for one in scores.protocols(score):
            one["protocol"] = {"name": one["protocol"], **about}
    return result


def _score_task(
    task: str,
    questions: harness.Harness,
    loaded: Loaded,
    model: Any,
    protocol: str,
    max_new_tokens: int | None,
    blind: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The score of one task, and its items."""
    benchmark = BENCHMARKS.get(task)
    if benchmark is None:
        score, items = questions.score(model, task)
        return {"protocol": harness.NAME, **score}, [{"protocol": harness.NAME, **item} for item in items]
    by_name, lines = {}, []
    if protocol != chat_protocol.NAME:
        items, facts = questions.items(model, benchmark)
        by_name[harness.NAME] = scores.summary(benchmark, harness.NAME, items, facts)
        lines += [{"protocol": harness.NAME, **item} for item in items]
    if protocol != harness.NAME:
        asked = questions.questions(benchmark)
        items, facts = chat_protocol.answer(loaded, task, asked, blind, max_new_tokens)
        by_name[chat_protocol.NAME] = scores.summary(benchmark, chat_protocol.NAME, items, facts)
        lines += [{"protocol": chat_protocol.NAME, **item} for item in items]
    if protocol == "both":
        return {**by_name[harness.NAME], chat_protocol.NAME: by_name[chat_protocol.NAME]}, lines
    return by_name[protocol], lines


def _protocol(loaded: Loaded, model: Any) -> dict[str, Any]:
    import importlib.metadata

    names = ("lm_eval", "transformers", "torch")
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "max_length": model.max_length,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _verdict(report: dict[str, Any] | None, blind: bool) -> dict[str, Any]:
    """`causal` is None where nobody has found out."""
    causal = False if not blind else None if report is None else report["causal"]
    return {"causal": causal, "loss_sees_future": not blind, "audit": report and report.get("verdict")}


def _write(result: dict[str, Any], lines: list[dict[str, Any]], json: str | None, items: str | None) -> None:
    if items is not None:
        with scores.replacing(Path(items)) as out:
            out.writelines(json_format.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    if json is not None:
        with scores.replacing(Path(json)) as out:
            json_format.dump(result, out, indent=1, ensure_ascii=False)
