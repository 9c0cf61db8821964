#include "cpu/contrastive/pair_cross_entropy.h"

#include <limits>
#include <type_traits>
#include <utility>

#define MLIP_KERNELS "cpu/contrastive/pair_cross_entropy_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {
namespace {

// Gradients of more bytes than this go past the caches, if their rows start on cache lines.
constexpr int64_t STREAMED_BYTES = int64_t(16) << 20;

template <typename T>
bool streamed(const PairCrossEntropy<T>& problem) {
  const int64_t row = problem.columns * int64_t(sizeof(T));
  return problem.rows * row >= STREAMED_BYTES && row % 64 == 0 &&
         reinterpret_cast<uintptr_t>(problem.grad_logits) % 64 == 0;
}

// `total` has the distances of all logits from the largest of their line, of which there are `classes` in each.
double loss_of(const PairSums& total, double classes, double label_smoothing) {
  if (label_smoothing == 0) return total.own;
  return (1 - label_smoothing) * total.own + label_smoothing * (total.logs - total.distances / classes);
}

PairSums added(const PairSums* sums, int64_t count) {
  PairSums total = {};
  for (int64_t i = 0; i < count; ++i) {
    total.own += sums[i].own;
    total.logs += sums[i].logs;
    total.maxima += sums[i].maxima;
    total.distances += sums[i].distances;
  }
  return total;
}

}  // namespace

template <typename T>
void pair_cross_entropy_rows(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(pair_rows<T>, problem, begin, end);
}

template <typename T>
void pair_cross_entropy_columns(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(pair_columns<T>, problem, begin, end);
}

template <typename T>
double pair_cross_entropy_loss(const PairCrossEntropy<T>& problem) {
  const double rows = double(problem.rows), columns = double(problem.columns);
  const PairSums of_rows = added(problem.row_sums, problem.blocks());
  const double loss = loss_of(of_rows, columns, problem.label_smoothing);
  if (!problem.both) return loss;
  PairSums of_columns = added(problem.column_sums, problem.column_tasks());
  of_columns.distances = of_rows.distances + columns * of_rows.maxima - rows * of_columns.maxima;
  return (loss + loss_of(of_columns, rows, problem.label_smoothing)) / 2;
}

template <typename T>
bool pair_cross_entropy_column_factors(const PairCrossEntropy<T>& problem) {
  MLIP_DISPATCH_ISA(pair_column_factors<T>, problem);
}

template <typename T>
void pair_cross_entropy_backward(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(pair_backward<T>, problem, streamed(problem), begin, end);
}

template <typename T>
void pair_cross_entropy_backward_targets(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(pair_backward_targets<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                                   \
  template void pair_cross_entropy_rows<T>(const PairCrossEntropy<T>&, int64_t, int64_t);     \
  template void pair_cross_entropy_columns<T>(const PairCrossEntropy<T>&, int64_t, int64_t);  \
  template double pair_cross_entropy_loss<T>(const PairCrossEntropy<T>&);                     \
  template bool pair_cross_entropy_column_factors<T>(const PairCrossEntropy<T>&);             \
  template void pair_cross_entropy_backward<T>(const PairCrossEntropy<T>&, int64_t, int64_t); \
  template void pair_cross_entropy_backward_targets<T>(const PairCrossEntropy<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
