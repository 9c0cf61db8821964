"""Merge tokens in a transformer of your own: plan, merge, count sizes, and lay the result back on the grid.

    python examples/merge_in_your_own_loop.py

Four steps go into a block: a plan from the keys, `plan.merge` between attention and MLP, attention that counts merged
tokens by their size, and `track`, which says where every patch went. Dense outputs come back by one gather.
"""

import torch
from torch import Tensor, nn

import mlip_kernels as mk

DIM, HEADS, DEPTH, GRID, REMOVED = 64, 4, 4, (14, 14), 24


class Block(nn.Module):
    """A pre-norm transformer block that merges ``r`` tokens between attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, mk.MergePlan | None]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = mk.proportional_attention(q, k, v, size)
        x, plan = x + self.proj(attended.transpose(1, 2).flatten(2)), None
        if r:
            plan = mk.merge_plan(k.mean(1), r, size=size, prefix_tokens=1)  # keys, averaged over heads
            x, size = plan.merge(x)
        return x + self.mlp(self.norm2(x)), size, plan


@torch.no_grad()
def run(blocks: nn.ModuleList, x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Every patch's token behind the last block, ``[B, N, D]``, and the size-weighted mean ``[B, D]``."""
    size, origin, counts = None, None, [x.shape[1]]
    for block in blocks:
        x, size, plan = block(x, size, r)
        if plan is not None:
            origin = plan.track(origin)
        counts.append(x.shape[1])
    print(f"r = {r:2}: tokens behind every block {counts}")
    pooled = mk.weighted_mean(x, size, prefix_tokens=1)
    return (x if origin is None else x.gather(1, origin[..., None].expand(-1, -1, DIM))), pooled


def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(DEPTH))
    coarse = torch.randn(2, DIM, 4, 4)  # patches that resemble their neighbours, as those of images do
    patches = nn.functional.interpolate(coarse, size=GRID, mode="bilinear").flatten(2).transpose(1, 2)
    x = torch.cat((torch.randn(2, 1, DIM), patches), dim=1)

    plan = mk.merge_plan(x, 98, prefix_tokens=1)
    merged, size = plan.merge(x)
    error = (plan.unmerge(merged) - x).norm() / x.norm()
    print(f"one plan: {x.shape[1]} to {merged.shape[1]} tokens, sizes up to {size.max():.0f}; unmerged {error:.1%} off")

    (dense, pooled), (dense_merged, pooled_merged) = run(blocks, x, 0), run(blocks, x, REMOVED)
    print(f"per patch, on the grid again: {(dense_merged - dense).norm() / dense.norm():.1%} off")
    print(f"pooled, weighted by size:     {(pooled_merged - pooled).norm() / pooled.norm():.1%} off")


if __name__ == "__main__":
    main()
