"""The losses over gloo processes equal those of one process on the whole batch, in value and gradient.

All cases of a process count run in one group of processes, which leave their results in files.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize

from mlip_kernels.nn.losses import ClipLoss, SigLipLoss, TokenContrastiveLoss
from mlip_kernels.nn.losses.gather import all_gather
from mlip_kernels.ops.contrastive import token_logits
from mlip_kernels.testing import assert_close, assert_identical

LOCAL = 3
SWITCHES = list(itertools.product((False, True), repeat=2))


def open_clip_loss():
    """open_clip's module of losses without the rest of open_clip, which takes seconds to import in every process."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_batch(ranks, tokens):
    """Float64 image side, text side, scale and bias, and the masks and weights of tokens, for all ranks."""
    random = torch.Generator().manual_seed(5)
    batch = ranks * LOCAL

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=random, dtype=torch.float64), dim=-1)

    ends = [torch.tensor(14.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)]
    if not tokens:
        return [unit(batch, 8), unit(batch, 8), *ends], {}
    options = {
        "image_mask": torch.rand(batch, 5, generator=random) < 0.8,
        "text_mask": torch.rand(batch, 4, generator=random) < 0.7,
        "image_weight": torch.rand(batch, 5, generator=random, dtype=torch.float64),
        "text_weight": torch.rand(batch, 4, generator=random, dtype=torch.float64),
    }
    options["text_mask"][1] = False
    return [unit(batch, 5, 8), unit(batch, 4, 8), *ends], options


def loss_and_gradients(loss, inputs, options):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    weights = {name: t.detach().clone().requires_grad_() for name, t in options.items() if t.is_floating_point()}
    value = loss(*leaves, **{**options, **weights})
    wanted = [*leaves, *weights.values()]
    return [value.detach(), *torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)]


def on_this_rank(loss, rank, tokens=False):
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    inputs, options = whole_batch(loss.world_size, tokens)
    inputs = [t[rows] if t.dim() else t for t in inputs]
    return loss_and_gradients(loss, inputs, {name: t[rows] for name, t in options.items()})


def message_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def mismatches(rank, place):
    """What is said when ranks bring different shapes; a collective afterwards shows that no rank is left behind."""
    token, clip = TokenContrastiveLoss(**place), ClipLoss(**place)
    image, text, longer = torch.zeros(LOCAL, 5, 8), torch.zeros(LOCAL, 4, 8), torch.zeros(LOCAL, 4 + rank, 8)
    mask = torch.ones(LOCAL, 4, dtype=torch.bool)
    uneven, empty = torch.zeros(LOCAL - rank, 8), torch.zeros(LOCAL * (1 - rank), 8)
    found = {
        "batch": message_of(lambda: clip(uneven, uneven, 1.0)),
        "empty batch on one rank": message_of(lambda: clip(empty, empty, 1.0)),
        "text length": message_of(lambda: token(image, longer, 1.0)),
        "mask": message_of(lambda: token(image, text, 1.0, text_mask=mask if rank else None)),
        "rank": message_of(lambda: ClipLoss(rank=1 - rank, world_size=2)(image[0], image[0], 1.0)),
    }
    assert token(image, text, 1.0).isfinite()
    return found


def with_ddp(rank, place):
    """Gradients of a model under DDP."""
    model = torch.nn.parallel.DistributedDataParallel(tower())
    (image, text, *ends), options = whole_batch(place["world_size"], tokens=True)
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    loss = TokenContrastiveLoss(**place)
    loss(*model(image[rows], text[rows]), *ends, **{name: t[rows] for name, t in options.items()}).backward()
    return [p.grad for p in model.parameters()]


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)

    def forward(self, image, text):
        return normalize(self.image(image), dim=-1), normalize(self.text(text), dim=-1)


def tower():
    torch.manual_seed(0)
    return Tower().double()


def one_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    place = {"rank": rank, "world_size": ranks}
    results = {"token": on_this_rank(TokenContrastiveLoss(**place), rank, tokens=True)}
    if ranks == 4:
        results["half"] = half_precision_gather(rank)
    if ranks == 2:
        theirs = open_clip_loss()
        for local, grad in SWITCHES:
            switches = {"local_loss": local, "gather_with_grad": grad, **place}
            results["clip", local, grad] = on_this_rank(ClipLoss(**switches), rank)
            results["open_clip", local, grad] = on_this_rank(theirs.ClipLoss(**switches), rank)
        results["siglip"] = on_this_rank(SigLipLoss(**place), rank)
        for exchange in ("bidir", "gather"):
            results["open_clip siglip", exchange] = on_this_rank(theirs.SigLipLoss(**place, dist_impl=exchange), rank)
        results["token whole"] = on_this_rank(TokenContrastiveLoss(local_loss=False, **place), rank, tokens=True)
        without = TokenContrastiveLoss(gather_with_grad=False, **place)
        results["token without"] = on_this_rank(without, rank, tokens=True)
        results["mismatches"] = mismatches(rank, place)
        results["ddp"] = with_ddp(rank, place)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def half_precision_gather(rank):
    """A bfloat16 row a rank, gathered, and its gradient: in each column one rank's part is 1, the others move no 1."""
    x = torch.full((1, 4), 1.0 + rank, dtype=torch.bfloat16, requires_grad=True)
    gathered = all_gather(x)
    parts = torch.full((4, 4), 1 / 256, dtype=torch.bfloat16).fill_diagonal_(1)
    (gradient,) = torch.autograd.grad((gathered * parts[rank]).sum(), x)
    return [gathered.detach(), gradient]


