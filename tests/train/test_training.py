"""A run learns, logs, stops and continues as its configuration says."""

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mlip_kernels.data import open_data
from mlip_kernels.testing import assert_close, assert_identical
from mlip_kernels.train import checkpoint, logs, loop, train
from mlip_kernels.train.__main__ import summary
from mlip_kernels.train.report import write_report


def weights(output: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.checkpoints(Path(output) / "checkpoints")[-1])["model"]


def assert_same_weights(one: str, other: str) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_identical(second[name], value, name=name)


def losses(output: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value in logs.read(Path(output) / "metrics.csv") if name == "loss"]


def test_a_run_lowers_its_loss_and_draws_its_report(tiny):
    config = dataclasses.replace(tiny, steps=30, precision="float32")
    outcome = train(config)
    first, *_, last = (value for _, value in losses(config.output))
    assert last < first
    assert outcome.steps == 30
    assert outcome.pairs_per_second > 0
    assert outcome.retrieval.similarity.shape == (12, 12)
    report = write_report(outcome, config)
    assert report.read_bytes().startswith(b"\x89PNG")


def test_equal_runs_are_equal_bit_for_bit_and_seeds_differ(tiny, tmp_path):
    again = dataclasses.replace(tiny, output=str(tmp_path / "again"))
    other = dataclasses.replace(tiny, output=str(tmp_path / "other"), seed=1)
    for config in (tiny, again, other):
        train(config)
    assert_same_weights(tiny.output, again.output)
    with pytest.raises(AssertionError):
        assert_same_weights(tiny.output, other.output)


def test_epochs_count_in_steps(tiny):
    batches = (48 - 12) // 6
    outcome = train(dataclasses.replace(tiny, epochs=2, accumulate=3))
    assert outcome.steps == outcome.planned == 2 * batches // 3
    resumed = train(dataclasses.replace(tiny, epochs=3, accumulate=3, resume=True))
    assert resumed.steps == 3 * batches // 3
    with pytest.raises(ValueError, match="epochs: expected at least accumulate=7 micro-batches, got 1 epochs of 6"):
        train(dataclasses.replace(tiny, epochs=1, accumulate=7, overwrite=True))


def test_a_compiled_run_trains_the_same_model(tiny, tmp_path):
    image = dataclasses.replace(tiny.model.image, drop_path=0.0)  # random numbers are drawn otherwise when compiled
    plain = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, image=image), precision="float32", steps=2)
    compiled = dataclasses.replace(plain, torchcompile=True, output=str(tmp_path / "compiled"))
    for config in (plain, compiled):
        train(config)
    both = [torch.tensor([value for _, value in losses(c.output)]) for c in (plain, compiled)]
    assert_close(*both, roundings=64)
    assert train(dataclasses.replace(compiled, torchcompile=False, resume=True, steps=3)).steps == 3


def test_class_folders_are_classified_in_the_end(tiny, tmp_path):
    folder = tmp_path / "classes"
    for name, colour in {"red": (255, 0, 0), "green": (0, 255, 0)}.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / name / "0.png")
    config = dataclasses.replace(tiny, steps=2, evaluate_every=1, zeroshot=str(folder))
    outcome = train(config)
    assert outcome.zeroshot["zeroshot_top5"] == 1.0
    assert "zero-shot classification, top1: " in summary(outcome)
    rows = [row for row in logs.read(Path(config.output) / "metrics.csv") if row[1].startswith("zeroshot")]
    names = ("zeroshot_top1", "zeroshot_top5")
    assert [row[:2] for row in rows] == [(step, name) for step in (1, 2) for name in names]


def test_a_stopped_run_continues_bit_for_bit(tiny, tmp_path, monkeypatch):
    train(tiny)
    stopped = dataclasses.replace(tiny, output=str(tmp_path / "stopped"))
    optimise, steps = loop.Run._optimise, []

    def interrupt(run, batches):
        steps.append(run.step)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_optimise", interrupt)
        assert train(stopped).steps == 5
    assert steps == [0, 1, 2, 3, 4]
    outcome = train(dataclasses.replace(stopped, resume=True))
    assert outcome.steps == 8
    assert_same_weights(tiny.output, stopped.output)
    # The stop itself added a row, that of step 5.
    assert [row for row in losses(stopped.output) if row[0] != 5] == losses(tiny.output)


def test_several_processes_ask_each_other_to_stop_now_and_then():
    def stops(step, world_size):
        place = SimpleNamespace(world_size=world_size, any=lambda interrupted: interrupted)
        config = SimpleNamespace(log_every=25)
        return loop.Run._stop_requested(SimpleNamespace(place=place, config=config, step=step, interrupted=True))

    assert [step for step in range(1, 32) if stops(step, world_size=2)] == [10, 20, 25, 30]
    assert all(stops(step, world_size=1) for step in range(1, 32))


def test_rows_that_a_lost_run_logged_after_its_checkpoint_are_written_anew(tiny):
    train(tiny)
    expected = losses(tiny.output)
    checkpoint.checkpoints(Path(tiny.output) / "checkpoints")[-1].unlink()
    train(dataclasses.replace(tiny, resume=True))
    assert losses(tiny.output) == expected


def test_gradient_checkpointing_changes_memory_only(tiny, tmp_path):
    plain = dataclasses.replace(tiny, precision="float32", steps=2)
    recomputed = dataclasses.replace(plain, gradient_checkpointing=True, output=str(tmp_path / "recomputed"))
    for config in (plain, recomputed):
        train(config)
    assert_same_weights(plain.output, recomputed.output)


