"""Many checkpoints beside each other: which folders are meant, from which step they are, their scores against it.

Must not know how a score is made.
"""

import re
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.post.scoring.scores import about_of, protocols


def model_folders(named: list[str]) -> list[Path]:
    """The Hugging Face folders that are meant; those in a run's exports, or in any folder, by step.

    Raises SteelError where one is meant twice. Whether each can be loaded is not looked at.
    """
    found: list[Path] = []
    for name in named:
        folder = Path(name)
        holder = folder / "exports" if (folder / "exports").is_dir() else folder
        inner = [path.parent for path in holder.glob("[!.]*/config.json")]  # a dot: being written
        if (folder / "config.json").is_file() or not folder.is_dir() or not inner:
            found.append(folder)  # `load` says what is wrong with it
        else:
            found += sorted(inner, key=lambda path: (step_of(path) or 0, path.name))
    seen = set()
    for folder in found:
        if folder.resolve() in seen:
            raise SteelError("the folder is named twice", folder, "name each model once")
        seen.add(folder.resolve())
    return found


def step_of(folder: Path) -> int | None:
    """The training step of an export: in its name (step-00001000, checkpoint-1000), else in its model card."""
    name = re.search(r"(?:step|checkpoint)-(\d+)$", folder.absolute().name)
    if name:
        return int(name[1])
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    row = re.search(r"^\| training \| ([\d,]+) steps", card, re.MULTILINE)
    return int(row[1].replace(",", "")) if row else None


def require_steps(folders: list[Path]) -> None:
    """Raises SteelError, before anything is scored, where a folder's step is not known or two have the same."""
    steps: dict[int, Path] = {}
    for folder in folders:
        step = step_of(folder)
        if step is None:
            raise SteelError("the step of this export is not known", folder,
                             "rename the folder to step-N, or leave --tensorboard out")  # fmt: skip
        if step in steps:
            raise SteelError(f"two exports are of step {step}", f"{steps[step]} and {folder}",
                             "write each to a --tensorboard folder of its own")  # fmt: skip
        steps[step] = folder


def figures(result: dict[str, Any]) -> dict[str, float]:
    """{"TASK PROTOCOL": accuracy} of one model, every task under every protocol it was scored by."""
    found = {}
    for task, score in result.items():
        for one in protocols(score):
            if "acc" in one:
                found[f"{task} {one['protocol']['name']}"] = one["acc"]
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Scores against steps, one line a model."""
    columns = list(dict.fromkeys(name for result in results for name in figures(result)))
    wide = max(len("model"), *(len(about_of(result)["model"]) for result in results))
    lines = ["  ".join([f"{'model':{wide}}", f"{'step':>9}", *columns])]
    for result in results:
        about, found = about_of(result), figures(result)
        step = "-" if about["step"] is None else f"{about['step']:,}"
        cells = [f"{found[name]:.2%}".rjust(len(name)) if name in found else "-".rjust(len(name)) for name in columns]
        mark = "  sees the future" if about["loss_sees_future"] else ""
        lines.append("  ".join([f"{about['model']:{wide}}", f"{step:>9}", *cells]) + mark)
    return "\n".join(lines)


def to_tensorboard(results: list[dict[str, Any]], folder: str) -> None:
    """Accuracies and categories as scalars `evaluate/TASK/PROTOCOL[/CATEGORY]`, at each export's step."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(folder) as board:
            for result in results:
                about = about_of(result)
                mark = " (sees future)" if about["loss_sees_future"] else ""
                for tag, value in _scalars(result).items():
                    board.add_scalar(tag + mark, value, about["step"])
    except OSError as error:
        raise SteelError(f"the scores could not be written: {error.strerror}", folder, "name another folder") from error
    dist.log.info("scores of %d exports are in %s", len(results), folder)


def _scalars(result: dict[str, Any]) -> dict[str, float]:
    found = {f"evaluate/{name.replace(' ', '/')}": value for name, value in figures(result).items()}
    for task, score in result.items():
        for one in protocols(score):
            for category, part in one.get("categories", {}).items():
                found[f"evaluate/{task}/{one['protocol']['name']}/{category.replace(' ', '_')}"] = part["acc"]
    return found
