"""Before anything is built: check a recipe against its data, tokenizer and model, and plan the order of data.

Whatever bad input can cause ends here, on all ranks alike. Knows nothing of engines and builds no weights.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.recipe import Prefix, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.data.dataset import BlendedDataset
    from megatron_steel.data.loader import Batch
    from megatron_steel.data.manifest import Manifest
    from megatron_steel.data.order import OrderState, Segment
    from megatron_steel.data.pairs import PairDataset
    from megatron_steel.data.ramp import Ramp
    from megatron_steel.data.segments import Member
    from megatron_steel.data.tokenizer import Tokenizer
    from megatron_steel.train.samples import Prompts


@dataclass(frozen=True)
class RunPlan:
    """What follows from a recipe, its data and its model before anything is built."""

    config: "PretrainedConfig"
    tokenizer: dict[str, Any]
    parameters: int
    flops_per_token: float
    train: "list[Member]"
    validation: "list[Member]"
    prompts: "Prompts | None" = None

    @property
    def pairs(self) -> bool:
        """Whether a sample is a prompt and a response, for an encoder-decoder."""
        return self.train[0].pairs


def plan_run(recipe: Recipe) -> RunPlan:
    """Check data, tokenizer and model against each other; a collective call.

    Raises SteelError on all ranks: unreadable data, an id outside the vocabulary, sequences longer than the data, an
    impossible model.
    """
    import torch

    from megatron_steel.data.missing import require_made
    from megatron_steel.data.segments import plan as plan_segments
    from megatron_steel.data.tokenizer import load_tokenizer
    from megatron_steel.model.build import build_config, construct
    from megatron_steel.model.flops import flops_per_token, parameters
    from megatron_steel.model.groups import by_pattern
    from megatron_steel.model.text_to_text import TEXT_TO_TEXT, is_text_to_text
    from megatron_steel.model.training import require_document_mask
    from megatron_steel.train.samples import Prompts

    def check() -> RunPlan:
        for key, data in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation or [])):
            require_made(
                [p.prefix for p in _listed(data)], recipe.tokenizer.path, key, recipe.model.type in TEXT_TO_TEXT
            )
        tokenizer = load_tokenizer(recipe.tokenizer.path)
        config = build_config(recipe.model, tokenizer.vocab_size)
        if recipe.data.document_mask:
            with torch.device("meta"):
                require_document_mask(construct(config, torch.float32))
        if recipe.optim.lr_ratio or recipe.model.init_std:
            with torch.device("meta"):
                model = construct(config, torch.float32)
            by_pattern(model, recipe.optim.lr_ratio, "optim.lr_ratio")
            by_pattern(model, recipe.model.init_std, "model.init_std")
        train = _members(recipe.data.train, config.vocab_size, tokenizer)
        validation = _members(recipe.data.validation, config.vocab_size, tokenizer) if recipe.data.validation else []
        _require_kind(recipe, train + validation, is_text_to_text(config))
        length = recipe.data.sequence_length
        flops = flops_per_token(config, length)
        require_positions(config, length)
        for members in filter(None, (train, validation)):  # raises where the order of data cannot be planned
            plan_segments(None, members, sample_length(recipe, members), 1, 1, recipe.run.seed)
        if {m.digest for m in train} & {m.digest for m in validation}:
            dist.log.warning("data.validation is also trained on: its loss says nothing about unseen text")
        return RunPlan(
            config,
            tokenizer.facts(),
            parameters(config).total,
            flops.hw if flops else 0.0,
            train,
            validation,
            Prompts.of(recipe, tokenizer),
        )

    # The first rank of a node scans data that has no manifest; the others then find one.
    first = dist.together(check, only=dist.is_first_of_node())
    rest = dist.together(check, only=not dist.is_first_of_node())
    plan = first or rest
    assert plan is not None
    return plan


def require_positions(config: "PretrainedConfig", sequence_length: int) -> None:
    """Raise SteelError for sequences that are longer than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        what = f"sequences of {sequence_length} tokens do not fit a model of {positions} positions"
        raise SteelError(what, "data.sequence_length", "set model.config.max_position_embeddings, or a shorter one")


def sample_length(recipe: Recipe, members: "list[Member]") -> int:
    """The sequence length that the order of data is told: in tokens, or 1 where it counts pairs."""
    from megatron_steel.data.pairs import SAMPLE_LENGTH

    return SAMPLE_LENGTH if members[0].pairs else recipe.data.sequence_length


