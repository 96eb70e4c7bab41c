"""What DeepSpeed's checkpoint files hold, one tensor at a time, for any ZeRO stage and world size.

1. `opened` maps the files of every rank and runs nothing: weights-only, with four harmless classes allowed.
2. It lists what was trained: of each parameter its fp32 weight and Adam's two moments, each a cut of flat pieces. A read
   copies no more than what was asked for, so memory does not grow with the model or the number of ranks.
3. `stream_weights` is that list without the moments, and what was not trained (buffers, frozen weights).

The files may be anybody's: ours differ only in that they hold the names of stage 0's masters (`CLIENT_STATE`).

Needs no process group, no GPU and nothing of DeepSpeed. Knows nothing of models: names and shapes come from the files.
"""

import importlib
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.checkpoint.commit import ENGINE
from megatron_steel.checkpoint.mapped import forget
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch

CLIENT_STATE = "megatron_steel"  # our key among DeepSpeed's own in a checkpoint: {"group_names": [[...], ...]}
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, in every kernel
MOMENTUM = ("momentum_buffer",)  # of Muon
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # the engine's own
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# All that DeepSpeed 0.19.8 puts into its files beside tensors and plain values.
_ITS_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",  # fp16, which only others train in
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_PIECE = 1 << 20  # values that a stream of pieces reads at a time
_KEPT_PIECES = 16  # of mapped files, before their pages are given back


@dataclass(frozen=True)
class Stored:
    """One trained parameter in a checkpoint: of each quantity (`weight`, the moments) the flat pieces that hold it.

    The pieces of a quantity are equally long (but for padding that the last may lack) and laid end to end; the
    parameter begins at `at`.
    """

    name: str
    shape: tuple[int, ...]
    at: int
    pieces: "dict[str, list[torch.Tensor]]"
    file: Path

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, quantity: str, start: int = 0, count: int | None = None) -> "torch.Tensor":
        """`count` values from `start` of a quantity, flat, fp32, on the CPU; None: all that follow.

        Raises SteelError when the files do not hold them.
        """
        count = self.size - start if count is None else count
        found = _slice(self.pieces[quantity], self.at + start, count) if quantity in self.pieces else None
        if found is None or found.numel() != count:
            raise SteelError(f"the checkpoint lacks {quantity} of {self.name}", self.file, "use another checkpoint")
        return found.detach().float()

    def weight_in_pieces(self) -> "Iterator[torch.Tensor]":
        """The weight from its first value to its last, a few megabytes at a time; of a large one what was read is let go of."""
        for number, start in enumerate(range(0, self.size, _PIECE), 1):
            yield self.read(WEIGHT, start, min(_PIECE, self.size - start))
            if number % _KEPT_PIECES == 0:
                forget(self.file.parent)


@dataclass(frozen=True)
class Weight:
    """A tensor that need not be whole anywhere: its values come flat, in order, in pieces of any length, once."""

    shape: tuple[int, ...]
    pieces: "Iterable[torch.Tensor]"

    def first_rows(self, count: int) -> "Weight":
        """The tensor without its rows from `count` on."""
        shape = (count, *self.shape[1:])
        return Weight(shape, _first_values(self.pieces, math.prod(shape)))


@dataclass(frozen=True)
class Contents:
    """A checkpoint, opened: `step` is Adam's counter (0: no step was ever applied, and there are no moments)."""

    trained: list[Stored]
    others: "Mapping[str, torch.Tensor]"  # persistent buffers and frozen weights, in their own dtype
    step: int
    counters: dict[str, int]

    def read_from(self) -> "list[torch.Tensor]":
        """The tensors of the files that weights, buffers and frozen weights are read from."""
        trained = [piece for parameter in self.trained for piece in parameter.pieces[WEIGHT]]
        others = self.others.cuts() if isinstance(self.others, _Joined) else list(self.others.values())
        return trained + others


