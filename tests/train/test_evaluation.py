"""Recall by hand."""

import pytest
import torch

from mlip_kernels.train.evaluation import recall


def test_recall_counts_the_own_caption_among_the_nearest():
    similarity = torch.tensor([[0.9, 0.7, 0.8], [0.8, 0.3, 0.1], [0.1, 0.2, 0.5]])
    found = recall(similarity)
    assert found["image_to_text@1"] == pytest.approx(2 / 3)
    assert found["text_to_image@1"] == pytest.approx(1 / 3)
    assert found["image_to_text@5"] == found["text_to_image@5"] == 1.0


def test_equal_features_find_nothing_at_rank_one():
    assert recall(torch.ones(20, 20))["image_to_text@1"] == 0.0
    assert recall(torch.ones(20, 20))["text_to_image@10"] == 0.0