def _require_kind(recipe: Recipe, members: "list[Member]", text_to_text: bool) -> None:
    """Raise SteelError where the model does not train on data of this kind, or a key counts tokens that pairs do not tell."""
    from megatron_steel.data.indexed import IndexedDataset
    from megatron_steel.data.pairs import cut_share

    wrong = [m.prefix for m in members if m.pairs != text_to_text]
    if wrong and text_to_text:
        what = f"an encoder-decoder learns responses to prompts, and this is text: {', '.join(wrong)}"
        raise SteelError(what, "data.train, data.validation", "tokenize pairs: megatron-steel tokenize FILE.jsonl "
                         "--prompt-key prompt --response-key response ..., or use a causal model")  # fmt: skip
    if wrong:
        what = f"a causal model learns text, and this is pairs of a prompt and a response: {', '.join(wrong)}"
        raise SteelError(what, "data.train, data.validation", "tokenize texts (--text-key), or use model.type=t5")
    if not text_to_text:
        return
    train = recipe.train
    for key, given in (("train.tokens", train.tokens), ("schedule.warmup_tokens", recipe.schedule.warmup_tokens),
                       ("train.batch_ramp", any(stage.until_tokens for stage in train.batch_ramp))):  # fmt: skip
        if given:
            what = (
                "how many labels pairs have is known only when they are read, so that nothing can be planned in tokens"
            )
            raise SteelError(what, key, "count in steps, or in epochs")
    if train.sample_prompts:
        what = "an encoder-decoder does not go on with a text while it trains"
        raise SteelError(
            what, "train.sample_prompts", "leave them out: `megatron-steel generate` answers after the export"
        )
    for m in members:
        with IndexedDataset(m.prefix) as data:
            share = cut_share(data, recipe.data.sequence_length)
        if share:
            dist.log.warning(
                "%s: %.2f%% of the pairs are longer than data.sequence_length and are cut", m.prefix, 100 * share
            )


def total_steps(recipe: Recipe, members: "list[Member]", checkpoint: "Checkpoint | None") -> int:
    """Optimizer steps of the whole run. What a checkpoint has done counts as it was, also where the batch has changed.

    `train.tokens` is rounded up to whole steps; a last batch that `train.epochs` would not fill is left out.
    """
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.ramp import steps_of
    from megatron_steel.data.segments import samples_per_epoch

    train, length, done = recipe.train, sample_length(recipe, members), checkpoint.step if checkpoint else 0
    ramp = batch_ramp(recipe)
    if train.steps is not None:
        return train.steps
    trained = from_json(checkpoint.manifest["order"], checkpoint.path).trained_samples if checkpoint else 0
    if train.tokens is not None:
        missing = train.tokens - (checkpoint.manifest["tokens"] if checkpoint else 0)
        whole, rest = steps_of(ramp, trained, max(0, math.ceil(missing / length)))
        return done + whole + (rest > 0)
    samples = int((train.epochs or 0) * samples_per_epoch(members, length))
    steps = done + steps_of(ramp, trained, max(0, samples - trained))[0]
    if steps == 0:
        what = f"{train.epochs} epochs are {samples} samples, less than one batch of {ramp[0][1]}"
        raise SteelError(what, "train.epochs, train.global_batch_size", "train longer, or make the batch smaller")
    return steps


def batch_ramp(recipe: Recipe) -> "Ramp":
    """Samples per step over the whole run, the last piece without an end. Raises SteelError for an impossible stage."""
    from megatron_steel.data.ramp import Stage, endless, plan_ramp

    stages = [Stage(s.global_batch_size, s.until_tokens, s.until_steps) for s in recipe.train.batch_ramp]
    try:
        return endless(plan_ramp(stages, recipe.data.sequence_length), recipe.train.global_batch_size)
    except ValueError as error:
        raise SteelError(str(error), "train.batch_ramp", "let every stage end later than the one before") from None


def samples_to_come(recipe: Recipe, steps: int, checkpoint: "Checkpoint | None") -> int:
    """Samples that the run still trains until step `steps`."""
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.ramp import samples_of

    if checkpoint is None:
        return samples_of(batch_ramp(recipe), 0, steps)
    trained = from_json(checkpoint.manifest["order"], checkpoint.path).trained_samples
    return samples_of(batch_ramp(recipe), trained, max(0, steps - checkpoint.step))


