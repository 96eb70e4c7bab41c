"""Rows of tokens to batches, padded; several conversations in one row do not see each other.

`pack` fits conversations into rows (TRL's best-fit decreasing). `Collator` numbers the conversations of each row, and
`keep_apart` makes the model turn the numbers into what keeps them apart: a complete mask, and positions from 0 in each
(`model/training.py`; tests prove which classes obey). Any attention that takes a mask does, so no flash-attn is needed.
Must not know files, templates or ranks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError
from megatron_steel.model.head import IGNORE

if TYPE_CHECKING:
    import torch

DOCUMENTS = "document_ids"


def pack(table: Any, length: int) -> Any:
    """A datasets.Dataset of `input_ids` and `labels` -> one of fuller rows, with `seq_lengths`, in TRL's order."""
    from trl import pack_dataset

    # Not in TRL's cache: this is a quick computation, and its cache would outlive the run.
    return pack_dataset(table, length, "bfd", map_kwargs={"keep_in_memory": False, "load_from_cache_file": False})


@dataclass
class Collator:
    """Rows to int64 tensors [B, T], padded on the right.

    Args:
        pad: the id that fills. Returned: input_ids, labels (-100 in padding and on the first token of each
        conversation), attention_mask (0 for padding), and for packed rows document_ids.
    """

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        packed = "seq_lengths" in rows[0]
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORE)
        mask, documents = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(rows):
            end = len(row["input_ids"])
            ids[place, :end], labels[place, :end] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[place, :end] = 1
            lengths = torch.tensor(row.get("seq_lengths") or [end])
            # Padding is a conversation of its own: it attends to itself alone, and nobody reads it.
            documents[place] = len(lengths)
            documents[place, :end] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            labels[place, lengths.cumsum(0) - lengths] = IGNORE  # what is before a conversation does not foretell it
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return batch | {DOCUMENTS: documents} if packed else batch


def keep_apart(model: Any) -> None:
    """Let a causal language model take `document_ids`. Raises SteelError where its class is not proven to obey."""
    from megatron_steel.model.attention import document_inputs
    from megatron_steel.model.training import require_document_mask

    try:
        require_document_mask(model)
    except SteelError as problem:
        raise SteelError(problem.what, "--packing", "leave --packing out: each row is then one conversation") from None

    def with_mask(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        documents = named.pop(DOCUMENTS, None)
        return arguments, named if documents is None else named | document_inputs(documents)

    # On the part below the head: TRL computes the loss from what that gives, and peft wraps what is above.
    model.base_model.register_forward_pre_hook(with_mask, with_kwargs=True)
