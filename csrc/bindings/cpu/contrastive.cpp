// Contrastive family, CPU key: checks, allocation, threads. The kernels themselves do not know torch.
#include <tuple>
#include <vector>

#include "bindings/cpu/tensors.h"
#include "cpu/contrastive/pair_cross_entropy.h"
#include "cpu/contrastive/token_maxima.h"

namespace mlip::bindings {
namespace {

using Optional = std::optional<Tensor>;

// The smallest integer that holds the index of one of `count` tokens: `index_dtype` in mlip_kernels.contrastive.
ScalarType index_type(int64_t count) {
  return count <= 256 ? ScalarType::Byte : count <= 32768 ? ScalarType::Short : ScalarType::Int;
}

int index_bytes(int64_t count) { return count <= 256 ? 1 : count <= 32768 ? 2 : 4; }

void check_side(const char* name, int64_t batch, int64_t count, const Optional& mask, const Tensor& normalized_weight,
                ScalarType wide) {
  MLIP_CHECK(count >= 1, name, ": expected at least one token");
  if (mask) check("mask", *mask, {batch, count}, ScalarType::Bool);
  check("normalized_weight", normalized_weight, {batch, count}, wide);
}

template <typename T>
cpu::Tokens<T> tokens(const Tensor& values, const Optional& mask, const Tensor& normalized_weight) {
  return {values.size(0),
          values.size(1),
          data<T>(values),
          values.stride(0),
          values.stride(1),
          flags_or_null(mask),
          data<cpu::Accumulate<T>>(normalized_weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_maxima(
    const Tensor& images_, const Tensor& texts_, const Optional& image_mask_, const Optional& text_mask_,
    const Tensor& image_normalized_weight_, const Tensor& text_normalized_weight_, bool keep_best, bool keep_maxima) {
  MLIP_CHECK(images_.dim() == 3, "image_tokens: expected [B, N, D]");
  const int64_t batch = images_.size(0), n = images_.size(1), channels = images_.size(2);
  MLIP_CHECK(texts_.dim() == 3, "text_tokens: expected [C, M, D]");
  const int64_t text_batch = texts_.size(0), m = texts_.size(1);
  check("text_tokens", texts_, {text_batch, m, channels}, images_.scalar_type());
  MLIP_CHECK(channels >= 1, "image_tokens: expected at least one channel");
  const ScalarType wide = accumulate_in(images_.scalar_type());
  check_side("image_tokens", batch, n, image_mask_, image_normalized_weight_, wide);
  check_side("text_tokens", text_batch, m, text_mask_, text_normalized_weight_, wide);

  const Tensor images = with_unit_stride(images_), texts = with_unit_stride(texts_);
  const Optional image_mask = contiguous(image_mask_), text_mask = contiguous(text_mask_);
  const Tensor image_normalized_weight = torch::stable::contiguous(image_normalized_weight_);
  const Tensor text_normalized_weight = torch::stable::contiguous(text_normalized_weight_);
  const auto kept = [&](bool wanted, int64_t count, ScalarType type) {
    return wanted ? torch::stable::new_empty(images, {batch, text_batch, count}, type)
                  : torch::stable::new_empty(images, {0}, type);
  };
  Tensor per_image = torch::stable::new_empty(images, {batch, text_batch}, wide);
  Tensor per_text = torch::stable::new_empty(images, {text_batch, batch}, wide);
  Tensor best_text = kept(keep_best, n, keep_best ? index_type(m) : ScalarType::Byte);
  Tensor best_image = kept(keep_best, m, keep_best ? index_type(n) : ScalarType::Byte);
  Tensor text_maxima = kept(keep_maxima, n, wide), image_maxima = kept(keep_maxima, m, wide);

  for_type(images.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    const cpu::TokenMaximaResults<A> results = {mutable_data<A>(per_image),
                                                mutable_data<A>(per_text),
                                                keep_best ? mutable_data<void>(best_text) : nullptr,
                                                keep_best ? mutable_data<void>(best_image) : nullptr,
                                                keep_maxima ? mutable_data<A>(text_maxima) : nullptr,
                                                keep_maxima ? mutable_data<A>(image_maxima) : nullptr,
                                                index_bytes(m),
                                                index_bytes(n)};
    const cpu::TokenMaxima<T> problem = {channels, tokens<T>(images, image_mask, image_normalized_weight),
                                         tokens<T>(texts, text_mask, text_normalized_weight), results};
    const cpu::TokenMaximaTiling tiling = cpu::token_maxima_tiling(problem);
    Tensor packed = torch::stable::new_empty(images, {tiling.packed_bytes()}, ScalarType::Byte);
    for (const cpu::TokenMaximaBlock& block : tiling.blocks) {
      parallel_for(0, block.text_groups, grain(tiling.tiles.most_columns * channels), [&](int64_t begin, int64_t end) {
        cpu::token_maxima_pack(problem, tiling, block, packed.mutable_data_ptr(), begin, end);
      });
      parallel_for(0, block.tasks(), grain(tiling.tiles.most_rows * tiling.tiles.most_columns),
                   [&](int64_t begin, int64_t end) {
                     cpu::token_maxima(problem, tiling, block, packed.const_data_ptr(), begin, end);
                   });
    }
  });
  return {per_image, per_text, best_text, best_image, text_maxima, image_maxima};
}

cpu::ArgmaxIndices argmax_indices(const char* name, const Tensor& argmax, int64_t batch, int64_t other_batch,
                                  int64_t count, int64_t found) {
  check(name, argmax, {batch, other_batch, count}, index_type(found));
  return {argmax.const_data_ptr(), index_bytes(found), argmax.stride(0), argmax.stride(1)};
}

Tensor token_maxima_backward(const Tensor& grad_mean_, const Tensor& grad_other_mean_, const Tensor& others_,
                             const Optional& mask_, const Optional& other_mask_, const Tensor& normalized_weight_,
                             const Tensor& other_normalized_weight_, const Tensor& best_other_, const Tensor& best_) {
  MLIP_CHECK(others_.dim() == 3, "other_tokens: expected [C, M, D]");
  const int64_t other_batch = others_.size(0), m = others_.size(1), channels = others_.size(2);
  MLIP_CHECK(normalized_weight_.dim() == 2, "normalized_weight: expected [B, N]");
  const int64_t batch = normalized_weight_.size(0), n = normalized_weight_.size(1);
  const ScalarType wide = accumulate_in(others_.scalar_type());
  check_side("tokens", batch, n, mask_, normalized_weight_, wide);
  check_side("other_tokens", other_batch, m, other_mask_, other_normalized_weight_, wide);
  check("grad_mean", grad_mean_, {batch, other_batch}, wide);
  check("grad_other_mean", grad_other_mean_, {other_batch, batch}, wide);

  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor others = dense(others_), normalized_weight = dense(normalized_weight_),
               other_normalized_weight = dense(other_normalized_weight_);
  const Tensor grad_mean = dense(grad_mean_), grad_other_mean = dense(grad_other_mean_);
  const Optional mask = contiguous(mask_), other_mask = contiguous(other_mask_);
  const Tensor best_other = with_unit_stride(best_other_), best = with_unit_stride(best_);
  const cpu::ArgmaxIndices argmax_other = argmax_indices("best_other", best_other, batch, other_batch, n, m);
  const cpu::ArgmaxIndices argmax = argmax_indices("best", best, batch, other_batch, m, n);
  Tensor grad = torch::stable::new_empty(others, {batch, n, channels});

  for_type(others.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::TokenMaximaBackward<T> problem{};
    problem.batch = batch;
    problem.count = n;
    problem.other_batch = other_batch;
    problem.other_count = m;
    problem.channels = channels;
    problem.grad_mean = data<A>(grad_mean);
    problem.grad_other_mean = data<A>(grad_other_mean);
    problem.mask = flags_or_null(mask);
    problem.other_mask = flags_or_null(other_mask);
    problem.normalized_weight = data<A>(normalized_weight);
    problem.other_normalized_weight = data<A>(other_normalized_weight);
    problem.argmax_other = argmax_other;
    problem.argmax = argmax;
    problem.others = data<T>(others);
    problem.grad = mutable_data<T>(grad);
    parallel_for(0, problem.tasks(), grain(other_batch * (n + m) * problem.SLICE),
                 [&](int64_t begin, int64_t end) { cpu::token_maxima_backward(problem, begin, end); });
  });
  return grad;
}

template <typename T>
cpu::PairCrossEntropy<T> pair_problem(const Tensor& logits, const Tensor& labels, bool both, double label_smoothing) {
  cpu::PairCrossEntropy<T> problem{};
  problem.rows = logits.size(0);
  problem.columns = logits.size(1);
  problem.both = both;
  problem.label_smoothing = label_smoothing;
  problem.logits = data<T>(logits);
  problem.stride = logits.stride(0);
  problem.labels = data<int64_t>(labels);
  return problem;
}

void check_pairs(const Tensor& logits, const Tensor& labels, bool both) {
  MLIP_CHECK(logits.dim() == 2, "logits: expected [B, C]");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  MLIP_CHECK(!both || rows == columns, "logits: expected [B, B], got ", columns, " columns for ", rows, " rows");
  check("labels", labels, {rows}, ScalarType::Long);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < rows; ++i) {
    MLIP_CHECK(0 <= label[i] && label[i] < columns, "labels: expected numbers from 0 to ", columns - 1, ", got ",
               label[i]);
  }
}

std::tuple<Tensor, Tensor, Tensor> pair_cross_entropy(const Tensor& logits_, const Tensor& labels_, bool both,
                                                      double label_smoothing) {
  const Tensor labels = torch::stable::contiguous(labels_);
  check_pairs(logits_, labels, both);
  const Tensor logits = with_unit_stride(logits_);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType wide = accumulate_in(logits.scalar_type());
  Tensor loss = torch::stable::new_empty(logits, {}, wide);
  Tensor row_terms = torch::stable::new_empty(logits, {2, rows}, wide);
  Tensor column_terms = torch::stable::new_empty(logits, {2, both ? columns : 0}, wide);
  for_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::PairCrossEntropy<T> problem = pair_problem<T>(logits, labels, both, label_smoothing);
    Tensor partial =
        torch::stable::new_empty(logits, {both ? 2 * problem.blocks() : 0, problem.padded_columns()}, wide);
    Tensor own = torch::stable::new_empty(logits, {rows}, wide);
    std::vector<cpu::PairSums> row_sums(size_t(problem.blocks())), column_sums(size_t(problem.column_tasks()));
    problem.row_terms = mutable_data<A>(row_terms);
    problem.column_terms = mutable_data<A>(column_terms);
    problem.partial = mutable_data<A>(partial);
    problem.own = mutable_data<A>(own);
    problem.row_sums = row_sums.data();
    problem.column_sums = column_sums.data();
    parallel_for(0, problem.blocks(), grain(problem.block_rows() * columns),
                 [&](int64_t begin, int64_t end) { cpu::pair_cross_entropy_rows(problem, begin, end); });
    parallel_for(0, problem.column_tasks(), grain(problem.COLUMNS_OF_TASK * problem.blocks()),
                 [&](int64_t begin, int64_t end) { cpu::pair_cross_entropy_columns(problem, begin, end); });
    *mutable_data<A>(loss) = A(cpu::pair_cross_entropy_loss(problem));
  });
  return {loss, row_terms, column_terms};
}

