"""Muon for the matrices between embeddings and head, torch's AdamW for the rest, in one optimizer that ZeRO may cut.

Muon's step needs whole matrices, and ZeRO-1 and 2 lay them end to end and cut the row into equal pieces. Here
1. the momentum, which knows no neighbours, lives on this rank's piece, as Adam's moments do (so a checkpoint holds it);
2. of the few matrices that a cut goes through, the ranks add their parts together, all in one exchange a group;
3. each rank makes its matrices orthogonal and applies what lies on its piece.
At stage 0 every rank does all. The step is torch.optim.Muon's, which takes whole matrices only. DeepSpeed's own Muon is not
used: outside ZeRO-1 in bf16 it clips the orthogonal step instead of the gradient, and its scale does not match AdamW's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_steel import dist

if TYPE_CHECKING:
    from megatron_steel.train.elastic import Place

# Of x -> a x + b x^3 + c x^5 on the singular values, five times (K. Jordan, "Muon: an optimizer for hidden layers", 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
MOMENTUM = "momentum_buffer"  # torch.optim.Muon's name for it


@dataclass(frozen=True)
class _Part:
    """Values `start` to `start + count` of a matrix lie at `at` of a flat tensor; `slot`: its place in the exchange, if cut."""

    shape: tuple[int, int]
    at: int
    start: int
    count: int
    slot: int | None


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `muon`: True the step of torch.optim.Muon with Nesterov momentum.

    Args:
        groups: with `weight_decay`; those of Muon hold matrices [rows, columns] only.
        momentum: beta of the running mean of gradients.
        adjust_lr_fn: `match_rms_adamw`: steps of 0.2 * sqrt(max(rows, columns)) (arXiv 2502.16982, section 2.2);
            `original`: sqrt(max(1, rows / columns)).
        settings: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, adjust_lr_fn: str, **settings: Any):
        for group in groups:
            if group.get("muon"):
                group["momentum"] = momentum
        super().__init__(groups, **settings)
        self._adjust_lr_fn = adjust_lr_fn
        self._parts: dict[torch.Tensor, list[_Part]] = {}
        self._exchanged: dict[torch.Tensor, int] = {}  # values, the same number on every rank

    def lay_out(self, places: "list[Place]", shapes: dict[str, Any]) -> None:
        """Say where DeepSpeed has put the matrices: until then `step` moves none. A collective call."""
        groups = [group["params"] for group in self.param_groups if group.get("muon")]
        of_flat = {flat: [p for p in places if p.flat is flat] for flats in groups for flat in flats}
        whole = {name: shape.numel() for name, shape in shapes.items()}
        mine = [[p.name for p in of_flat[flat] if 0 < p.count < whole[p.name]] for flats in groups for flat in flats]
        everybody_s = dist.gather(mine)  # at stage 0, where nothing is cut, lists are empty
        for number, (flat, found) in enumerate(of_flat.items()):
            cut = sorted({name for rank in everybody_s for name in rank[number]})
            sizes = [whole[name] for name in cut]
            slots = {name: sum(sizes[:i]) for i, name in enumerate(cut)}
            self._exchanged[flat] = sum(sizes)
            self._parts[flat] = [_Part(tuple(shapes[p.name]), p.at, p.start, p.count, slots.get(p.name))
                                 for p in found if p.count]  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the groups that are listed now: DeepSpeed steps them one after another."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group.get("muon") else []:
                if flat.grad is not None:
                    self._step_matrices(flat, group)

    def _step_matrices(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[flat], group["momentum"]
        if MOMENTUM not in state:
            state["step"] = torch.zeros(())  # as AdamW counts, and as its loading expects
            state[MOMENTUM] = torch.zeros_like(flat)
        state["step"] += 1
        mean = state[MOMENTUM].lerp_(flat.grad, 1 - beta)
        update = flat.grad.lerp(mean, beta).flatten()
        together = update.new_zeros(self._exchanged.get(flat, 0))
        parts = self._parts.get(flat, [])
        for part in parts:
            if part.slot is not None:
                together[part.slot + part.start :][: part.count] = update[part.at :][: part.count]
        if len(together):
            torch.distributed.all_reduce(together)  # exact: where one rank has a number, the others have 0
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        values = flat.view(-1)
        for part in parts:
            size = part.shape[0] * part.shape[1]
            whole = update[part.at :][:size] if part.slot is None else together[part.slot :][:size]
            step = orthogonal(whole.view(part.shape)).flatten()[part.start :][: part.count]
            values[part.at :][: part.count].add_(step, alpha=-group["lr"] * self._scale(*part.shape))

    def _scale(self, rows: int, columns: int) -> float:
        if self._adjust_lr_fn == "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        return max(1.0, rows / columns) ** 0.5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [rows, columns] with all its singular values near 1 (about 0.7 to 1.2), in bf16 (Newton and Schulz)."""
    x = matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x
