"""A configuration is checked when it is made, and each error names its field."""

import dataclasses

import pytest

from mlip_kernels.models import FrequencyConfig, ImageConfig, LossConfig, MergingConfig, MLIPConfig, TextConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(patch_size=15), r"ImageConfig.patch_size: expected a divisor of image_size=224, got 15"),
        (lambda: ImageConfig(heads=5), r"ImageConfig.heads: expected a divisor of width=768, got 5"),
        (lambda: ImageConfig(pool="max"), r"ImageConfig.pool: expected one of 'token', 'avg', got 'max'"),
        (lambda: ImageConfig(depth=0), r"ImageConfig.depth: expected an integer >= 1, got 0"),
        (lambda: TextConfig(heads=7), r"TextConfig.heads: expected a divisor of width=512, got 7"),
        (lambda: FrequencyConfig(mixer="fft"), r"FrequencyConfig.mixer: expected one of"),
        (lambda: FrequencyConfig(mixer="complex_mlp", basis="dct"), r"FrequencyConfig.basis: expected 'rfft'"),
        (lambda: FrequencyConfig(order="sequential", fusion="residual"), r"FrequencyConfig.fusion: expected 'none'"),
        (lambda: MergingConfig(keep_rate=0.3), r"MergingConfig.keep_rate: expected .* \[0.5, 1.0\], got 0.3"),
        (lambda: MergingConfig(layers=(4, 2)), r"MergingConfig.layers: expected rising block numbers"),
        (lambda: MergingConfig(shares=(0.8, 0.3)), r"MergingConfig.shares: expected two shares"),
        (lambda: MergingConfig(guide_weight=-1.0), r"MergingConfig.guide_weight"),
        (lambda: LossConfig(token_weight=-0.5), r"LossConfig.token_weight"),
        (lambda: MLIPConfig(merging=MergingConfig(layers=(3, 12))), r"expected blocks in \[0, 11\] .*, got \(3, 12\)"),
        (
            lambda: MLIPConfig(loss=LossConfig(frequency_weight=0.0, token_weight=0.0)),
            r"MergingConfig.frequency_guide: 'similarity' needs a trained Frequency Stage",
        ),
        (
            lambda: MLIPConfig(merging=MergingConfig(granularity="three_way", guide="none")),
            r"MergingConfig.guide: expected a guide",
        ),
        (
            lambda: MLIPConfig(
                frequency=FrequencyConfig(text_transform="rfft"), loss=LossConfig(token_domains="union")
            ),
            r"LossConfig.token_domains: 'union'",
        ),
    ],
)
def test_a_bad_field_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_field_of_the_wrong_kind_is_named():
    with pytest.raises(TypeError, match=r"ImageConfig.width: expected an integer, got float"):
        ImageConfig(width=1.5)


def test_unknown_fields_of_a_stored_configuration_are_named():
    stored = MLIPConfig().to_dict()
    stored["merging"]["keeprate"] = 0.5
    with pytest.raises(ValueError, match=r"MLIPConfig.merging: unknown field keeprate"):
        MLIPConfig.from_dict(stored)


def test_a_configuration_comes_back_from_plain_values():
    config = dataclasses.replace(MLIPConfig(), merging=MergingConfig(layers=(1, 5), shares=(0.4, 0.4)))
    assert MLIPConfig.from_dict(config.to_dict()) == config
