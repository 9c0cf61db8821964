"""What the processes of the distributed tests compute: every case of a process count, left in a file per rank."""

import importlib.util
import itertools
import multiprocessing
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from mlip_kernels._operator import reference_requested, use_reference
from mlip_kernels.nn.losses import ClipLoss, SigLipLoss, TokenContrastiveLoss, token_ring
from mlip_kernels.nn.losses.gather import all_gather

GATHERS = ("all", "ring")
SWITCHES = list(itertools.product((False, True), repeat=3))
EXCHANGES = ("bidir", "shift", "reduce", "gather")
LOCAL = 3
EVEN = {ranks: ([LOCAL] * ranks, [5] * ranks, [4] * ranks) for ranks in (1, 2, 4)}
RAGGED = {2: ([4, 1], [5, 3], [2, 4]), 4: ([2, 0, 3, 1], [5, 2, 4, 5], [4, 3, 1, 2])}
"""By number of ranks: the pairs, the image tokens and the text tokens of each."""


def open_clip_loss():
    """open_clip's module of losses without the rest of open_clip, which takes seconds to import in every process."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Batch:
    """Float64 tokens, or features, of all ranks, scale and bias, masks and weights, and each rank's part of them."""

    def __init__(self, rows, image_lengths, text_lengths, *, tokens=True, bare=False):
        self.rows = rows
        self.lengths = {"image": image_lengths, "text": text_lengths}
        random = torch.Generator().manual_seed(5)
        batch = sum(rows)

        def unit(*shape):
            return normalize(torch.randn(*shape, generator=random, dtype=torch.float64), dim=-1)

        ends = [torch.tensor(14.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)]
        self.options = {}
        if not tokens:
            self.inputs = [unit(batch, 8), unit(batch, 8), *ends]
            return
        image, text = max(image_lengths), max(text_lengths)
        self.inputs = [unit(batch, image, 8), unit(batch, text, 8), *ends]
        for side, length in (("image", image), ("text", text)):
            kept = torch.tensor(self.lengths[side]).repeat_interleave(torch.tensor(rows))
            mask = torch.arange(length) < kept[:, None]
            if not bare:
                mask &= torch.rand(batch, length, generator=random) < 0.8
                self.options[f"{side}_weight"] = torch.rand(batch, length, generator=random, dtype=torch.float64)
            self.options[f"{side}_mask"] = mask
        if not bare:
            self.options["text_mask"][1] = False
        self.bare = bare

    def of(self, rank):
        """This rank's rows, still as long as the longest, so that their gradients are comparable."""
        rows = slice(sum(self.rows[:rank]), sum(self.rows[: rank + 1]))
        return [t[rows] if t.dim() else t for t in self.inputs], {name: t[rows] for name, t in self.options.items()}

    def cut(self, loss, rank):
        """The loss of this rank's rows cut to the rank's own lengths, without the masks that say no more than that."""

        def of_cut(image, text, scale, bias, **options):
            image, text = image[:, : self.lengths["image"][rank]], text[:, : self.lengths["text"][rank]]
            options = {name: t[:, : self.lengths[name.split("_")[0]][rank]] for name, t in options.items()}
            return loss(image, text, scale, bias, **({} if self.bare else options))

        return of_cut


def loss_and_gradients(loss, inputs, options):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    weights = {name: t.detach().clone().requires_grad_() for name, t in options.items() if t.is_floating_point()}
    value = loss(*leaves, **{**options, **weights})
    wanted = [*leaves, *weights.values()]
    return [value.detach(), *torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)]


def on_features(loss, rank):
    """Of the second call, which finds the labels that the first may have kept."""
    inputs, options = Batch(*EVEN[loss.world_size], tokens=False).of(rank)
    loss_and_gradients(loss, inputs, options)
    return loss_and_gradients(loss, inputs, options)


