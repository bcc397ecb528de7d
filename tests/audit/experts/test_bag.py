"""Bags of tokens out of the sums of embedding and head."""

from __future__ import annotations

import torch
from push_world import small_reader, texts

from coterie.audit.experts.bag import BagReader, table_names, table_sums
from coterie.audit.metrics import bag_f1
from coterie.models.zoo.tiny import VOCAB

LENGTH = 10


def test_an_untied_embeddings_sum_names_every_token_that_occurs() -> None:
    reader = small_reader("qwen3_moe", tie_word_embeddings=False)
    names = table_names(reader.model)
    assert len(names) == 2
    embedding = [name for name in names if "embed" in name]
    learned = BagReader(reader, texts(60, LENGTH, VOCAB, 1), 3, embedding, pushes=8)
    private = texts(3, LENGTH, VOCAB, 2)
    bag = learned.read({name: table_sums(reader, private)[name] for name in embedding})
    # The last token of a record enters, but nothing is predicted from it: its row gets no gradient.
    seen = {token for record in private for token in record[:-1]}
    assert {int(v) for v in bag.counts_V.nonzero()} == seen


def test_a_tied_table_tells_more_than_the_usual_text_does() -> None:
    reader = small_reader("qwen3_moe", tie_word_embeddings=True)
    names = table_names(reader.model)
    assert len(names) == 1
    learned = BagReader(reader, texts(60, LENGTH, VOCAB, 1), 3, names, pushes=8)
    private = texts(3, LENGTH, VOCAB, 2)
    bag, usual = learned.read(table_sums(reader, private)), learned.usual()
    truth = [token for record in private for token in record]
    found = bag_f1(truth, torch.arange(VOCAB).repeat_interleave(bag.counts_V).tolist())
    assert found > 0.85
    assert found > bag_f1(truth, torch.arange(VOCAB).repeat_interleave(usual.counts_V).tolist()) + 0.3


def test_table_sums_add_up_over_records() -> None:
    reader = small_reader()
    private = texts(4, LENGTH, VOCAB, 2)
    whole = table_sums(reader, private, torch.tensor([1.0, 2.0, 0.0, 1.0]))
    parts = [table_sums(reader, [record]) for record in private]
    for name, value in whole.items():
        expected = parts[0][name] + 2 * parts[1][name] + parts[3][name]
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    assert not any(param.requires_grad for param in reader.model.parameters())
