"""Which samples an optimizer step of a run trains on, and what stands in them.

1. The run folder says what the run is: its checkpoints hold the order of data and name the data sets, `recipe.yaml` says
   how it goes on. A step that a checkpoint has behind it is read from the checkpoint's order, as it was; a later one
   from the order that a start with this recipe would plan, as it will be.
2. The order gives the step's sample numbers (`OrderState.before_step`) and their places; the data gives tokens and documents.
3. The run's ranks and micro-batch say who trains them.

Reads only. Knows nothing of engines and weights: a checkpoint's own files are not looked at.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist, preflight, stages
from megatron_steel.errors import SteelError
from megatron_steel.recipe import Prefix, Recipe, from_dict

if TYPE_CHECKING:
    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.data.indexed import IndexedDataset
    from megatron_steel.data.manifest import Manifest
    from megatron_steel.data.order import OrderState, Place
    from megatron_steel.data.segments import Member


@dataclass(frozen=True)
class Piece:
    """A part of one document inside a sample."""

    document: int
    """Number in its data set, from 0."""
    file: str
    """The input file that it came from, where the data set's manifest knows it; else empty."""
    file_document: int | None
    """Its number among the documents that came of that file, from 0."""
    start: int
    """The piece's first token, counted from the document's first."""
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Sample:
    """One sample of a step. Its L + 1 tokens are those of its pieces, one after another."""

    number: int
    """In the run's order of data."""
    rank: int
    micro_batch: int
    """The pass of the step, from 0."""
    row: int
    """In that rank's micro-batch."""
    prefix: str
    epoch: int
    """Of its data set, from 0."""
    start: int
    """Its first token in the data set's stream."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Step:
    """A step of a run as it was or, after the newest checkpoint, as it will be."""

    step: int
    trained: bool
    ranks: int
    micro_batch_size: int
    samples: list[Sample]
    """All, or one rank's, in the order in which they are trained."""


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    checkpoints: "list[Checkpoint]"
    """Oldest first."""
    ranks: int
    """Of the newest start."""


def checkpoints_of(folder: Path) -> str:
    """`inspect RUN`: a line for each checkpoint that can be read; no file is hashed."""
    found = [(c.path, c.manifest) for c in _checkpoints(folder)] or [(folder, None)]
    return "\n".join(
        f"{path}: step {m['step']:,}, {m['tokens']:,} tokens, {m['world_size']} ranks"
        if m
        else f"{path}: no checkpoint"
        for path, m in found
    )


def look(folder: Path, step: int, rank: int | None = None, tokenizer: str | None = None) -> Step:
    """The samples of optimizer step `step` (from 1), of one rank or of all.

    Args:
        tokenizer: instead of the recipe's, where that has moved.

    Raises:
        SteelError: no run, no such step or rank, data or tokenizer that are no longer where they were, or changed.
    """
    from megatron_steel.data.order import next_batch
    from megatron_steel.data.tokenizer import load_tokenizer

    run = _open(folder)
    order, trained, recipe = _order_of(run, folder, step)
    state, batch = order.before_step(step)
    if state.after(batch).next_sample > order.segments[-1].end:
        raise SteelError(f"step {step} is beyond the end of the run", folder, "lengthen the run in its recipe.yaml")
    ranks, micro = _cut(run, recipe, step, batch, rank, folder)
    decode = load_tokenizer(tokenizer or run.recipe.tokenizer.path).decode
    data = _Data(run)
    samples = []
    for place, number in enumerate(next_batch(state, batch)[0].tolist()):
        one_pass, inside = divmod(place, ranks * micro)
        whose, row = divmod(inside, micro)
        if rank in (None, whose):
            samples.append(data.sample(order, number, (whose, one_pass, row), decode))
    return Step(step, trained, ranks, micro, samples)


def as_text(step: Step) -> Iterator[str]:
    """Line by line, for the terminal."""
    state = "trained" if step.trained else "after the newest checkpoint, as planned"
    yield f"step {step.step:,} ({state}), {step.ranks} ranks, micro-batches of {step.micro_batch_size}"
    for s in step.samples:
        yield f"\nsample {s.number:,} | rank {s.rank}, micro-batch {s.micro_batch}, row {s.row} | {s.prefix}, epoch {s.epoch}, token {s.start:,}"
        for p in s.pieces:
            origin = f" ({p.file}, {p.file_document:,})" if p.file else ""
            yield f"  document {p.document:,}{origin} from token {p.start:,}, {len(p.ids):,} tokens: {p.text}"


def to_json(step: Step) -> dict[str, Any]:
    return dataclasses.asdict(step)