def on_tokens(batch, rank, *, change=lambda loss: loss, **arguments):
    loss = TokenContrastiveLoss(rank=rank, world_size=len(batch.rows), **arguments)
    return loss_and_gradients(batch.cut(change(loss), rank), *batch.of(rank))


def with_frozen_texts(loss):
    """Image tokens, weights and the scale learn; texts do not."""

    def of_constants(image, text, scale, bias, **options):
        options["text_weight"] = options["text_weight"].detach()
        return loss(image, text.detach(), scale, float(bias.detach()), **options)

    return of_constants


def token_cases(rank, ranks):
    results = {}
    for gather in GATHERS:
        results["token even", gather] = on_tokens(Batch(*EVEN[ranks]), rank, gather=gather)
        results["token ragged", gather] = on_tokens(Batch(*RAGGED[ranks]), rank, gather=gather, label_smoothing=0.1)
        results["token frozen", gather] = on_tokens(
            Batch(*RAGGED[ranks]), rank, gather=gather, change=with_frozen_texts
        )
        bare = Batch(*RAGGED[ranks], bare=True)
        results["token bare", gather] = on_tokens(bare, rank, gather=gather, local_loss=False)
        results["token without", gather] = on_tokens(Batch(*EVEN[ranks]), rank, gather=gather, gather_with_grad=False)
        results["token half", gather] = half_precision_tokens(rank, ranks, gather)
        results["token kept", gather] = bytes_kept(rank, ranks, gather)
    return results


def half_precision_tokens(rank, ranks, gather):
    """Bfloat16 images with float32 texts, which autocast allows; only the forward pass is under it."""
    (image, text, *ends), _ = Batch(*EVEN[ranks]).of(rank)
    loss = TokenContrastiveLoss(rank=rank, world_size=ranks, gather=gather)
    with torch.enable_grad():
        image, text = image.bfloat16().requires_grad_(), text.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(image, text, *ends)
        return [value.detach(), *torch.autograd.grad(value, [image, text])]


def bytes_kept(rank, ranks, gather):
    """What is saved for backward, and the largest number of remote shards alive when one is passed on."""
    (image, text, *ends), _ = Batch([8] * ranks, [2] * ranks, [64] * ranks, bare=True).of(rank)
    saved, remote, alive = {}, [], [0]
    pass_on = token_ring.pass_on

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def watched(tensors, shapes, shifts):
        alive.append(sum(tensor() is not None for tensor in remote))
        received = pass_on(tensors, shapes, shifts)
        remote.extend(weakref.ref(tensor) for tensor in received)
        return received

    token_ring.pass_on = watched
    try:
        loss = TokenContrastiveLoss(rank=rank, world_size=ranks, gather=gather)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            value = loss(image.clone().requires_grad_(), text.clone().requires_grad_(), *ends)
        forward = max(alive)
        value.backward()
    finally:
        token_ring.pass_on = pass_on
    return {"saved": sum(saved.values()), "shard": text.nbytes, "forward": forward, "backward": max(alive)}


def computed_again(rank, ranks):
    """Whether the ring computes on the reference, forward inside `use_reference` and backward outside of it."""
    (image, text, *ends), _ = Batch(*EVEN[ranks]).of(rank)
    asked, token_logits = [], token_ring.token_logits

    def watched(*arguments, **options):
        asked.append(reference_requested())
        return token_logits(*arguments, **options)

    token_ring.token_logits = watched
    try:
        with use_reference():
            loss = TokenContrastiveLoss(rank=rank, world_size=ranks, gather="ring")(image, text.requires_grad_(), *ends)
        loss.backward()
    finally:
        token_ring.token_logits = token_logits
    return asked