def run(ranks, folder):
    torch.multiprocessing.spawn(one_rank, (ranks, str(folder)), ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("parity needs open_clip_torch")
    return run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run(4, tmp_path_factory.mktemp("four"))


def mean_over_ranks(found):
    """Mean loss, then gradients as DDP averages them: rows of the batch stay with their rank, numbers are shared."""
    losses, *leaves = zip(*found, strict=True)
    gradients = [torch.cat(g) / len(g) if g[0].dim() else torch.stack(g).mean() for g in leaves]
    return [torch.stack(losses).mean(), *gradients]


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        # Added to 1, because the gradient of the bias of a softmax is 0 but for rounding.
        assert_close(one + 1, other + 1)


def single_process(loss, ranks, tokens=False):
    return loss_and_gradients(loss, *whole_batch(ranks, tokens))


def test_token_loss_of_two_ranks_is_that_of_one_process(two_ranks):
    expected = single_process(TokenContrastiveLoss(), 2, tokens=True)
    assert_all_close(mean_over_ranks([r["token"] for r in two_ranks]), expected)
    assert float(two_ranks[0]["token"][0]) != float(two_ranks[1]["token"][0])


def test_token_loss_of_four_ranks_is_that_of_one_process(four_ranks):
    expected = single_process(TokenContrastiveLoss(), 4, tokens=True)
    assert_all_close(mean_over_ranks([r["token"] for r in four_ranks]), expected)


def test_token_loss_can_be_the_same_number_on_every_rank(two_ranks):
    expected = single_process(TokenContrastiveLoss(), 2, tokens=True)
    found = [r["token whole"] for r in two_ranks]
    for one in found:
        assert_close(one[0], expected[0])
    assert_all_close(mean_over_ranks(found), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_token_loss_without_gathered_gradients_sees_only_what_its_rank_computed(two_ranks, rank):
    rows, others = slice(rank * LOCAL, (rank + 1) * LOCAL), slice((1 - rank) * LOCAL, (2 - rank) * LOCAL)

    def expected(image, text, scale, bias, **options):
        own = torch.zeros(2 * LOCAL, dtype=torch.bool)
        own[rows] = True

        def constant_elsewhere(value):
            return torch.where(own.view(-1, *[1] * (value.dim() - 1)), value, value.detach())

        options["text_weight"] = constant_elsewhere(options["text_weight"])
        per_image, per_text = token_logits(image, constant_elsewhere(text), scale=scale, bias=bias, **options)
        per_text = per_text[rows].clone()
        per_text[:, others] = per_text[:, others].detach()
        labels = torch.arange(rows.start, rows.stop)
        return (cross_entropy(per_image[rows], labels) + cross_entropy(per_text, labels)) / 2

    value, *leaves = loss_and_gradients(expected, *whole_batch(2, tokens=True))
    assert_all_close(two_ranks[rank]["token without"], [value, *(g[rows] if g.dim() else g for g in leaves)])


def test_token_loss_under_ddp_has_the_gradients_of_one_process(two_ranks):
    (image, text, *ends), options = whole_batch(2, tokens=True)
    model = tower()
    TokenContrastiveLoss()(*model(image, text), *ends, **options).backward()
    for rank in two_ranks:
        assert_all_close(rank["ddp"], [p.grad for p in model.parameters()])


@pytest.mark.parametrize(("local", "grad"), SWITCHES)
def test_clip_loss_is_that_of_open_clip_on_every_rank(two_ranks, local, grad):
    for rank in two_ranks:
        assert_all_close(rank["clip", local, grad], rank["open_clip", local, grad])


@pytest.mark.parametrize("local", [False, True])
def test_clip_loss_with_gathered_gradients_is_that_of_one_process(two_ranks, local):
    expected = single_process(ClipLoss(), 2)
    assert_all_close(mean_over_ranks([r["clip", local, True] for r in two_ranks]), expected)


@pytest.mark.parametrize("exchange", ["bidir", "gather"])
def test_siglip_loss_is_that_of_open_clip_on_every_rank(two_ranks, exchange):
    for rank in two_ranks:
        assert_all_close(rank["siglip"], rank["open_clip siglip", exchange])


def test_siglip_loss_of_two_ranks_is_that_of_one_process(two_ranks):
    assert_all_close(mean_over_ranks([r["siglip"] for r in two_ranks]), single_process(SigLipLoss(), 2))


def test_gathered_gradients_of_half_precision_are_added_in_float32(four_ranks):
    for rank in four_ranks:
        gathered, gradient = rank["half"]
        assert_identical(gathered[:, 0], torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16))
        assert_identical(gradient, torch.full((1, 4), 1 + 3 / 256).bfloat16())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("batch", "local batch size: expected the same on every rank, got [3, 2] by rank"),
        ("empty batch on one rank", "local batch size: expected the same on every rank, got [3, 0] by rank"),
        ("text length", "text tokens M: expected the same on every rank, got [4, 5] by rank"),
        ("mask", "text_mask given: expected the same on every rank, got [0, 1] by rank"),
        ("rank", "(those of the process group), got"),
    ],
)
def test_ranks_that_differ_are_told_so_everywhere(two_ranks, case, said):
    for rank in two_ranks:
        assert said in rank["mismatches"][case]
