"""Guides rank tokens as their definitions say."""

import torch

from mlip_kernels.nn.guidance import class_attention, rank, similarity_to_pooled
from mlip_kernels.testing import assert_close, assert_identical


def test_rank_spreads_over_zero_to_one_and_breaks_ties_by_index():
    assert_identical(rank(torch.tensor([[3.0, 1.0, 2.0]])), torch.tensor([[1.0, 0.0, 0.5]]))
    assert_identical(rank(torch.zeros(1, 3)), torch.tensor([[0.0, 0.5, 1.0]]))
    assert_identical(rank(torch.ones(2, 1)), torch.zeros(2, 1))


def test_class_attention_is_the_first_row_of_the_attention_matrix():
    query, keys = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    size = torch.randint(1, 5, (2, 5)).double()
    logits = query @ keys.transpose(-1, -2) / 8**0.5 + size.log()[:, None, None]
    expected = logits.softmax(-1)[:, :, 0].mean(1)
    assert_close(class_attention(query[:, :, 0], keys, size), expected.float())


def test_similarity_is_the_cosine_and_zero_vectors_have_none():
    tokens, pooled = torch.randn(2, 4, 6), torch.randn(2, 6)
    tokens[0, 0] = 0
    expected = torch.cosine_similarity(tokens.double(), pooled.double()[:, None], dim=-1)
    assert_close(similarity_to_pooled(tokens, pooled), expected)
    assert similarity_to_pooled(tokens, pooled)[0, 0] == 0


def test_guides_carry_no_gradient():
    tokens = torch.randn(1, 4, 6, requires_grad=True)
    assert not similarity_to_pooled(tokens, tokens.mean(1)).requires_grad
