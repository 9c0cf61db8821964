"""Train open_clip's CLIP with this package's loss: the same numbers, one matrix of logits less to keep.

    python examples/open_clip_loss.py

`ClipLoss` takes the arguments of `open_clip.loss.ClipLoss`, so one import changes. Shown here: the loss of both on the
same features, what each saves for the backward pass at a batch of 1,024, and a few steps of training on random pairs.
"""

import open_clip
import torch

from mlip_kernels.nn import ClipLoss

STEPS, PAIRS = 5, 16


def saved_mib(loss: torch.nn.Module, batch: int = 1024) -> float:
    """Memory that one call of a loss keeps for its backward pass, the features included."""
    images, texts = (torch.randn(batch, 64).requires_grad_() for _ in range(2))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(images, texts, torch.tensor(10.0))
    return sum(kept.values()) / 2**20


def main() -> None:
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=16, image_size=64)
    text = open_clip.CLIPTextCfg(layers=2, width=64, heads=4, vocab_size=1000, context_length=16)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
    images, captions = torch.randn(PAIRS, 3, 64, 64), torch.randint(1, 1000, (PAIRS, 16))

    ours, theirs = ClipLoss(), open_clip.loss.ClipLoss()
    features = model(images, captions)
    a, b = ours(*features), theirs(*features)
    torch.testing.assert_close(a, b)
    print(f"loss of the same features: {a.item():.6f} here, {b.item():.6f} in open_clip")
    print(f"kept for backward, 1,024 pairs: {saved_mib(ours):.1f} MiB here, {saved_mib(theirs):.1f} MiB in open_clip")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss = ours(*model(images, captions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
