"""A sample is its tokens of the stream, and its document ids count the cuts inside it."""

import numpy as np
import pytest

from megatron_steel.data.dataset import BlendedDataset
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.segments import Member, plan
from megatron_steel.errors import SteelError

L = 16


def _write(prefix, lengths, dtype, first=0):
    """Documents of these lengths; token ids count upwards, so that a token tells its position."""
    ids = np.arange(first, first + sum(lengths))
    with IndexedWriter(prefix, dtype) as writer:
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            writer.add_document(document)
    return IndexedDataset(prefix)


@pytest.fixture
def corpora(tmp_path):
    rng = np.random.default_rng(0)
    return {
        "aa": _write(tmp_path / "a", rng.integers(1, 40, 30).tolist(), np.uint16),
        "bb": _write(tmp_path / "b", [3, 0, 0, 50, 1, 1, 300, 0, 7, 200], np.int32, first=100_000),
    }


def _blend(corpora, wanted=100):
    members = [Member(c.prefix, digest, c.tokens) for digest, c in corpora.items()]
    return BlendedDataset(plan(None, members, L, 4, wanted, seed=7), corpora)


def test_tokens_are_the_stream_at_the_samples_place(corpora):
    dataset = _blend(corpora)
    for sample in range(100):
        place = dataset.order.locate(sample)
        tokens = dataset.tokens(sample)
        first = place.start + (100_000 if place.digest == "bb" else 0)
        assert tokens.dtype == np.int64
        assert np.array_equal(tokens, np.arange(first, first + L + 1))


def test_one_epoch_predicts_every_token_of_its_blocks_once(corpora):
    dataset = _blend({"bb": corpora["bb"]})
    n = dataset.order.segments[0].samples
    predicted = np.sort(np.concatenate([dataset.tokens(i)[1:] for i in range(n)]))
    assert np.array_equal(predicted, np.arange(predicted[0], predicted[0] + n * L))


def test_document_ids_count_the_documents_inside_a_sample(corpora):
    dataset = _blend(corpora)
    for sample in range(100):
        place, ids = dataset.order.locate(sample), dataset.document_ids(sample)
        corpus = corpora[place.digest]
        documents = [corpus.document_of(place.start + t) for t in range(L)]
        assert ids.dtype == np.int64
        assert ids.tolist() == np.unique(documents, return_inverse=True)[1].tolist()  # numbered from 0, none left out


def test_a_cut_lies_between_the_last_token_of_a_document_and_the_first_of_the_next(tmp_path):
    dataset = _blend({"aa": _write(tmp_path / "a", [L] * 10, np.uint16)})
    for sample in range(8):
        tokens, ids = dataset.tokens(sample), dataset.document_ids(sample)
        assert ids.tolist() == (tokens[:-1] // L - tokens[0] // L).tolist()


def test_a_data_set_that_is_not_open_is_named(corpora):
    with pytest.raises(SteelError, match=r"not open.*bb"):
        BlendedDataset(_blend(corpora).order, {"aa": corpora["aa"]})


def test_data_that_is_not_what_was_planned_is_refused(corpora, tmp_path):
    order = _blend(corpora).order
    shorter = _write(tmp_path / "c", [50], np.uint16)
    with pytest.raises(SteelError, match=r"50 tokens.*planned with"):
        BlendedDataset(order, {**corpora, "aa": shorter})


def test_a_data_set_that_only_past_samples_drew_need_not_be_there(corpora):
    old = _blend(corpora).order
    later = plan(
        type(old)(old.seed, old.segments, (), 20), [Member("a", "aa", corpora["aa"].tokens)], L, 4, 100, seed=7
    )
    dataset = BlendedDataset(later, {"aa": corpora["aa"]})
    assert dataset.tokens(20).shape == (L + 1,)
    assert "bb" in {later.locate(i).digest for i in range(20)}