def plan_order(recipe: Recipe, members: "list[Member]", steps: int, checkpoint: "Checkpoint | None") -> "OrderState":
    """The order of data of a run of `steps` steps over `members`, from `checkpoint` on; a collective call.

    Raises SteelError on all ranks: the content of a data set has changed since the checkpoint, or as `segments.plan`.
    """
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.segments import plan as plan_segments

    def make() -> "OrderState":
        before = from_json(checkpoint.manifest["order"], checkpoint.path) if checkpoint else None
        if checkpoint and before:
            _refuse_replaced(recipe, members, checkpoint, before)
        # A checkpoint fixes how many samples its steps took, also where the batch was another then.
        wanted = samples_to_come(recipe, steps, checkpoint) + (before.trained_samples if before else 0)
        batch, ramp = recipe.train.global_batch_size, batch_ramp(recipe)[:-1]
        length = sample_length(recipe, members)
        return plan_segments(before, members, length, batch, max(1, wanted), recipe.run.seed, ramp)

    order = dist.together(make)
    assert order is not None
    before = from_json(checkpoint.manifest["order"], checkpoint.path) if checkpoint else None
    if before and order.segments != before.segments:
        changed = _changed(before.segments[-1], order, members) or "a longer run"
        dist.log.info("from sample %s on the order of data is a new one: %s", f"{order.next_sample:,}", changed)
    return order


def _refuse_replaced(recipe: Recipe, members: "list[Member]", checkpoint: "Checkpoint", before: "OrderState") -> None:
    """Data may be added and taken away in mid-run; other content where a data set of the run was is a mistake.

    That is: the same prefix, or the same name and size, while the data set itself is no longer listed.
    """
    listed, drawn = {m.digest for m in members}, before.segments[-1].tokens
    for entry in checkpoint.manifest.get("data", []):
        if entry["digest"] in listed or entry["digest"] not in drawn:
            continue
        for m in members:
            same_place = m.prefix == entry.get("prefix")  # older checkpoints do not say it
            if same_place or (Path(m.prefix).name, m.tokens) == (entry["name"], entry["tokens"]):
                what = (
                    f"the content of {m.prefix} has changed since the checkpoint at step {checkpoint.step}: "
                    f"{entry['tokens']:,} tokens with digest {entry['digest'][:12]}... then, "
                    f"{m.tokens:,} with {m.digest[:12]}... now"
                )
                remedy = "restore the files; if the change is meant, give the new data another name"
                raise SteelError(what, f"{m.prefix}.bin, {m.prefix}.idx", remedy)


def _changed(before: "Segment", order: "OrderState", members: "list[Member]") -> str:
    """Which keys of the recipe order the data otherwise than `before` did."""
    from megatron_steel.data.ramp import ahead

    now = next(s for s in order.segments if s.first_sample == order.next_sample)
    ramps = [ahead(s.ramp, order.trained_samples) for s in (before, now)]
    names = {m.digest: Path(m.prefix).name for m in members}
    changed = [
        f"{key} was {old} and is now {new}"
        for key, old, new in (
            ("train.global_batch_size", before.batch, now.batch),
            ("data.sequence_length", before.sequence_length, now.sequence_length),
            ("train.batch_ramp", *([f"{batch} until sample {until:,}" for until, batch in ramp] for ramp in ramps)),
        )
        if old != new
    ]
    came, gone = now.tokens.keys() - before.tokens.keys(), before.tokens.keys() - now.tokens.keys()
    if came or gone:
        words = [f"with {names[d]}" for d in sorted(came)] + [f"without {d[:12]}" for d in sorted(gone)]
        changed.append(f"data.train is {', '.join(words)}")
    elif now.weights != before.weights:
        changed.append(f"data.train has other weights: {_weights(before, names)}, now {_weights(now, names)}")
    return "; ".join(changed)


def _weights(segment: "Segment", names: dict[str, str]) -> str:
    if segment.weights is None:
        return "none"
    return ", ".join(f"{names[digest]} {weight:g}" for digest, weight in segment.weights.items())


