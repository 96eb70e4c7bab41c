"""Multi-round training: of the documents that a round has trained on, those for the next, likelier where the loss is high.

1. A document's loss is the mean over its tokens but the first, in nats, under the model of the round before. One longer
   than the model's window is read in windows that overlap by the one token that is only predicted from.
2. Of all documents of all data sets together a share is drawn without replacement, each time with a probability proportional to
   exp(loss) (RethinkTinyLM, arXiv 2402.02791). Gumbel's trick: the k largest of loss + noise are such a
   draw (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059). The noise is a function of (seed, content, document).
3. What was drawn is written in the order of its sources, whole documents, byte for byte.

Losses are kept beside the output, a chunk of documents at a time: a stopped command goes on there, and another share or seed
scores nothing anew. The output appears whole or not at all. Must not know the byte format, trainers or recipes.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data import manifest
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.reserve import published, reserved, sha256
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
_CHUNK = 1024  # documents; batches never reach over two chunks, so that going on changes no bit
_BATCH_TOKENS = 8192  # of a pass, fewer where the vocabulary makes its logits more than these
_BATCH_LOGITS = 1 << 29
_LONGEST = 2048  # tokens of a window, where the model takes more
_UNKNOWN = -1.0  # a loss that is still to come; NaN: the document has no token to predict
Losses = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """What became of one data set."""

    name: str
    documents: int
    unscored: int
    """With fewer than two tokens: never drawn."""
    drawn: int
    tokens: int
    drawn_tokens: int
    mean_loss: float | None
    """Over its scored documents, nats per token; None where there are none."""
    drawn_mean_loss: float | None


def resample(
    model_dir: str,
    prefixes: Sequence[str],
    output: str,
    share: float,
    seed: int = 0,
    sequence_length: int | None = None,
    trust_code: bool = False,
) -> list[Drawn]:
    """Write the data set `output` and `OUTPUT.report.json`, and return what became of each input.

    Args:
        model_dir: a Hugging Face folder; it is asked in fp32 on a CPU, in bf16 on a GPU.
        share: of the documents with a loss, in (0, 1].
        sequence_length: tokens of a window; the model's longest position, and at most 2,048, when left out.

    Raises:
        SteelError: an impossible share or window, the same data twice, other tokenizers or ids than the model's, a model that
            reads the future, nothing to draw, or an output that cannot be written.
    """
    if not 0 < share <= 1:
        raise SteelError(f"a share of {share} is none", "--share", "give a number above 0 and at most 1")
    if not prefixes:
        raise SteelError("there is nothing to draw from", "PREFIX", "name at least one data set")
    if Path(output).resolve() in {Path(p).resolve() for p in prefixes}:
        raise SteelError("the output is one of the inputs", output, "choose another output")
    with reserved(output):
        scorer = _Scorer(model_dir, sequence_length, trust_code)
        known = [manifest.trust(prefix, scorer.vocabulary) for prefix in prefixes]
        _refuse_mixed(prefixes, known, model_dir)
        losses = [_losses(p, m, scorer, Path(f"{output}.losses")) for p, m in zip(prefixes, known, strict=True)]
        chosen = draw(losses, [noise(seed, m.digest, m.documents) for m in known], share)
        said = {"share": share, "seed": seed, "model": scorer.fingerprint, "sequence_length": scorer.length}
        report = _write(prefixes, known, losses, chosen, output, said)
        with published(f"{output}.report.json") as aside:
            tree = {**said, "data": [dataclasses.asdict(d) for d in report]}
            Path(aside).write_text(json.dumps(tree, ensure_ascii=False, indent=1), encoding="utf-8")
    return report


def noise(seed: int, digest: str, documents: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of each document of the data set with this content."""
    return np.random.default_rng([seed, int(digest[:32], 16)]).gumbel(size=documents)


