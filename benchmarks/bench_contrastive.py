"""Contrastive family: token logits in both directions against plain PyTorch, the peers, and the bare matrix product;
the cross-entropy of pairs against PyTorch's, twice, and the bandwidth.

The product of the tokens (``torch.mm`` of the same flops, its result kept in memory) is no bound, but what everybody
who computes these logits pays at least once. Peers fuse one direction for retrieval and are called twice; they are
optional, and what kept one from running stands in ``extra_info``. The allocator keeps its pages (`conftest.allocator`):
gradients of a few megabytes would else be paid for in page faults, whoever computes them.
"""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, seconds
from torch.nn.functional import cross_entropy, normalize

from mlip_kernels import pair_cross_entropy, token_logits, use_reference

BATCH, IMAGE_TOKENS = 64, 49
SIZES = [pytest.param(t, d, id=f"{t} tokens of {d}") for t in (32, 77) for d in (256, 512)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "backward", "forward + backward")
SCALE = 14.0
MIB = 2**20


@pytest.fixture(autouse=True)
def compiled_afresh():
    """Every case compiles functions of its own; their number would run into the limit of recompilations.

    A backward that is timed again and again must not give its buffers away.
    """
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def tokens(batch, count, channels, dtype):
    return normalize(torch.randn(batch, count, channels, device=DEVICE), dim=-1).to(dtype)


def ours(images, texts):
    return token_logits(images, texts)


def written_in_pytorch(images, texts):
    """What one would write: every similarity at once."""
    similarity = torch.einsum("bnd,cmd->bcnm", images, texts)
    return similarity.max(3).values.mean(2), similarity.max(2).values.mean(2).t()


def reference(images, texts):
    with use_reference():
        return token_logits(images, texts)


def late_interaction_kernels(images, texts):
    from late_interaction_kernels import MaxSimScorer

    scorer = MaxSimScorer()
    return scorer(images, texts) / images.shape[1], scorer(texts, images) / texts.shape[1]


def flash_maxsim(images, texts):
    from flash_maxsim import flash_maxsim_batched_train as scores

    return scores(images, texts) / images.shape[1], scores(texts, images) / texts.shape[1]


def loss(logits):
    labels = torch.arange(len(logits[0]), device=DEVICE)
    return sum(cross_entropy(SCALE * one.float(), labels) for one in logits) / 2


def in_mode(function, mode, images, texts):
    """What is timed: the logits without gradients, the gradients of logits at hand, or a loss with its gradients."""
    if mode == "forward":
        images, texts = images.detach(), texts.detach()

        def forward():
            with torch.no_grad():
                return function(images, texts)

        return forward
    leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
    if mode == "forward + backward":
        return lambda: torch.autograd.grad(loss(function(*leaves)), leaves)
    logits = function(*leaves)
    gradients = [torch.randn_like(one) for one in logits]
    return lambda: torch.autograd.grad(logits, leaves, gradients, retain_graph=True)


def peers(mode, images, texts, notes):
    """The peers that are installed and run here."""
    found = {}
    for name, function in {
        "late-interaction-kernels": late_interaction_kernels,
        "flash-maxsim": flash_maxsim,
    }.items():
        try:
            run = in_mode(function, mode, images, texts)
            run()
        except (ImportError, RuntimeError) as failure:
            notes[f"{name} does not run"] = f"{type(failure).__name__}: {failure}"
        else:
            found[name] = run
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("text_tokens", "channels"), SIZES)
@pytest.mark.parametrize("allocator", ["tuned"], indirect=True)
def test_token_logits(benchmark, ratios, allocator, text_tokens, channels, dtype, mode):
    benchmark.group = f"token_logits {BATCH}x{BATCH}, {text_tokens} tokens of {channels}, {dtype}, {mode}"
    images = tokens(BATCH, IMAGE_TOKENS, channels, DTYPES[dtype])
    texts = tokens(BATCH, text_tokens, channels, DTYPES[dtype])
    rows, columns = images.flatten(0, 1), texts.flatten(0, 1).t()
    similarity = rows @ columns
    functions = {"matrix product": lambda: torch.mm(rows, columns, out=similarity)}
    plain = {"written in PyTorch": written_in_pytorch, "compiled": torch.compile(written_in_pytorch, dynamic=False)}
    if mode != "backward":
        plain |= {"eager reference": reference}
        functions |= peers(mode, images, texts, benchmark.extra_info)
    functions |= {name: in_mode(function, mode, images, texts) for name, function in plain.items()}
    ratios(in_mode(ours, mode, images, texts), functions, rounds=7)


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("allocator", ["tuned"], indirect=True)
def test_padded_captions(benchmark, ratios, allocator, dtype, mode):
    """Captions of 10 to 25 tokens padded to 77, and the same without a mask."""
    benchmark.group = f"token_logits of padded captions, {dtype}, {mode}"
    images, texts = tokens(BATCH, IMAGE_TOKENS, 512, DTYPES[dtype]), tokens(BATCH, 77, 512, DTYPES[dtype])
    mask = torch.arange(77, device=DEVICE) < torch.randint(10, 26, (BATCH, 1), device=DEVICE)

    def masked(images, texts):
        return token_logits(images, texts, text_mask=mask)

    def reference_masked(images, texts):
        with use_reference():
            return masked(images, texts)

    functions = {
        "without a mask": in_mode(ours, mode, images, texts),
        "eager reference": in_mode(reference_masked, mode, images, texts),
    }
    ratios(in_mode(masked, mode, images, texts), functions, rounds=7)