def stream_pieces(found: Contents) -> Iterator[tuple[str, Weight]]:
    """`stream_weights` of what has been opened, with no tensor ever whole (buffers and frozen weights apart)."""
    read = 0
    for parameter in found.trained:
        yield parameter.name, Weight(parameter.shape, parameter.weight_in_pieces())
        read += parameter.size
        if read >= _KEPT_PIECES * _PIECE:  # each time costs milliseconds
            forget(parameter.file.parent)
            read = 0
    for name, tensor in found.others.items():
        yield name, Weight(tuple(tensor.shape), (tensor.reshape(-1),))


def stream_weights(checkpoint: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every parameter once, as fp32 on the CPU, then the buffers; a tied weight comes under its first name only.

    Args:
        checkpoint: a folder that holds `engine/`.
    Raises:
        SteelError: when there is no engine folder, its files are not DeepSpeed's, or one of them is unsafe.
    """
    found = contents(checkpoint)
    for parameter in found.trained:
        yield parameter.name, parameter.read(WEIGHT).view(parameter.shape)
    for name, tensor in found.others.items():
        yield name, tensor.float() if tensor.is_floating_point() else tensor


def contents(checkpoint: Path) -> Contents:
    """Open a checkpoint's engine files, whatever stage and number of ranks wrote them. Raises SteelError as above."""
    engine = checkpoint / ENGINE
    if not engine.is_dir():
        raise SteelError("this is no checkpoint: it has no engine/ folder", checkpoint, "name a run or a step-N folder")
    return opened(engine)


def opened(engine: Path) -> Contents:
    """Open the folder that DeepSpeed wrote, of any stage, number of ranks and trainer. Raises SteelError as above.

    Of a stage 0 in half precision the names of the fp32 weights are known only where `CLIENT_STATE` is there; without it
    the half-precision weights are what there is (the fp32 ones round to them).
    """
    shards = sorted(engine.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    parts = [_load(shard)["optimizer_state_dict"] for shard in shards]
    sharded_weights = bool(parts) and "fp32_flat_groups" in parts[0]  # ZeRO-3
    _refuse_missing_shards(parts, engine)
    files = _model_files(engine, sharded_weights)
    states = [_load(file) for file in files]
    first, where = states[0], files[0]
    if sharded_weights and len(files) != len(parts):
        raise SteelError(f"the folder holds {len(files)} files of model states, and {len(parts)} of optimizer states",
                         engine, "use another checkpoint")  # fmt: skip
    if not parts and first.get("param_shapes"):
        raise SteelError("the files of optimizer states, which hold the weights, are missing", engine,
                         "use another checkpoint")  # fmt: skip
    try:
        if sharded_weights:
            trained, step = _stage3(first["param_shapes"], parts, shards[0])
        elif parts:
            trained, step = _end_to_end(first["param_shapes"], parts, shards[0])
        else:
            trained, step = _stage0(first, where)
        others = _untrained(states, trained, sharded_weights)
        return Contents(trained, others, step, {name: int(first[name]) for name in COUNTERS})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"the folder is not as this version of DeepSpeed writes it: {error!r}"
        raise SteelError(what, where, "use another checkpoint") from error


def refuse_unsafe(checkpoint: Path) -> None:
    """Open every file of `engine/` weights-only. Raises SteelError naming the first that asks for more than that."""
    for file in sorted((checkpoint / ENGINE).rglob("*")):
        if file.suffix == ".pt":
            _load(file)


@contextmanager
def weights_only() -> Iterator[None]:
    """While DeepSpeed itself loads: whatever it asks for, torch unpickles tensors, plain values and three of its classes."""
    import torch

    classes = [_class_named(name) for name in _ITS_CLASSES]
    before = {key: os.environ.pop(key, None) for key in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"  # goes before the weights_only=False in DeepSpeed's calls
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({key: value for key, value in before.items() if value is not None})


class _Inert:
    """Stands for DeepSpeed's small objects in its files; their content is not needed."""

    def __init__(self, *arguments: Any) -> None:
        del arguments


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _ITS_CLASSES]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"the file is unsafe: it {asked_for(error)}, which loading weights never needs"
        raise SteelError(what, file, "do not use this checkpoint; nothing of the file was run") from None
    except Exception as error:  # torch's own kinds are many: no zip archive, a cut one, a foreign pickle
        what = f"the file is not one that DeepSpeed writes, and unsafe or damaged: {str(error).splitlines()[0]}"
        raise SteelError(what, file, "use another checkpoint") from error


def asked_for(error: pickle.UnpicklingError) -> str:
    """What torch's weights-only reader refused, as the end of a sentence about the file."""
    named = re.search(r"(?:GLOBAL|call|class|instance of)\s+`?([\w.]+)", str(error))
    return f"asks for {named.group(1)}" if named else "is no plain data"


def _end_to_end(shapes: list[dict[str, Any]], parts: list[dict[str, Any]], file: Path) -> tuple[list[Stored], int]:
    """Stages 1 and 2: each rank holds an equal cut of every group's parameters laid end to end, in fp32.

    Padding stands at the very end, and behind each parameter where `zero_optimization.parameter_alignment` is set.
    """
    found, step = [], 0
    for number, group in enumerate(shapes):
        flats, step = _moments(parts, "base_optimizer_state", number)
        flats[WEIGHT] = [part["single_partition_of_fp32_groups"][number] for part in parts]
        paddings = (parts[0].get("param_alignment_paddings") or {number: [0] * len(group)})[number]
        at = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            found.append(Stored(name, tuple(shape), at, flats, file))
            at += shape.numel() + padding
    return found, step


def _stage3(shapes: list[dict[str, Any]], parts: list[dict[str, Any]], file: Path) -> tuple[list[Stored], int]:
    """Stage 3: every parameter is cut evenly over the ranks, and each rank lays its cuts of a sub-group end to end."""
    found, step = [], 0
    for number, group in enumerate(shapes):
        flats, step = _moments(parts, "optimizer_state_dict", number)
        flats[WEIGHT] = [part["fp32_flat_groups"][number] for part in parts]
        at = 0
        for name, shape in group.items():
            cut = -(-shape.numel() // len(parts))
            pieces = {quantity: [flat[at : at + cut] for flat in each] for quantity, each in flats.items()}
            found.append(Stored(name, tuple(shape), 0, pieces, file))
            at += cut
    return found, step


def _stage0(state: dict[str, Any], file: Path) -> tuple[list[Stored], int]:
    """Stage 0: rank 0 holds all. In bf16 the fp32 weights lie in the optimizer: tensor by tensor, or a flat group each."""
    optimizer, module = state["optimizer"], state["module"]
    if CLIENT_STATE not in state:
        from megatron_steel.checkpoint.unnamed import weights_of_stage0

        named = weights_of_stage0(state, file)
        return [Stored(name, tuple(t.shape), 0, {WEIGHT: [t.flatten()]}, file) for name, t in named.items()], 0
    inner = optimizer.get("optimizer_state_dict", optimizer)
    groups = state[CLIENT_STATE]["group_names"]
    if "fp32_groups_flat" in optimizer:
        part = {"single_partition_of_fp32_groups": optimizer["fp32_groups_flat"], "base_optimizer_state": inner}
        return _end_to_end([{name: module[name].shape for name in group} for group in groups], [part], file)
    found: list[Stored] = []
    step = 0
    masters = optimizer.get("fp32_groups") or [[module[name] for name in group] for group in groups]
    for group, weights in zip(groups, masters, strict=True):
        for name, weight in zip(group, weights, strict=True):
            flats, step = _moments([{"inner": inner}], "inner", len(found))
            pieces = {key: [tensor.flatten() for tensor in each] for key, each in flats.items()}
            found.append(Stored(name, tuple(weight.shape), 0, {WEIGHT: [weight.flatten()], **pieces}, file))
    return found, step


def _moments(parts: list[dict[str, Any]], key: str, number: int) -> "tuple[dict[str, list[torch.Tensor]], int]":
    """Of the optimizer's tensor `number`: its moments on every rank (none before the first step), and its counter."""
    states = [part[key]["state"].get(number, {}) for part in parts]
    found = MOMENTUM if MOMENTUM[0] in states[0] else MOMENTS
    if any(quantity not in state for state in states for quantity in found):
        return {}, 0
    # torch and DeepSpeed count in each tensor's state, apex in the group's settings.
    group = next(g for g in parts[0][key]["param_groups"] if number in g["params"])
    step = int(states[0]["step"] if "step" in states[0] else group["step"])
    return {quantity: [state[quantity] for state in states] for quantity in found}, step


class _Joined(Mapping[str, "torch.Tensor"]):
    """Tensors by name, each joined from the ranks' cuts when it is asked for, and not kept."""

    def __init__(self, cuts: "dict[str, tuple[list[torch.Tensor], torch.Size]]"):
        self._cuts = cuts

    def cuts(self) -> "list[torch.Tensor]":
        return [cut for cuts, _ in self._cuts.values() for cut in cuts]

    def __getitem__(self, name: str) -> "torch.Tensor":
        cuts, shape = self._cuts[name]
        return _slice([cut.flatten() for cut in cuts], 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)


def _untrained(
    states: list[dict[str, Any]], trained: list[Stored], sharded_weights: bool
) -> "Mapping[str, torch.Tensor]":
    """Persistent buffers and frozen weights, by name."""
    first = states[0]
    if not sharded_weights:  # rank 0's file holds the whole module, tied weights under each name
        known = {parameter.name for parameter in trained}
        seen = {first["module"][name].untyped_storage().data_ptr() for name in known if name in first["module"]}
        found = {}
        for name, tensor in first["module"].items():
            place = tensor.untyped_storage().data_ptr()
            tied = name in known or name in (first.get("shared_params") or {}) or place in seen
            if name in first["buffer_names"] or not tied:
                found[name] = tensor
                seen.add(place)
        return found
    buffers = {name: ([first["module"][name]], first["module"][name].shape) for name in first["buffer_names"]}
    frozen = {
        name: ([state["frozen_param_fragments"][name] for state in states], shape)
        for name, shape in (first.get("frozen_param_shapes") or {}).items()
    }
    return _Joined(buffers | frozen)


def _first_values(pieces: "Iterable[torch.Tensor]", count: int) -> "Iterator[torch.Tensor]":
    for piece in pieces:
        if count <= 0:
            return
        yield piece[:count]
        count -= piece.numel()


def _slice(pieces: list["torch.Tensor"], start: int, count: int) -> "torch.Tensor":
    """`count` values from `start` of equal flat pieces laid end to end; copies no more than these."""
    import torch

    if count == 0:
        return torch.zeros(0)
    size, found = max(1, pieces[0].numel()), []
    for number in range(start // size, min(len(pieces), (start + count - 1) // size + 1)):
        found.append(pieces[number][max(0, start - number * size) : start + count - number * size])
    if len(found) == 1:
        return found[0]  # a view of the mapped file
    return torch.cat(found) if found else torch.zeros(0)


def _model_files(engine: Path, sharded_weights: bool) -> list[Path]:
    """The files with module states: one of the whole module, or under ZeRO-3 one a rank."""
    files = sorted(engine.glob("zero_pp_rank_*_model_states.pt"), key=_rank_of) if sharded_weights else []
    whole = engine / "mp_rank_00_model_states.pt"
    if not files and not whole.is_file():
        raise SteelError("the folder holds no DeepSpeed model states", whole, "use another checkpoint")
    if next(engine.glob("*mp_rank_01_*"), None):
        raise SteelError("the model was cut by tensor or pipeline parallelism, which is not read here", engine,
                         "convert it with the trainer's own tool")  # fmt: skip
    return files or [whole]


def _refuse_missing_shards(parts: list[dict[str, Any]], engine: Path) -> None:
    said = parts[0].get("partition_count") if parts else None
    ranks = said[0] if isinstance(said, list) else said  # one number a group, all the same without experts
    if ranks not in (None, len(parts)):
        what = f"the folder holds {len(parts)} optimizer files of {ranks}"
        raise SteelError(what, engine, "use another checkpoint")


def _rank_of(shard: Path) -> int:
    return int(shard.name.split("zero_pp_rank_")[1].split("_")[0])


def _class_named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
