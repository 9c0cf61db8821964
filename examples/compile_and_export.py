"""`torch.compile` and `torch.export` of the operators: no graph breaks, any batch size, kernels in the graph.

    python examples/compile_and_export.py

The operators are registered with PyTorch's dispatcher, with shapes and gradients, so the compiler takes them as nodes.
"""

import torch
from torch import Tensor, nn

import mlip_kernels as mk


class Head(nn.Module):
    """Filtered tokens, of which a quarter merges away, pooled."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.filter = mk.nn.SpectralFilter(dim, (8, 8), prefix_tokens=1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.filter(x)
        merged, size, _ = mk.merge_tokens(x, self.proj(x), r=16)
        return mk.weighted_mean(merged, size, prefix_tokens=1)


def ours(graph: torch.fx.Graph) -> list[str]:
    """Names of this package's operators in a graph."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("mlip_kernels")]


def main() -> None:
    torch.manual_seed(0)
    model = Head()
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(module)  # inductor, the default backend, would generate code here, which takes a C++ compiler
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 65, 32)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).square().sum().backward()
    print(f"torch.compile: {len(graphs)} graph for batches of 2, 3 and 5, without a break; in it")
    print("  " + "\n  ".join(ours(graphs[0].graph)))

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 65, 32),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 65, 32)
    torch.testing.assert_close(program.module()(x), model(x))
    print(f"torch.export: a program for any batch from 1 to 64, with {len(ours(program.graph))} operators of ours")


if __name__ == "__main__":
    main()
