"""One training step, ours and plain PyTorch's, on the same model and the same batches.

`Ours` goes the real road: `prepare_for_training`, decay groups, `start_engine`, `loop.train_step`. `Plain` is what one
writes by hand around a transformers class: autocast to bf16 over fp32 weights, the class's own loss, torch's fused
AdamW, the same clipping and accumulation. It keeps fp32 weights and moments because ours does; all-bf16 training would
be another, less exact method. Knows nothing of what is measured.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from megatron_steel import dist
from megatron_steel.model import build
from megatron_steel.recipe import Recipe
from megatron_steel.train import engine as engines
from megatron_steel.train import loop, optimizer
from megatron_steel.train.watch import Watch

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    loss: torch.Tensor
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


class Ours:
    """Our engine at the sharding that `recipe.deepspeed.config` names (a file, not `auto`)."""

    def __init__(self, recipe: Recipe, model: Any, device: torch.device):
        build.prepare_for_training(model, recipe.train.activation_checkpointing)
        groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
        config = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
        self.kernel = optimizer.choose(recipe.optim.kernel, device.type, engines.offloads_optimizer(config))
        engine = engines.start_engine(model, groups, recipe.optim, config, device)
        self.engine = engine
        self._job = loop.Job(
            engine=engine, recipe=recipe, monitor=None, watch=Watch(None), next_batches=list, validation=None,
            save=lambda step, tokens: None, position=dict, out_of_memory=lambda: "", steps=1 << 30,
        )  # fmt: skip # train_step logs nothing, so there is no monitor

    def step(self, batches: list[Batch]) -> Step:
        self._job.step += 1
        self._job.next_batches = lambda: batches
        done = loop.train_step(self._job)
        return Step(done.loss_sum / done.tokens, done.grad_norm)

    def grad_norm(self, done: Step) -> float:
        return done.grad_norm if done.grad_norm is not None else float(self.engine.get_global_grad_norm())


class Plain:
    """torch and transformers alone.

    Args:
        fused: torch's fused AdamW; else its plain loop over single tensors, the twin that parity is measured against.
    """

    kernel = "torch"

    def __init__(self, recipe: Recipe, model: Any, device: torch.device, fused: bool = True):
        self.model, self._recipe, self._device = model.train(), recipe, device
        groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
        kind = {"fused": True} if fused else {"foreach": False, "fused": False}
        o = recipe.optim
        self._adam = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, **kind)
        self._norm = 0.0

    def step(self, batches: list[Batch]) -> Step:
        total = torch.zeros((), device=self._device)
        for batch in batches:
            ids = batch["input_ids"].to(self._device, non_blocking=True)
            with self._precision():
                # The class shifts its labels itself, and so predicts one token a sample fewer than we do.
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.optim.clip_grad_norm)
        return self._update(total)

    def exact_step(self, batches: list[Batch]) -> Step:
        """As `step`, with our labels, whole logits and an exact gradient norm: the twin of parity checks."""
        total = torch.zeros((), device=self._device)
        for batch in batches:
            ids, labels = batch["input_ids"].to(self._device), batch["labels"].to(self._device)
            with self._precision():
                logits = self.model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        # In fp64: over a large tensor torch's fp32 norm is off by 1e-4 on a CPU, more than the tolerance.
        gradients = [p.grad for p in self.model.parameters()]
        norm = torch.nn.utils.get_total_norm([g.double() for g in gradients])
        self._norm = float(norm)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._recipe.optim.clip_grad_norm, norm.float())
        return self._update(total)

    def grad_norm(self, done: Step) -> float:
        return self._norm

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self._recipe.train.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16) if wanted else contextlib.nullcontext()

    def _update(self, loss: torch.Tensor) -> Step:
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return Step(loss, None)