def open_dataset(members: "list[Member]", order: "OrderState", longest: int = 0) -> "BlendedDataset | PairDataset":
    """The samples of an order. `longest`: tokens of a prompt, and of a response, that are kept, where samples are pairs."""
    from megatron_steel.data.dataset import BlendedDataset
    from megatron_steel.data.indexed import IndexedDataset
    from megatron_steel.data.pairs import PairDataset

    opened = {m.digest: IndexedDataset(m.prefix) for m in members}
    return PairDataset(order, opened, longest) if members[0].pairs else BlendedDataset(order, opened)


def validation_batches_of(recipe: Recipe, plan: RunPlan) -> "dict[str, Callable[[], Iterator[Batch]]]":
    """The same held-out samples at every evaluation, by the name of their data set; empty where there are none.

    `train.eval_samples` are blended over all sets. A set too small to have one among them is left out.
    """
    from megatron_steel.data.loader import validation_batches
    from megatron_steel.data.segments import plan as plan_segments
    from megatron_steel.data.segments import samples_per_epoch

    if not plan.validation:
        return {}
    length = sample_length(recipe, plan.validation)
    samples = min(recipe.train.eval_samples, samples_per_epoch(plan.validation, length))
    order = plan_segments(None, plan.validation, length, 1, samples, recipe.run.seed)
    dataset = open_dataset(plan.validation, order, recipe.data.sequence_length)
    ranks = recipe.train.micro_batch_size, dist.rank(), dist.world_size(), recipe.data.document_mask
    of_set: dict[str, list[int]] = {m.digest: [] for m in plan.validation}
    for number in range(samples):
        of_set[order.locate(number).digest].append(number)
    return {
        name: partial(validation_batches, dataset, of_set[m.digest], *ranks)
        for name, m in zip(names_of(plan.validation), plan.validation, strict=True)
        if of_set[m.digest]
    }


def names_of(members: "list[Member]") -> list[str]:
    """A name for each data set: its prefix's last part, or where two have the same, the whole prefix."""
    for names in ([Path(m.prefix).name for m in members], [m.prefix.replace("/", "_") for m in members]):
        if len(set(names)) == len(names):
            return names
    return [m.digest[:12] for m in members]


def position(order: "OrderState", members: "list[Member]") -> dict[str, float]:
    """How far the data is: samples spent, and of each data set its epochs (1.5: half of the second) and its share.

    A share is of the samples drawn since the newest segment opened, so that it shows what was asked for since.
    """
    from megatron_steel.data.order import blocks

    drawn = order.drawn_before(order.next_sample)
    length = order.segments[-1].sequence_length
    tags = names_of(members)
    epochs = {f"epochs_{tag}": drawn[m.digest][0] + drawn[m.digest][1] / blocks(m.tokens, length)
              for tag, m in zip(tags, members, strict=True)}  # fmt: skip
    shares = order.shares()
    share = {f"data_share/{tag}": shares.get(m.digest, 0.0) for tag, m in zip(tags, members, strict=True)}
    return {"samples": order.next_sample, **epochs, **share}


def _listed(data: str | list[Prefix]) -> list[Prefix]:
    return [Prefix(data)] if isinstance(data, str) else data


def _members(data: str | list[Prefix], vocab_size: int, tokenizer: "Tokenizer") -> "list[Member]":
    from megatron_steel.data.manifest import trust, warn_of_twins

    members, prefixes = [], _listed(data)
    warn_of_twins([p.prefix for p in prefixes])
    for p in prefixes:
        manifest = trust(p.prefix, vocab_size)
        made_by = manifest.tokenizer  # None for data of other tools
        if made_by and made_by["fingerprint"] != tokenizer.fingerprint:
            raise SteelError(
                f"the data was tokenized with another tokenizer ({made_by['name']}, {made_by['vocab_size']} ids) than "
                f"the run's ({tokenizer.name}, {tokenizer.vocab_size} ids)",
                p.prefix,
                "set tokenizer.path to the one it was made with, or tokenize again",
            )
        members.append(member(p, manifest))
    return members


def member(prefix: Prefix, manifest: "Manifest") -> "Member":
    """A data set of the recipe as the order of data counts it."""
    from megatron_steel.data.pairs import counted_as_tokens
    from megatron_steel.data.segments import Member

    pairs = manifest.kind == "pairs"
    count = counted_as_tokens(manifest.documents) if pairs else manifest.tokens
    return Member(prefix.prefix, manifest.digest, count, prefix.weight, pairs)
