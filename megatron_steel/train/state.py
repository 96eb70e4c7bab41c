"""Save and load a run: DeepSpeed's files inside a committed checkpoint, and what else the run needs to go on.

The manifest carries step, tokens, the order of data (a few numbers), the recipe and how the shards are cut; DeepSpeed's
files carry weights and optimizer. Nothing random is saved: each step seeds the generators from (seed, step, rank).
Where the shards are cut as this run would cut them, DeepSpeed loads them; else `elastic` does.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import __version__, dist
from megatron_steel.checkpoint import commit, zero
from megatron_steel.checkpoint.zero import CLIENT_STATE
from megatron_steel.errors import SteelError
from megatron_steel.recipe import Recipe
from megatron_steel.train import elastic

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_FAILED_SAVES = 3  # in a row
_OF_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's, all that moves
_TIDY_UP = "tidy up checkpoints"  # the thread that deletes old ones


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, tokens trained on, the order of data as plain values, steps whose numbers were
    none, and what `Spikes` has seen (None where nobody watched)."""

    step: int
    tokens: int
    order: dict[str, Any]
    skipped_steps: int = 0
    spikes: dict[str, Any] | None = None


def save(
    engine: "DeepSpeedEngine",
    folder: Path,
    progress: Progress,
    facts: dict[str, Any],
    group_names: list[list[str]],
    keep_last: int,
    keep_every: int | None = None,
) -> Path:
    """Commit a checkpoint and prune older ones; a collective call. Returns the published folder.

    Args:
        folder: the run's `checkpoints/`.
        facts: what else the manifest shall say (recipe, data sets, world size, `parameters`, ...).
        group_names: parameter names per optimizer group, in the groups' order.
        keep_last, keep_every: as `commit.hide_old` takes them. Deleting goes on in a thread of its own.
    Raises:
        NotWritten: on every rank; older checkpoints are untouched and training can go on.
    """
    wait_until_tidy()
    client_state = {CLIENT_STATE: {"group_names": group_names}}

    def write_files(aside: Path) -> list[Path]:
        with _failures_at_the_end(engine) as written:
            # `latest` is DeepSpeed's pointer, written before all ranks are done: never made, never read.
            engine.save_checkpoint(str(aside), tag=commit.ENGINE, client_state=client_state, save_latest=False)
        return written

    def tidy_up() -> None:
        hidden = commit.hide_old(folder, keep_last, progress.step, keep_every)

        def in_the_background() -> None:  # deleting a gigabyte takes a fifth of a save's time
            commit.delete(hidden)
            commit.warn_of_space(folder, first, checkpoints=2)

        threading.Thread(target=in_the_background, name=_TIDY_UP).start()

    first = first_checkpoint_bytes(facts["parameters"])
    entry = {**dataclasses.asdict(progress), **facts, "layout": elastic.layout_of(engine), "versions": versions()}
    if engine.fp16_enabled():
        entry["loss_scaler"] = {name: getattr(engine.optimizer.loss_scaler, name) for name in _OF_LOSS_SCALER}
    path = commit.write(folder, progress.step, write_files, entry, first)
    dist.together(tidy_up, only=dist.is_main())
    return path


def wait_until_tidy() -> None:
    """Return when what the last save no longer needs is deleted.

    To be called before a run's process ends, which does not wait by itself (`guard.end_now`). Where a kill comes first,
    a hidden folder is left to the next save.
    """
    for thread in threading.enumerate():
        if thread.name == _TIDY_UP:
            thread.join()


def first_checkpoint_bytes(parameters: int) -> int:
    """About how large a checkpoint will be: fp32 weights and Adam's two moments, and a copy in bf16 at most stages."""
    return 14 * parameters


@contextlib.contextmanager
def _failures_at_the_end(engine: "DeepSpeedEngine") -> Iterator[list[Path]]:
    """Yield the list of the files that DeepSpeed writes on this rank; a write that failed raises on leaving.

    After writing DeepSpeed waits for all ranks. One that could not write must come there too, or the others wait
    until the process group gives up.
    """
    writer, copy_script = engine.checkpoint_engine, engine._copy_recovery_script
    written: list[Path] = []
    problems: list[Exception] = []

    def guarded(action: Callable[..., Any]) -> Callable[..., None]:
        def run(*arguments: Any, **named: Any) -> None:
            try:
                action(*arguments, **named)
            except (OSError, RuntimeError) as error:
                problems.append(error)

        return run

    class Writer:
        def __getattr__(self, name: str) -> Any:
            return getattr(writer, name)

        def save(self, state_dict: Any, path: str) -> None:
            written.append(Path(path))
            guarded(writer.save)(state_dict, path)

    engine.checkpoint_engine, engine._copy_recovery_script = Writer(), guarded(copy_script)
    try:
        yield written
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = writer, copy_script
    if problems:
        raise problems[0]