Tensor pair_cross_entropy_backward(const Tensor& grad, const Tensor& logits_, const Tensor& labels_,
                                   const Tensor& row_terms_, const Tensor& column_terms_, bool both,
                                   double label_smoothing) {
  const Tensor labels = torch::stable::contiguous(labels_);
  check_pairs(logits_, labels, both);
  const Tensor logits = with_unit_stride(logits_);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType wide = accumulate_in(logits.scalar_type());
  check("grad", grad, {}, wide);
  check("row_terms", row_terms_, {2, rows}, wide);
  check("column_terms", column_terms_, {2, both ? columns : 0}, wide);
  const Tensor row_terms = torch::stable::contiguous(row_terms_);
  const Tensor column_terms = torch::stable::contiguous(column_terms_);
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, columns});
  for_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    Tensor column_factor = torch::stable::new_empty(logits, {both ? columns : 0}, wide);
    cpu::PairCrossEntropy<T> problem = pair_problem<T>(logits, labels, both, label_smoothing);
    problem.row_terms = mutable_data<A>(row_terms);
    problem.column_terms = mutable_data<A>(column_terms);
    problem.grad = *data<A>(grad) / (both ? 2 : 1);
    problem.column_factor = mutable_data<A>(column_factor);
    problem.grad_logits = mutable_data<T>(grad_logits);
    problem.columns_fit = cpu::pair_cross_entropy_column_factors(problem);
    parallel_for(0, rows, grain(columns),
                 [&](int64_t begin, int64_t end) { cpu::pair_cross_entropy_backward(problem, begin, end); });
    parallel_for(0, rows, grain(64),
                 [&](int64_t begin, int64_t end) { cpu::pair_cross_entropy_backward_targets(problem, begin, end); });
  });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("contrastive_pair_cross_entropy", TORCH_BOX(&pair_cross_entropy));
  m.impl("contrastive_pair_cross_entropy_backward", TORCH_BOX(&pair_cross_entropy_backward));
  m.impl("contrastive_token_maxima", TORCH_BOX(&token_maxima));
  m.impl("contrastive_token_maxima_backward", TORCH_BOX(&token_maxima_backward));
}

}  // namespace
}  // namespace mlip::bindings
