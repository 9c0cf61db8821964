// What the merging bindings of all parts share: the maps of a matching, and the rows that they move.
#pragma once
#include "bindings/tensors.h"

namespace mlip::bindings {

// The maps of a matching, checked and contiguous.
struct MergingMaps {
  int64_t batch, tokens, outputs;       // B, N, N'
  Tensor assignment, kept, removed;     // [B, N], [B, N'], [B, N - N'] int64
  std::optional<Tensor> mask, dropped;  // [B, N'], [B, N] bool

  MergingMaps(const Tensor& assignment_, const Tensor& kept_, const Tensor& removed_,
              const std::optional<Tensor>& mask_, const std::optional<Tensor>& dropped_)
      : assignment(assignment_), kept(kept_), removed(removed_) {
    MLIP_CHECK(assignment_.dim() == 2 && kept_.dim() == 2, "assignment, kept: expected [B, N] and [B, N']");
    batch = assignment_.size(0);
    tokens = assignment_.size(1);
    outputs = kept_.size(1);
    MLIP_CHECK(outputs <= tokens && (outputs > 0 || tokens == 0), "kept: expected 1 to ", tokens, " columns, got ",
               outputs);
    check("assignment", assignment_, {batch, tokens}, ScalarType::Long);
    check("kept", kept_, {batch, outputs}, ScalarType::Long);
    check("removed", removed_, {batch, tokens - outputs}, ScalarType::Long);
    if (mask_) check("mask", *mask_, {batch, outputs}, ScalarType::Bool);
    if (dropped_) check("dropped", *dropped_, {batch, tokens}, ScalarType::Bool);
    assignment = torch::stable::contiguous(assignment_);
    kept = torch::stable::contiguous(kept_);
    removed = torch::stable::contiguous(removed_);
    mask = contiguous(mask_);
    dropped = contiguous(dropped_);
  }

  // A problem with these maps and the shape of the rows that are read; the caller adds where rows lie.
  template <typename Problem>
  Problem problem_of(const Tensor& from) const {
    Problem problem{};
    problem.batch = batch;
    problem.tokens = tokens;
    problem.outputs = outputs;
    problem.channels = from.size(2);
    problem.stride_batch = from.stride(0);
    problem.stride_token = from.stride(1);
    problem.assignment = data<int64_t>(assignment);
    problem.kept = data<int64_t>(kept);
    problem.removed = data<int64_t>(removed);
    problem.mask = flags_or_null(mask);
    problem.dropped = flags_or_null(dropped);
    return problem;
  }
};

// x as [B, rows, C] with unit stride.
inline Tensor rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows) {
  MLIP_CHECK(x.dim() == 3, name, ": expected three dimensions");
  check(name, x, {batch, rows, x.size(2)}, x.scalar_type());
  return x.size(2) > 0 ? with_unit_stride(x) : torch::stable::contiguous(x);
}

}  // namespace mlip::bindings