def draw(
    losses: Sequence[Losses], noises: Sequence[npt.NDArray[np.float64]], share: float
) -> list[npt.NDArray[np.int64]]:
    """The numbers of the documents drawn of each data set, ascending.

    Raises SteelError where the share makes no document.
    """
    keys = np.concatenate([loss.astype(np.float64) + g for loss, g in zip(losses, noises, strict=True)])
    scored = np.flatnonzero(~np.isnan(keys))
    count = round(share * len(scored))
    if count < 1:
        what = f"a share of {share} of {len(scored)} documents with two tokens or more is none"
        raise SteelError(what, "--share", "give a larger share, or more data")
    largest = scored[np.argsort(-keys[scored], kind="stable")[:count]]
    ends = np.cumsum([0, *(len(loss) for loss in losses)])
    largest.sort()
    cuts = np.searchsorted(largest, ends)
    return [largest[a:b] - first for a, b, first in zip(cuts[:-1], cuts[1:], ends[:-1], strict=True)]


def table(report: Sequence[Drawn]) -> str:
    """For the terminal."""
    lines = [f"{'':24} {'documents':>12} {'drawn':>12} {'tokens drawn':>14} {'mean loss':>10} {'of the drawn':>12}"]
    for d in report:
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in (d.mean_loss, d.drawn_mean_loss)]
        lines.append(
            f"{d.name:24} {d.documents:>12,} {d.drawn:>12,} {d.drawn_tokens:>14,} {losses[0]:>10} {losses[1]:>12}"
        )
    return "\n".join(lines)


class _Scorer:
    """A model that tells the mean loss of documents."""

    def __init__(self, model_dir: str, sequence_length: int | None, trust_code: bool):
        from megatron_steel.post.load import load

        loaded = load(model_dir, trust_code)
        self._model, self._device = loaded.model, loaded.device
        config = self._model.config.get_text_config()
        if getattr(config, "sees_future", False):
            what = "this model reads the tokens that it predicts: its losses say nothing about a document"
            raise SteelError(what, model_dir, "score with a causal model (`megatron-steel audit` tells)")
        positions = getattr(config, "max_position_embeddings", None) or _LONGEST
        self.length = sequence_length or min(_LONGEST, positions)
        if not 2 <= self.length <= positions:
            what = f"windows of {self.length} tokens do not suit a model of {positions} positions"
            raise SteelError(what, "--sequence-length", f"give 2 to {positions}")
        self.vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self.fingerprint = _fingerprint(Path(model_dir), str(next(self._model.parameters()).dtype))

    def losses(self, documents: Sequence[npt.NDArray[Any]]) -> Losses:
        """Mean loss of each document, float32; NaN for one without a token to predict."""
        step = self.length - 1  # a window's last token is the next one's first
        windows = [(i, ids[at : at + self.length]) for i, ids in enumerate(documents)
                   for at in range(0, len(ids) - 1, step)]  # fmt: skip
        windows.sort(key=lambda window: len(window[1]))
        sums = np.zeros(len(documents), np.float64)
        for batch in _batches(windows, min(_BATCH_TOKENS, _BATCH_LOGITS // self.vocabulary)):
            for (i, _), total in zip(batch, self._sums([ids for _, ids in batch]), strict=True):
                sums[i] += total
        predicted = np.array([max(0, len(ids) - 1) for ids in documents], np.float64)
        return np.divide(sums, predicted, out=np.full(len(sums), np.nan), where=predicted > 0).astype(np.float32)

    def _sums(self, windows: Sequence[npt.NDArray[Any]]) -> list[float]:
        """Summed loss of each window. Shorter ones are padded behind their end, where a causal model does not look."""
        import torch
        from torch.nn.functional import cross_entropy

        ids = np.zeros((len(windows), max(map(len, windows))), np.int64)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window)] = window
        ids_BT = torch.from_numpy(ids).to(self._device)
        with torch.inference_mode():
            output = self._model(input_ids=ids_BT[:, :-1])
            logits_BTV = output.logits if hasattr(output, "logits") else output[0]
            each = [
                cross_entropy(logits[: len(w) - 1].float(), row[1 : len(w)], reduction="none").double().sum()
                for logits, row, w in zip(logits_BTV, ids_BT, windows, strict=True)
            ]
            sums = torch.stack(each).tolist()
        if not all(map(math.isfinite, sums)):
            raise SteelError("the model's loss of a document is no number", "HF_DIR", "use another checkpoint's export")
        return sums


