"""Ranks only cut the batch, reading ahead changes nothing, and the state saved is the state trained."""

import threading

import numpy as np
import pytest
import torch

from megatron_steel.data.dataset import BlendedDataset
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.loader import IGNORED, Loader, validation_batches
from megatron_steel.data.order import next_batch
from megatron_steel.data.order_json import from_json
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import SteelError

L, B = 8, 24


@pytest.fixture
def corpora(tmp_path):
    made, rng = {}, np.random.default_rng(1)
    for name, documents in (("aa", 60), ("bb", 25)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for length in rng.integers(1, 60, documents):
                writer.add_document(rng.integers(0, 5000, length))
        made[name] = IndexedDataset(tmp_path / name)
    return made


@pytest.fixture
def dataset(corpora):
    members = [Member(c.prefix, digest, c.tokens, w) for (digest, c), w in zip(corpora.items(), (2, 1), strict=True)]
    return BlendedDataset(skip(plan(None, members, L, B, 240, seed=5), 50, 57), corpora)


def _rows(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def _expected(dataset, state):
    numbers, _ = next_batch(state, B)
    return torch.from_numpy(np.stack([dataset.tokens(int(n)) for n in numbers]))


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (1, 5 - 1), (2, 3), (2, 12), (3, 4), (8, 3), (8, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(dataset, world, micro_batch):
    loaders = [Loader(dataset, dataset.order, B, micro_batch, rank, world) for rank in range(world)]
    for _ in range(10):
        expected = _expected(dataset, loaders[0].state)
        by_rank = [loader.step() for loader in loaders]
        assert {len(batches) for batches in by_rank} == {B // (micro_batch * world)}
        in_turn = [batches[a] for a in range(len(by_rank[0])) for batches in by_rank]  # pass by pass, rank by rank
        assert torch.equal(_rows(in_turn), expected[:, :-1])
        assert torch.equal(torch.cat([b["labels"] for b in in_turn]), expected[:, 1:])
        assert all(b["input_ids"].shape == (micro_batch, L) and b["input_ids"].dtype == torch.int64 for b in in_turn)
    assert {loader.state.trained_samples for loader in loaders} == {240}
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("stop", range(0, 10, 3))
def test_saving_at_any_step_and_going_on_equals_a_straight_run(dataset, stop):
    with Loader(dataset, dataset.order, B, 4, rank=1, world=2) as loader:
        straight = [_rows(loader.step()) for _ in range(10)]
    with Loader(dataset, dataset.order, B, 4, rank=1, world=2) as loader:
        for _ in range(stop):
            loader.step()
        saved = from_json(loader.state.to_json(), "here")  # read ahead or not, the state is after `stop` steps
    assert saved.trained_samples == stop * B
    with Loader(dataset, saved, B, 2, rank=0, world=1) as one, Loader(dataset, saved, B, 4, rank=1, world=2) as two:
        for step in range(stop, 10):
            whole = _rows(one.step())
            assert torch.equal(_rows(two.step()), straight[step])
            assert torch.equal(whole.view(-1, 2, 4, L)[:, 1].reshape(-1, L), straight[step])  # rank 1's share


def test_labels_are_counted_ahead_of_their_step(dataset, monkeypatch):
    fill = BlendedDataset.fill

    def masked(self, number, ids, labels):  # the sample's number decides how many labels are ignored
        fill(self, number, ids, labels)
        labels[: number % L] = IGNORED

    monkeypatch.setattr(BlendedDataset, "fill", masked)
    with Loader(dataset, dataset.order, B, 4, rank=1, world=2) as loader:
        for _ in range(10):
            before = loader.state
            ahead = loader.labels_ahead()
            assert loader.state == before
            assert ahead == sum(int((b["labels"] != IGNORED).sum()) for b in loader.step()) < 12 * L
        assert loader.labels_ahead() == 0  # beyond the planned end: the error is `step`'s
        with pytest.raises(IndexError, match="not planned"):
            loader.step()


def test_document_ids_come_only_when_asked(dataset):
    with Loader(dataset, dataset.order, B, 12, document_mask=True) as loader:
        batches = loader.step()
    expected = np.stack([dataset.document_ids(n) for n in range(B)])
    assert np.array_equal(torch.cat([b["document_ids"] for b in batches]).numpy(), expected)
    with Loader(dataset, dataset.order, B, 12) as loader:
        assert set(loader.step()[0]) == {"input_ids", "labels"}


def test_an_error_while_reading_ahead_is_raised_where_the_step_is_asked_for(dataset, corpora):
    with Loader(dataset, dataset.order, B, B) as loader:
        loader.step()
        loader.step()
    for corpus in corpora.values():
        with open(f"{corpus.prefix}.bin", "r+b") as file:
            file.truncate(2)
    with Loader(dataset, dataset.order, B, B) as loader:
        for _ in range(2):  # and again, not a hang, when asked again
            with pytest.raises(SteelError, match="cut after it was opened"):
                loader.step()
        assert loader.state == dataset.order


def test_the_end_is_an_error_only_when_a_step_beyond_it_is_asked_for(dataset):
    with Loader(dataset, dataset.order, B, B) as loader:
        for _ in range(10):
            loader.step()
        with pytest.raises(IndexError, match="not planned"):
            loader.step()


def test_closing_ends_the_thread(dataset):
    before = threading.active_count()
    loader = Loader(dataset, dataset.order, B, B)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before


def test_a_batch_that_does_not_divide_is_our_bug(dataset):
    with pytest.raises(AssertionError):
        Loader(dataset, dataset.order, B, 5)


@pytest.mark.parametrize("samples", [1, 7, 12, 13, 40])
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 3), (3, 4), (8, 1), (8, 3)])
def test_validation_counts_every_sample_once_in_equal_passes(dataset, samples, world, micro_batch):
    by_rank = [list(validation_batches(dataset, range(samples), micro_batch, r, world, True)) for r in range(world)]
    assert {len(batches) for batches in by_rank} == {-(-samples // (micro_batch * world))}
    rows = [b for a in range(len(by_rank[0])) for b in (batches[a] for batches in by_rank)]
    assert all(v.shape == (micro_batch, L) and v.dtype == torch.int64 for b in rows for v in b.values())
    labels = torch.cat([b["labels"] for b in rows])
    real = (labels != -100).all(dim=1)
    assert real.sum() == samples
    assert (labels[~real] == -100).all()
    expected = torch.from_numpy(np.stack([dataset.tokens(n) for n in range(samples)]))
    assert torch.equal(labels[real], expected[:, 1:])
    assert torch.equal(torch.cat([b["input_ids"] for b in rows])[real], expected[:, :-1])