class Saves:
    """Calls `save(step, tokens)`; a periodic one that fails is no reason to stop, the third in a row is.

    So a full disk costs at most three intervals of work, and none when somebody makes room in time.
    """

    def __init__(self, save: Callable[[int, int], Path]):
        self._save, self._failed = save, 0

    def __call__(self, step: int, tokens: int, must: bool = True) -> bool:
        """True when it is saved.

        Args:
            must: nothing comes after this save (the end, or a stop): its failure is the run's.
        Raises NotWritten, on every rank.
        """
        try:
            path = self._save(step, tokens)
        except commit.NotWritten as error:
            self._failed += 1
            if must or self._failed >= _FAILED_SAVES:
                raise
            if dist.is_main():
                going_on = "training goes on to the next save; the third failure in a row ends the run"
                dist.log.error("NOT SAVED at step %d (failure %d): %s\n  %s", step, self._failed, error, going_on)
            return False
        self._failed = 0
        dist.log.info("saved %s", path)
        return True


def find(folder: Path) -> commit.Checkpoint | None:
    """The newest whole checkpoint, the same on every rank; a damaged one is named and passed over."""
    found = dist.together(lambda: commit.newest_whole(folder), only=dist.is_main())
    checkpoint, passed_over = dist.gather(found)[0] or (None, [])
    for problem in passed_over:
        dist.log.warning("passed over a checkpoint: %s", problem)
    if checkpoint is None and passed_over:
        what = f"none of the {len(passed_over)} checkpoints is whole"
        raise dist.shared(SteelError(what, folder, "move them away to start from the beginning"))
    return checkpoint


def restore(engine: "DeepSpeedEngine", checkpoint: commit.Checkpoint) -> Progress:
    """Load weights, optimizer and counters from a verified checkpoint, whatever number of ranks, ZeRO stage and
    precision wrote it; a collective call. No pickle in it is run.

    DeepSpeed restores the optimizer's settings too; the recipe's are put back, for they may have changed.
    """
    optimizer, path = engine.optimizer, checkpoint.path
    settings = [
        {key: group[key] for key in group if key not in ("params", "lr", "step")} for group in optimizer.param_groups
    ]
    clip = getattr(optimizer, "clip_grad", None)
    dist.together(lambda: zero.refuse_unsafe(path), only=dist.is_main())
    before, now = checkpoint.manifest.get("layout"), elastic.layout_of(engine)
    if elastic.is_same(before, now):
        with zero.weights_only():
            loaded, client_state = engine.load_checkpoint(str(path), tag=commit.ENGINE)
        if loaded is None or CLIENT_STATE not in client_state:
            raise SteelError("DeepSpeed did not load the checkpoint", path, "use another checkpoint")
    else:
        dist.log.info("%s", _what_changed(before, now))
        elastic.load(engine, path)
        if engine.fp16_enabled():
            for name, value in checkpoint.manifest.get("loss_scaler", {}).items():
                setattr(optimizer.loss_scaler, name, value)
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    if clip is not None:
        optimizer.clip_grad = clip
    return progress_of(checkpoint)


def progress_of(checkpoint: commit.Checkpoint) -> Progress:
    """How far the run was when it was saved."""
    manifest = checkpoint.manifest
    later = manifest.get("skipped_steps", 0), manifest.get("spikes")  # older checkpoints have neither
    return Progress(checkpoint.step, manifest["tokens"], manifest["order"], *later)


def _what_changed(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """One line about a checkpoint that is loaded into another layout than it was written from."""
    if before is None:
        return "the checkpoint does not say how its shards are cut: they are read and cut anew"

    def told(layout: dict[str, Any]) -> str:
        ranks = f"{layout['ranks']} rank{'' if layout['ranks'] == 1 else 's'}"
        return f"{ranks} with ZeRO {layout['stage']} in {layout['dtype']}"

    if told(before) != told(now):
        return f"the checkpoint was written by {told(before)}; going on with {told(now)}"
    if before["optimizer"] != now["optimizer"]:
        return f"the checkpoint was written by {before['optimizer']}; going on with {now['optimizer']}"
    return "the checkpoint's shards are cut otherwise than this run's (sub-groups, offload, alignment): cut anew"


def refuse_other_run(
    checkpoint: commit.Checkpoint, recipe: Recipe, now: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Raise SteelError naming the first thing that cannot change between a checkpoint and its continuation.

    Ranks, micro-batch, ZeRO stage and precision can (`restore`).

    Args:
        now: of the run as it starts now: `model_config` and `tokenizer`, as the manifest holds them. Paths may
            change, what lies there not.
        defaults: of the configuration class, for fields that it did not have when the checkpoint was written.
    """
    manifest = checkpoint.manifest
    remedy = "restore it, or start another run with run.dir=..."
    before, after = manifest["model_config"], now["model_config"]
    for key in sorted({*before, *after}):
        if before.get(key, defaults.get(key)) != after.get(key):
            what = f"model.config.{key} was {before.get(key)!r} and is now {after.get(key)!r}"
            raise SteelError(what, checkpoint.path, remedy)
    if manifest["tokenizer"]["fingerprint"] != now["tokenizer"]["fingerprint"]:
        what = f"the run began with another tokenizer ({manifest['tokenizer']['name']}) than {now['tokenizer']['name']}"
        raise SteelError(what, checkpoint.path, remedy)
    for key in ("weight_decay_on", "name"):
        then, wanted = manifest["recipe"]["optim"][key], getattr(recipe.optim, key)
        if then != wanted:
            raise SteelError(f"optim.{key} was {then} and is now {wanted}", checkpoint.path, remedy)


def versions() -> dict[str, str]:
    """Versions of what shaped the numbers."""
    names = ("torch", "deepspeed", "transformers", "numpy")
    return {"megatron_steel": __version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names}}  # fmt: skip