def _batches(windows: list[tuple[int, Any]], tokens: int) -> Iterator[list[tuple[int, Any]]]:
    """Windows, ascending in length, in batches of at most so many tokens with the padding, or of one."""
    batch: list[tuple[int, Any]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _fingerprint(folder: Path, dtype: str) -> str:
    """Of the weights, the configuration and the arithmetic."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") or f.name == "config.json")
    told = [[f.name, sha256(f)] for f in files]
    return hashlib.sha256(json.dumps([told, dtype]).encode()).hexdigest()


def _losses(prefix: str, known: manifest.Manifest, scorer: _Scorer, folder: Path) -> Losses:
    """Of every document; what an earlier command has scored with this model is read."""
    key = hashlib.sha256(f"{scorer.fingerprint} {scorer.length}".encode()).hexdigest()[:12]
    file = folder / f"{known.digest[:24]}-{key}.f32"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.stat().st_size != 4 * known.documents:
            np.full(known.documents, _UNKNOWN, np.float32).tofile(file)
        losses = np.memmap(file, np.float32, "r+", shape=(known.documents,))
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", file, "mend it and repeat") from None
    with IndexedDataset(prefix) as data:
        for start in range(0, known.documents, _CHUNK):
            stop = min(start + _CHUNK, known.documents)
            if (losses[start:stop] == _UNKNOWN).any():
                losses[start:stop] = scorer.losses([data.document(i) for i in range(start, stop)])
                losses.flush()
                log.info("%s: %s of %s documents scored", prefix, f"{stop:,}", f"{known.documents:,}")
    return np.array(losses)


def _write(
    prefixes: Sequence[str],
    known: Sequence[manifest.Manifest],
    losses: Sequence[Losses],
    chosen: Sequence[npt.NDArray[np.int64]],
    output: str,
    said: dict[str, Any],
) -> list[Drawn]:
    report, provenance = [], []
    try:
        with IndexedDataset(prefixes[0]) as first, IndexedWriter(output, first.dtype) as writer:
            for prefix, m, loss, numbers in zip(prefixes, known, losses, chosen, strict=True):
                before = writer.tokens
                with IndexedDataset(prefix) as data:
                    for number in numbers.tolist():
                        writer.add_document(data.document(number))
                means = [float(np.nanmean(part)) if np.isfinite(part).any() else None for part in (loss, loss[numbers])]
                name, unscored = Path(prefix).name, int(np.isnan(loss).sum())
                report.append(
                    Drawn(name, m.documents, unscored, len(numbers), m.tokens, writer.tokens - before, *means)
                )
                provenance.append({"name": name, "bytes": m.bin_bytes, "documents": len(numbers),
                                   "resampled": {"digest": m.digest, "of_documents": m.documents, **said}})  # fmt: skip
        manifest.write(output, writer.facts, known[0].tokenizer, provenance)
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", output, "mend it and repeat") from None
    return report


def _refuse_mixed(prefixes: Sequence[str], known: Sequence[manifest.Manifest], model_dir: str) -> None:
    """Raise SteelError where data sets hold pairs, are the same, of different dtypes, or of another tokenizer than the model's."""
    from megatron_steel.data.tokenizer import load_tokenizer

    pairs = [p for p, m in zip(prefixes, known, strict=True) if m.kind == "pairs"]
    if pairs:
        raise SteelError(
            "pairs of a prompt and a response are no documents", ", ".join(pairs), "name data sets of text"
        )
    digests = [m.digest for m in known]
    if len(set(digests)) < len(digests):
        raise SteelError("the same data twice", ", ".join(prefixes), "name it once")
    if len({m.dtype for m in known}) > 1:
        raise SteelError("the data sets have different dtypes", ", ".join(prefixes), "tokenize them with one tokenizer")
    made_by = {m.tokenizer["fingerprint"]: p for p, m in zip(prefixes, known, strict=True) if m.tokenizer}
    if any((Path(model_dir) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")) and made_by:
        own = load_tokenizer(model_dir).fingerprint
        other = [p for fingerprint, p in made_by.items() if fingerprint != own]
        if other:
            what = "the data was tokenized with another tokenizer than the model's"
            raise SteelError(what, ", ".join(other), f"tokenize it with {model_dir}")
