"""Export a model to ONNX: inside `use_reference()` the operators become standard ONNX nodes.

    python examples/export_to_onnx.py

ONNX has no node for a fused kernel, so the plain-PyTorch reference is what can be exported. The file then runs without
this package; here ONNX's own evaluator runs it, slowly, and the results are compared.
"""

from collections import Counter

import onnx
import onnx.reference
import torch
from torch import Tensor, nn

import mlip_kernels as mk


class Pooling(nn.Module):
    """A frequency-guided merge of image tokens and the mean of what is left."""

    def forward(self, tokens: Tensor) -> Tensor:
        energy = mk.token_energy(tokens, 0.25, grid=(4, 4), prefix_tokens=1)
        merged, size, _ = mk.merge_tokens(tokens, tokens, r=4, guide=energy)
        return mk.weighted_mean(merged, size, prefix_tokens=1)


def main() -> None:
    torch.manual_seed(0)
    model, tokens = Pooling().eval(), torch.randn(2, 17, 8)
    with mk.use_reference():
        program = torch.onnx.export(model, (tokens,), dynamo=True, verbose=False)
    proto = program.model_proto
    onnx.checker.check_model(proto)

    kinds = Counter(node.op_type for node in proto.graph.node)
    print(f"{sum(kinds.values())} nodes, the most frequent: {dict(kinds.most_common(5))}")
    domains = {node.domain or "ai.onnx" for node in proto.graph.node}
    print(f"domains of the nodes: {sorted(domains)}; the file has {len(proto.SerializeToString()):,} bytes")

    others = torch.randn(2, 17, 8)
    (result,) = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: others.numpy()})
    with torch.inference_mode():
        expected = model(others)  # on the kernels
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-5)
    print(f"ONNX and the kernels differ by at most {(torch.from_numpy(result) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