@pytest.mark.parametrize(("steps", "roundings"), [(1, 8), (2, 64)])  # Adam enlarges roundings of small gradients
def test_reference_and_fused_operators_agree(tiny, tmp_path, steps, roundings):
    fused = dataclasses.replace(tiny, precision="float32", steps=steps)
    reference = dataclasses.replace(fused, operators="reference", output=str(tmp_path / "reference"))
    for config in (fused, reference):
        train(config)
    both = [torch.tensor([value for _, value in losses(c.output)]) for c in (fused, reference)]
    assert_close(*both, roundings=roundings)  # 64 are a relative 8e-6


def test_accumulated_micro_batches_are_one_contrastive_batch(tiny):
    """Loss and gradients, those of the logit scales too, are those of one batch of all pairs (float64 in float32)."""
    image = dataclasses.replace(tiny.model.image, drop_path=0.0)  # which draws for every image of a forward pass
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, image=image),
        precision="float32",
        clip_gradients=0.0,
        learning_rate=0.0,
    )
    images, text = torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.randint(1, 99, (12, 10))
    text[:, 5] = 49407

    def step(micro_batches):
        run = loop.Run(
            dataclasses.replace(config, accumulate=micro_batches),
            loop.Processes(0, 1, torch.device("cpu")),
            open_data(config.data_config()),
        )
        run.model.double()
        parts = [
            loop.Batch(*part, [""]) for part in zip(images.chunk(micro_batches), text.chunk(micro_batches), strict=True)
        ]
        terms, norm = run._optimise(iter(parts))
        return terms, norm, {name: parameter.grad for name, parameter in run.model.named_parameters()}

    expected_terms, expected_norm, expected = step(1)
    terms, norm, gradients = step(3)
    for name, value in expected_terms.items():
        assert_close(terms[name].float(), value.float(), name=name)
    assert_close(norm.float(), expected_norm.float())
    for name, value in expected.items():
        assert_close(gradients[name].float(), value.float(), name=name)


def test_accumulation_repeats_random_numbers(tiny):
    """With drop path, which draws for every image, the gradients still belong to the features of the loss."""
    run = loop.Run(
        dataclasses.replace(tiny, accumulate=2),
        loop.Processes(0, 1, torch.device("cpu")),
        open_data(tiny.data_config()),
    )
    seen: list[torch.Tensor] = []
    run.model.visual.register_forward_hook(lambda _module, _inputs, output: seen.append(output.feature.detach()))
    run._optimise(run._micro_batches(0))
    first, last, again = seen
    assert_identical(again, first)
    assert not torch.equal(first, last)


@pytest.mark.parametrize(("poisoned", "left"), [(2, []), (3, ["step-00000003.pt"])], ids=["save due", "log due"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny, monkeypatch, poisoned, left):
    optimise = loop.Run._optimise

    def poison(run, batches):
        if run.step == poisoned:
            run.model.logit_scale.data.fill_(torch.nan)
        return optimise(run, batches)

    monkeypatch.setattr(loop.Run, "_optimise", poison)
    with pytest.raises(FloatingPointError, match=f"step {poisoned + 1}"):
        train(tiny)
    assert [path.name for path in checkpoint.checkpoints(Path(tiny.output) / "checkpoints")] == left


@pytest.mark.parametrize(
    ("options", "moment"),
    [({}, "gradient_norm: not finite"), ({"clip_gradients": 0.0}, "not finite")],
    ids=["clipped", "not clipped"],
)
def test_a_gradient_that_is_not_finite_is_never_saved(tiny, monkeypatch, options, moment):
    """In the very step of a checkpoint, whose loss is still finite; a lower rate then continues from before."""
    optimise = loop.Run._optimise

    def poison(run, batches):
        if run.step != 5:
            return optimise(run, batches)
        hook = run.model.logit_scale.register_hook(lambda gradient: gradient * torch.nan)
        try:
            return optimise(run, batches)
        finally:
            hook.remove()

    config = dataclasses.replace(tiny, **options)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_optimise", poison)
        with pytest.raises(
            FloatingPointError, match=rf"{moment} after step 6; .*step-00000003\.pt is from before, and --resume"
        ):
            train(config)
    (saved,) = checkpoint.checkpoints(Path(tiny.output) / "checkpoints")
    assert saved.name == "step-00000003.pt"
    assert train(dataclasses.replace(config, resume=True, learning_rate=1e-4)).steps == 8


def test_a_moment_that_is_not_finite_is_never_saved(tiny):
    """A finite gradient whose square overflows freezes its parameter: every number that shows is finite."""
    run = loop.Run(tiny, loop.Processes(0, 1, torch.device("cpu")), open_data(tiny.data_config()))
    run._optimise(run._micro_batches(0))
    run._require_finite_state()
    run.optimizer.state[run.model.logit_scale]["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"exp_avg_sq of logit_scale: .* no checkpoint had been saved"):
        run._require_finite_state()


def test_an_earlier_run_is_not_overwritten_unasked(tiny):
    train(dataclasses.replace(tiny, steps=1))
    with pytest.raises(ValueError, match=r"output: .* --resume .* --overwrite"):
        train(tiny)
    assert train(dataclasses.replace(tiny, overwrite=True)).steps == 8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size: expected an integer >= 1, got 0"),
        ("learning_rate", float("nan"), "learning_rate"),
        ("precision", "float16", "precision: expected one of 'auto', 'bfloat16', 'float32', got 'float16'"),
        ("data", "pairs.xlsx", "data: expected"),
        ("device", "tpu", "device"),
    ],
)
def test_a_bad_option_is_named(tiny, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny, **{field: value})


def test_a_missing_file_is_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        train(dataclasses.replace(tiny, data=str(tmp_path / "absent.csv")))