def _open(folder: Path) -> _Run:
    """Raises SteelError where nobody has trained."""
    import yaml

    checkpoints = _checkpoints(folder)
    file, environment = folder / "recipe.yaml", folder / "environment.json"
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        ranks = int(json.loads(environment.read_text(encoding="utf-8"))["world_size"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        if not checkpoints:
            what = f"this is no run folder: recipe.yaml and environment.json cannot be read ({error})"
            raise SteelError(what, folder, "name a folder that a training has made") from None
        tree, ranks = checkpoints[-1].manifest["recipe"], checkpoints[-1].manifest["world_size"]
    return _Run(from_dict(tree, where=str(file)), checkpoints, ranks)


def _checkpoints(folder: Path) -> "list[Checkpoint]":
    from megatron_steel.checkpoint.commit import published, read_manifest

    found = []
    for path in published(folder / "checkpoints"):
        try:
            found.append(read_manifest(path))
        except SteelError as error:
            dist.log.warning("passed over a checkpoint: %s", error)
    return found


def _order_of(run: _Run, folder: Path, step: int) -> "tuple[OrderState, bool, Recipe]":
    """The order that step `step` has or will have, whether it lies behind the newest checkpoint, and the recipe of its stage
    where it does not."""
    from megatron_steel.data.order_json import from_json

    newest = run.checkpoints[-1] if run.checkpoints else None
    if step < 1:
        raise SteelError(f"there is no step {step}", folder, "the first step is 1")
    if newest and step <= newest.step:
        return from_json(newest.manifest["order"], newest.path), True, run.recipe
    before, steps = newest, 0
    for part in stages.to_come(stages.parts_of(run.recipe), newest.step if newest else 0):
        members = _members(part.recipe)
        steps = preflight.total_steps(part.recipe, members, before)
        order = preflight.plan_order(part.recipe, members, steps, before)
        if step <= steps:
            return order, False, part.recipe
        before = _foreseen(order, steps - (before.step if before else 0), part, folder)
    raise SteelError(f"the run has {steps} steps, and no step {step}", folder, "name one of them")


def _members(recipe: Recipe) -> "list[Member]":
    from megatron_steel.data.manifest import trust

    return [preflight.member(p, trust(p.prefix)) for p in _prefixes(recipe)]


def _foreseen(order: "OrderState", steps: int, part: stages.Part, folder: Path) -> "Checkpoint":
    """What the stage will leave when it has made `steps` more steps, as far as the order of data needs it."""
    from megatron_steel.checkpoint.commit import Checkpoint

    end, tokens = part.first_step + part.steps, part.first_tokens + part.tokens
    state = json.loads(json.dumps(order.after_steps(steps).to_json()))
    return Checkpoint(folder, {"step": end, "tokens": tokens, "order": state})


def _cut(run: _Run, recipe: Recipe, step: int, batch: int, rank: int | None, folder: Path) -> tuple[int, int]:
    """(ranks, micro-batch size) of the step: of the first checkpoint after it, or of the newest start."""
    after = next((c for c in run.checkpoints if c.step >= step), None)
    ranks = after.manifest["world_size"] if after else run.ranks
    micro = after.manifest["recipe"]["train"]["micro_batch_size"] if after else recipe.train.micro_batch_size
    if rank is not None and not 0 <= rank < ranks:
        raise SteelError(f"there is no rank {rank} in step {step}", folder, f"its ranks are 0 to {ranks - 1}")
    if batch % (ranks * micro):  # the checkpoint that knew is gone
        return 1, batch
    return ranks, micro


class _Data:
    """The run's data sets, found by digest and opened when a sample needs them."""

    def __init__(self, run: _Run):
        self._prefixes: dict[str, str] = {}
        for checkpoint in run.checkpoints:
            for entry in [*checkpoint.manifest.get("data_before", []), *checkpoint.manifest["data"]]:
                self._prefixes[entry["digest"]] = entry.get("prefix", "")  # older checkpoints do not say it
        self._now = [p for part in stages.parts_of(run.recipe) for p in _prefixes(part.recipe)]
        self._open: dict[str, IndexedDataset] = {}
        self._manifests: dict[str, Manifest] = {}

    def sample(self, order: "OrderState", number: int, whose: tuple[int, int, int], decode: Any) -> Sample:
        place = order.locate(number)
        data = self._dataset(place.digest)
        if self._manifests[place.digest].kind == "pairs":
            return self._pair(number, whose, place, decode)
        stop = place.start + place.sequence_length + 1
        starts = [place.start, *data.document_cuts(place.start, stop).tolist()]
        pieces = []
        for start, end in zip(starts, [*starts[1:], stop], strict=True):
            document = data.document_of(start)
            ids = data.read(start, end).tolist()
            first = int(data.document_starts(document, document + 1)[0])
            origin = self._manifests[place.digest].origin(document) or ("", None)
            pieces.append(Piece(document, *origin, start - first, ids, decode(ids)))
        return Sample(number, *whose, data.prefix, place.epoch, place.start, pieces)

    def _pair(self, number: int, whose: tuple[int, int, int], place: "Place", decode: Any) -> Sample:
        """A prompt and a response, whole; `start` is the number of the pair."""
        from megatron_steel.data.pairs import read_pair

        data, origin = self._open[place.digest], self._manifests[place.digest].origin(place.start) or ("", None)
        pieces, first = [], 0
        for side in read_pair(data, place.start, data.tokens):
            pieces.append(Piece(place.start, *origin, first, side.tolist(), decode(side.tolist())))
            first += len(side)
        return Sample(number, *whose, data.prefix, place.epoch, place.start, pieces)

    def _dataset(self, digest: str) -> "IndexedDataset":
        from megatron_steel.data.indexed import IndexedDataset
        from megatron_steel.data.manifest import trust

        if digest not in self._open:
            if not self._prefixes.get(digest):
                self._prefixes |= {trust(p.prefix).digest: p.prefix for p in self._now}
            prefix = self._prefixes.get(digest)
            if not prefix:
                what = (
                    f"the step draws from a data set (digest {digest[:12]}...) that neither recipe nor checkpoints name"
                )
                raise SteelError(what, "data.train", "look at a step after which a checkpoint is still there")
            self._manifests[digest] = trust(prefix)
            if self._manifests[digest].digest != digest:
                what = f"the content of the data has changed since the step (digest {digest[:12]}... then)"
                raise SteelError(what, f"{prefix}.bin", "restore the files")
            self._open[digest] = IndexedDataset(prefix)
        return self._open[digest]


def _prefixes(recipe: Recipe) -> list[Prefix]:
    return [Prefix(recipe.data.train)] if isinstance(recipe.data.train, str) else recipe.data.train