def two_cross_entropies(logits):
    """What open_clip computes."""
    labels = torch.arange(len(logits), device=DEVICE)
    return (cross_entropy(logits, labels) + cross_entropy(logits.t(), labels)) / 2


def bandwidth_bound(logits, backward):
    """What cannot be avoided: the logits read once, and for the gradient once more, and as much written."""
    words = logits.flatten().view(torch.float32)
    out = torch.empty_like(words)

    def run():
        words.sum()
        if backward:
            out.copy_(words)

    return run


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [256, 1024, 4096])
@pytest.mark.parametrize("allocator", ["tuned"], indirect=True)
def test_pair_cross_entropy(benchmark, ratios, allocator, batch, dtype, mode):
    """Logits of a model in training: normalized features, the pairs nearer than the rest."""
    benchmark.group = f"pair_cross_entropy {batch}x{batch}, {dtype}, {mode}"
    features = torch.randn(batch, 512, device=DEVICE)
    others = normalize(features + 2 * torch.randn_like(features), dim=-1)
    logits = (SCALE * normalize(features, dim=-1) @ others.t()).to(DTYPES[dtype])

    def in_mode(function):
        if mode == "forward":
            return lambda: function(logits)
        leaf = logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf), leaf)

    functions = {"two cross-entropies": two_cross_entropies}
    functions["compiled"] = torch.compile(two_cross_entropies, dynamic=False)
    runs = {name: in_mode(function) for name, function in functions.items()}
    runs["bandwidth bound"] = bandwidth_bound(logits, mode != "forward")
    ratios(in_mode(pair_cross_entropy), runs, rounds=7)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_memory(function) -> int:
    """Bytes by which memory grows at most while ``function`` runs."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists() or platform.libc_ver()[0] != "glibc":
        pytest.skip(
            "needs Linux, which tells the peak of a process and resets it, and glibc, which returns what is free"
        )
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.mark.parametrize("batch", [128, 512])
def test_peak_memory_of_training(benchmark, batch):
    """Forward and backward of 49 x 77 tokens of 256 channels, float32; plain PyTorch only where it fits any machine."""
    benchmark.group = f"token_logits, peak memory, batch {batch}"
    images, texts = tokens(batch, IMAGE_TOKENS, 256, torch.float32), tokens(batch, 77, 256, torch.float32)
    functions = {"ours": ours}
    if batch <= 128:
        functions |= {"written in PyTorch": written_in_pytorch, "eager reference": reference}
    for name, function in functions.items():
        run = in_mode(function, "forward + backward", images, texts)
        benchmark.extra_info[f"{name}, MiB"] = round(peak_memory(run) / MIB)
    benchmark.extra_info["all similarities, MiB"] = round(batch**2 * IMAGE_TOKENS * 77 * 4 / MIB)
    run = in_mode(ours, "forward + backward", images, texts)
    benchmark.pedantic(lambda: seconds(run, 1), rounds=1, warmup_rounds=0)
