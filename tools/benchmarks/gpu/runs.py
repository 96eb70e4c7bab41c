"""One training step of ours, and its exact twin in plain torch, on the same model and the same batches.

`Ours` goes the real road: `prepare_for_training`, decay groups, `start_engine`, `loop.train_step`. Knows nothing of what
is measured.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_steel import device as device_facts
from megatron_steel import dist, preflight
from megatron_steel.model import build
from megatron_steel.model.flops import parameters
from megatron_steel.recipe import Recipe
from megatron_steel.train import engine as engines
from megatron_steel.train import loop, optimizer
from megatron_steel.train.watch import Watch

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    loss: Any
    """Mean per token, a scalar that may still be on the device."""
    grad_norm: float | None


def initial_model(recipe: Recipe, device: torch.device, config: Any = None) -> Any:
    """The recipe's model with its own initial weights, made on the device (a GPU draws 1B weights in a second)."""
    torch.manual_seed(recipe.run.seed)
    with torch.device(device):
        return build.construct(config or build.build_config(recipe.model), torch.float32).to(device)


def synthetic(recipe: Recipe, samples: int, count: int, seed: int = 5) -> list[Batch]:
    """`count` batches of `samples` rows of random ids on the CPU, labels already shifted, as the loader yields them."""
    generator = torch.Generator().manual_seed(seed)
    words, length = int(recipe.model.config["vocab_size"]), recipe.data.sequence_length
    rows = [torch.randint(words, (samples, length + 1), generator=generator) for _ in range(count)]
    return [{"input_ids": r[:, :-1].contiguous(), "labels": r[:, 1:].contiguous()} for r in rows]


def plan_of(recipe: Recipe) -> preflight.RunPlan:
    """What of a run's plan does not depend on data and tokenizer."""
    config = build.build_config(recipe.model)
    return preflight.RunPlan(config, {}, parameters(config).total, 0.0, [], [])


def prepare(model: Any, recipe: Recipe, device: torch.device) -> None:
    """Lay the training forward over the model, with the recipe's kernels. Raises SteelError where one cannot run here."""
    choose = getattr(device_facts, "kernels", None)
    more = (choose(recipe, plan_of(recipe), device), recipe.train.z_loss) if choose else ()
    build.prepare_for_training(model, recipe.train.activation_checkpointing, *more)


class Ours:
    """Our engine at the sharding that `recipe.deepspeed.config` names (a file, not `auto`)."""

    def __init__(self, recipe: Recipe, model: Any, device: torch.device):
        prepare(model, recipe, device)
        groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
        config = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
        self.kernel = optimizer.choose(recipe.optim.kernel, device.type, engines.offloads_optimizer(config))
        engine = engines.start_engine(model, groups, recipe.optim, config, device)
        self.engine = engine
        self._job = loop.Job(
            engine=engine, recipe=recipe, monitor=None, watch=Watch(None), next_batches=list, validation={},
            prompts=None, save=lambda step, tokens, must: True, position=dict, out_of_memory=lambda: "", steps=1 << 30,
            total_tokens=0,
        )  # fmt: skip # train_step logs nothing, so there is no monitor

    def resize(self, micro_batch: int, accumulation: int) -> None:
        """Cut the global batch anew; `accumulation` must divide the one before."""
        self.engine.set_train_micro_batch_size(micro_batch)
        self.engine.set_train_batch_size(micro_batch * accumulation * dist.world_size())

    def step(self, batches: list[Batch]) -> Step:
        self._job.step += 1
        self._job.next_batches = lambda: batches
        done = loop.train_step(self._job)
        return Step(done.loss_sum / done.tokens, done.grad_norm)

    def grad_norm(self, done: Step) -> float:
        return done.grad_norm if done.grad_norm is not None else float(self.engine.get_global_grad_norm())


class Twin:
    """torch and transformers alone, written for exactness: what parity is measured against.

    Whole logits, our labels, AdamW over single tensors, a gradient norm in fp64.
    """

    kernel = "torch"

    def __init__(self, recipe: Recipe, model: Any, device: torch.device):
        self.model, self._recipe, self._device = model.train(), recipe, device
        groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
        o = recipe.optim
        self._adam = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, foreach=False, fused=False)
        self._norm = 0.0

    def step(self, batches: list[Batch]) -> Step:
        total = torch.zeros((), device=self._device)
        for batch in batches:
            ids, labels = batch["input_ids"].to(self._device), batch["labels"].to(self._device)
            logits = self.model(input_ids=ids, use_cache=False, **_apart(batch, self._device)).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        # In fp64: over a large tensor torch's fp32 norm is off by 1e-4 on a CPU, more than the tolerance.
        gradients = [p.grad for p in self.model.parameters()]
        norm = torch.nn.utils.get_total_norm([g.double() for g in gradients])
        self._norm = float(norm)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._recipe.optim.clip_grad_norm, norm.float())
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return Step(total, None)

    def grad_norm(self, done: Step) -> float:
        return self._norm


def _apart(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Mask and positions that keep packed documents apart, written out in full."""
    if "document_ids" not in batch:
        return {}
    documents = batch["document_ids"]
    tokens = torch.arange(documents.shape[1])
    mask = (documents[:, :, None] == documents[:, None, :]) & (tokens[:, None] >= tokens[None, :])
    positions = torch.stack(
        [torch.cat([torch.arange(int(n)) for n in row.unique(return_counts=True)[1]]) for row in documents]
    )
    return {"attention_mask": mask[:, None].to(device), "position_ids": positions.to(device)}