def message_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def mismatches(rank, place):
    """What is said when ranks bring what does not go together; a loss afterwards shows that no rank is left behind."""
    token, clip = TokenContrastiveLoss(**place), ClipLoss(**place)
    image, text = torch.zeros(LOCAL, 5, 8), torch.zeros(LOCAL, 4, 8)
    mask = torch.ones(LOCAL, 4, dtype=torch.bool)
    uneven, empty, wide = torch.zeros(LOCAL - rank, 8), torch.zeros(LOCAL * (1 - rank), 8), torch.zeros(2, 4, 8 + rank)
    learned = text.clone().requires_grad_(rank == 1)
    found = {
        "batch": message_of(lambda: clip(uneven, uneven, 1.0)),
        "empty batch on one rank": message_of(lambda: clip(empty, empty, 1.0)),
        "no pair on any rank": message_of(lambda: token(image[:0], text[:0], 1.0)),
        "token width": message_of(lambda: token(wide, wide, 1.0)),
        "dtype": message_of(lambda: token(*(t.to([torch.float32, torch.half][rank]) for t in (image, text)), 1.0)),
        "mask": message_of(lambda: token(image, text, 1.0, text_mask=mask if rank else None)),
        "learned texts": message_of(lambda: token(image, learned, 1.0)),
        "rank": message_of(lambda: ClipLoss(rank=1 - rank, world_size=2)(image[0], image[0], 1.0)),
    }
    assert token(image, text, 1.0).isfinite()
    return found


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)

    def forward(self, image, text):
        return normalize(self.image(image), dim=-1), normalize(self.text(text), dim=-1)


def tower():
    torch.manual_seed(0)
    return Tower().double()


def with_ddp(rank, ranks, gather):
    """Gradients of a model under DDP."""
    model, batch = torch.nn.parallel.DistributedDataParallel(tower()), Batch(*RAGGED[ranks])
    (image, text, *ends), options = batch.of(rank)
    loss = batch.cut(TokenContrastiveLoss(rank=rank, world_size=ranks, gather=gather), rank)
    loss(*model(image, text), *ends, **options).backward()
    return [p.grad for p in model.parameters()]


def half_precision_gather(rank, ranks):
    """A bfloat16 row a rank, gathered, and its gradient: in each column one rank's part is 1, the others move no 1."""
    x = torch.full((1, ranks), 1.0 + rank, dtype=torch.bfloat16, requires_grad=True)
    gathered = all_gather(x)
    parts = torch.full((ranks, ranks), 1 / 256, dtype=torch.bfloat16).fill_diagonal_(1)
    (gradient,) = torch.autograd.grad((gathered * parts[rank]).sum(), x)
    return [gathered.detach(), gradient]


def feature_cases(rank, place):
    results, theirs = {}, open_clip_loss()
    for local, grad, cache in SWITCHES:
        switches = {"local_loss": local, "gather_with_grad": grad, "cache_labels": cache, **place}
        results["clip", local, grad, cache] = on_features(ClipLoss(**switches), rank)
        results["open_clip", local, grad, cache] = on_features(theirs.ClipLoss(**switches), rank)
    inputs, _ = Batch(*EVEN[place["world_size"]], tokens=False).of(rank)
    for name, kind in (("clip logits", ClipLoss), ("open_clip logits", theirs.ClipLoss)):
        results[name] = list(kind(local_loss=True, **place).get_logits(*inputs))
    for exchange in EXCHANGES:
        for cache in (False, True):
            results["siglip", exchange, cache] = on_features(SigLipLoss(cache, **place, dist_impl=exchange), rank)
        results["open_clip siglip", exchange] = on_features(theirs.SigLipLoss(**place, dist_impl=exchange), rank)
    return results


def one_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    place = {"rank": rank, "world_size": ranks}
    results = token_cases(rank, ranks) | feature_cases(rank, place)
    results["half"] = half_precision_gather(rank, ranks)
    results["computed again"] = computed_again(rank, ranks)
    if ranks == 2:
        results["mismatches"] = mismatches(rank, place)
        results |= {("ddp", gather): with_ddp(rank, ranks, gather) for gather in GATHERS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks, folder):
    multiprocessing.set_forkserver_preload([__name__])  # which imports torch once for all ranks
    torch.multiprocessing.start_processes(one_rank, (ranks, str(folder)), ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
