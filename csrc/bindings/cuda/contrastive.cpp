// Contrastive family, CUDA C++ kernels: registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "cuda/contrastive/contrastive.h"

namespace mlip::bindings {
namespace {

namespace kernels = cuda::contrastive;
using Optional = std::optional<Tensor>;

// The smallest integer that holds the index of one of `count` tokens: `index_dtype` in mlip_kernels.contrastive.
ScalarType index_type(int64_t count) {
  return count <= 256 ? ScalarType::Byte : count <= 32768 ? ScalarType::Short : ScalarType::Int;
}

int index_bytes(int64_t count) { return count <= 256 ? 1 : count <= 32768 ? 2 : 4; }

void check_side(const char* name, int64_t batch, int64_t count, const Optional& mask, const Tensor& weight) {
  MLIP_CHECK(1 <= count && count <= kernels::MOST_TOKENS, name, ": expected 1 to ", kernels::MOST_TOKENS,
             " tokens, got ", count);
  if (mask) check("mask", *mask, {batch, count}, ScalarType::Bool);
  check("normalized_weight", weight, {batch, count}, ScalarType::Float);
}

kernels::TokenSide side(const Tensor& values, const Optional& mask, const Tensor& weight) {
  return {values.const_data_ptr(), values.stride(0),    values.stride(1), rows_are_vectors(values),
          flags_or_null(mask),     data<float>(weight), values.size(0),   int(values.size(1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_maxima(
    const Tensor& images_, const Tensor& texts_, const Optional& image_mask_, const Optional& text_mask_,
    const Tensor& image_weight_, const Tensor& text_weight_, bool keep_argmax, bool keep_maxima) {
  MLIP_CHECK(images_.dim() == 3, "image_tokens: expected [B, N, D]");
  const int64_t batch = images_.size(0), n = images_.size(1), channels = images_.size(2);
  MLIP_CHECK(texts_.dim() == 3, "text_tokens: expected [C, M, D]");
  const int64_t text_batch = texts_.size(0), m = texts_.size(1);
  check("text_tokens", texts_, {text_batch, m, channels}, images_.scalar_type());
  MLIP_CHECK(channels >= 1, "image_tokens: expected at least one channel");
  check_side("image_tokens", batch, n, image_mask_, image_weight_);
  check_side("text_tokens", text_batch, m, text_mask_, text_weight_);

  const OnDevice device(images_);
  const Tensor images = with_unit_stride(images_), texts = with_unit_stride(texts_);
  const Optional image_mask = contiguous(image_mask_), text_mask = contiguous(text_mask_);
  const Tensor image_weight = torch::stable::contiguous(image_weight_);
  const Tensor text_weight = torch::stable::contiguous(text_weight_);
  const auto result = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    Tensor tensor = torch::stable::new_empty(images, shape, type);
    if (image_mask || text_mask) torch::stable::zero_(tensor);  // the kernel writes what has a real token
    return tensor;
  };
  const auto if_wanted = [&](bool wanted, int64_t count, ScalarType type) {
    return wanted ? result({batch, text_batch, count}, type) : torch::stable::new_empty(images, {0}, type);
  };
  Tensor per_image = result({batch, text_batch}, ScalarType::Float);
  Tensor per_text = result({text_batch, batch}, ScalarType::Float);
  Tensor argmax_text = if_wanted(keep_argmax, n, keep_argmax ? index_type(m) : ScalarType::Byte);
  Tensor argmax_image = if_wanted(keep_argmax, m, keep_argmax ? index_type(n) : ScalarType::Byte);
  Tensor text_maxima = if_wanted(keep_maxima, n, ScalarType::Float);
  Tensor image_maxima = if_wanted(keep_maxima, m, ScalarType::Float);
  if (batch > 0 && text_batch > 0) {
    kernels::TokenMaxima problem{};
    problem.type = cuda_type(images.scalar_type());
    problem.channels = channels;
    problem.images = side(images, image_mask, image_weight);
    problem.texts = side(texts, text_mask, text_weight);
    problem.per_image = mutable_data<float>(per_image);
    problem.per_text = mutable_data<float>(per_text);
    problem.argmax_text = keep_argmax ? argmax_text.mutable_data_ptr() : nullptr;
    problem.argmax_image = keep_argmax ? argmax_image.mutable_data_ptr() : nullptr;
    problem.text_maxima = keep_maxima ? mutable_data<float>(text_maxima) : nullptr;
    problem.image_maxima = keep_maxima ? mutable_data<float>(image_maxima) : nullptr;
    problem.argmax_text_bytes = index_bytes(m);
    problem.argmax_image_bytes = index_bytes(n);
    MLIP_CHECK(kernels::choose_tiling(problem), "image_tokens, text_tokens: ", n, " and ", m,
               " tokens are more than the shared memory of this GPU has room for");
    MLIP_CHECK(text_batch <= cuda::LARGEST_GRID && kernels::token_maxima_blocks(problem) <= cuda::LARGEST_GRID,
               "image_tokens, text_tokens: ", batch, " images and ", text_batch,
               " texts are more than one launch takes");
    kernels::token_maxima(problem, device.stream());
    check_launch("contrastive_token_maxima");
  }
  return {per_image, per_text, argmax_text, argmax_image, text_maxima, image_maxima};
}

kernels::Argmax argmax_of(const char* name, const Tensor& indices, int64_t batch, int64_t other_batch, int64_t count,
                          int64_t found) {
  check(name, indices, {batch, other_batch, count}, index_type(found));
  return {indices.const_data_ptr(), index_bytes(found), indices.stride(0), indices.stride(1)};
}

// Whether every token [*, *, D] can be moved four elements at a time.
bool in_fours(const Tensor& tokens) {
  const int64_t bytes = 4 * cuda::size_of(cuda_type(tokens.scalar_type()));
  bool aligned = reinterpret_cast<uintptr_t>(tokens.const_data_ptr()) % bytes == 0 && tokens.size(2) % 4 == 0;
  for (int64_t i = 0; i < 2; ++i) aligned = aligned && (tokens.size(i) == 1 || tokens.stride(i) % 4 == 0);
  return aligned;
}

Tensor token_maxima_backward(const Tensor& grad_mean_, const Tensor& grad_other_mean_, const Tensor& others_,
                             const Optional& mask_, const Optional& other_mask_, const Tensor& weight_,
                             const Tensor& other_weight_, const Tensor& argmax_other_, const Tensor& argmax_) {
  MLIP_CHECK(others_.dim() == 3, "other_tokens: expected [C, M, D]");
  const int64_t other_batch = others_.size(0), m = others_.size(1), channels = others_.size(2);
  MLIP_CHECK(weight_.dim() == 2, "normalized_weight: expected [B, N]");
  const int64_t batch = weight_.size(0), n = weight_.size(1);
  check_side("tokens", batch, n, mask_, weight_);
  check_side("other_tokens", other_batch, m, other_mask_, other_weight_);
  check("grad_mean", grad_mean_, {batch, other_batch}, ScalarType::Float);
  check("grad_other_mean", grad_other_mean_, {other_batch, batch}, ScalarType::Float);

  const OnDevice device(others_);
  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor others = with_unit_stride(others_), weight = dense(weight_), other_weight = dense(other_weight_);
  const Tensor grad_mean = dense(grad_mean_), grad_other_mean = dense(grad_other_mean_);
  const Optional mask = contiguous(mask_), other_mask = contiguous(other_mask_);
  const Tensor argmax_other = with_unit_stride(argmax_other_), argmax = with_unit_stride(argmax_);
  Tensor grad = torch::stable::new_empty(others, {batch, n, channels});
  if (grad.numel() == 0) return grad;

  kernels::TokenMaximaBackward problem{};
  problem.type = cuda_type(others.scalar_type());
  problem.batch = batch;
  problem.other_batch = other_batch;
  problem.channels = channels;
  problem.count = int(n);
  problem.other_count = int(m);
  problem.grad_mean = data<float>(grad_mean);
  problem.grad_other_mean = data<float>(grad_other_mean);
  problem.others = others.const_data_ptr();
  problem.stride_batch = others.stride(0);
  problem.stride_token = others.stride(1);
  problem.mask = flags_or_null(mask);
  problem.other_mask = flags_or_null(other_mask);
  problem.weight = data<float>(weight);
  problem.other_weight = data<float>(other_weight);
  problem.argmax_other = argmax_of("best_other", argmax_other, batch, other_batch, n, m);
  problem.argmax = argmax_of("best", argmax, batch, other_batch, m, n);
  problem.vector = in_fours(others) && in_fours(grad);
  problem.grad = grad.mutable_data_ptr();
  MLIP_CHECK(kernels::token_maxima_backward_blocks(problem) <= cuda::LARGEST_GRID, "normalized_weight: ", batch,
             " rows of ", n, " tokens are more than one launch takes");
  kernels::token_maxima_backward(problem, device.stream());
  check_launch("contrastive_token_maxima_backward");
  return grad;
}

kernels::PairCrossEntropy pair_problem(const Tensor& logits, const Tensor& labels, bool both, double label_smoothing) {
  kernels::PairCrossEntropy problem{};
  problem.type = cuda_type(logits.scalar_type());
  problem.rows = logits.size(0);
  problem.columns = logits.size(1);
  problem.both = both;
  problem.label_smoothing = label_smoothing;
  problem.logits = logits.const_data_ptr();
  problem.stride = logits.stride(0);
  problem.labels = data<int64_t>(labels);
  const int64_t tiles =
      kernels::pair_cross_entropy_row_tiles(problem) * kernels::pair_cross_entropy_column_tiles(problem);
  MLIP_CHECK(tiles <= cuda::LARGEST_GRID, "logits: ", problem.rows, " x ", problem.columns,
             " are more than one launch takes");
  return problem;
}

void check_pairs(const Tensor& logits, const Tensor& labels, bool both) {
  MLIP_CHECK(logits.dim() == 2, "logits: expected [B, C]");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  MLIP_CHECK(!both || rows == columns, "logits: expected [B, B], got ", columns, " columns for ", rows, " rows");
  MLIP_CHECK(rows == 0 || columns >= 1, "logits: expected at least one column");
  check("labels", labels, {rows}, ScalarType::Long);
}

std::tuple<Tensor, Tensor, Tensor> pair_cross_entropy(const Tensor& logits_, const Tensor& labels_, bool both,
                                                      double label_smoothing) {
  check_pairs(logits_, labels_, both);
  const OnDevice device(logits_);
  const Tensor logits = with_unit_stride(logits_), labels = torch::stable::contiguous(labels_);
  const int64_t rows = logits.size(0), columns = both ? logits.size(1) : 0;
  const auto result = [&](std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Float) {
    return torch::stable::new_empty(logits, shape, type);
  };
  Tensor loss = result({}), row_terms = result({2, rows}), column_terms = result({2, columns});
  if (rows == 0) {
    torch::stable::zero_(loss);
    return {loss, row_terms, column_terms};
  }
  kernels::PairCrossEntropy problem = pair_problem(logits, labels, both, label_smoothing);
  Tensor row_partial = result({3, kernels::pair_cross_entropy_column_tiles(problem), rows});
  Tensor column_partial = result({2, kernels::pair_cross_entropy_row_tiles(problem), columns});
  Tensor row_sums = result({4, kernels::pair_cross_entropy_line_blocks(rows)}, ScalarType::Double);
  Tensor column_sums = result({4, kernels::pair_cross_entropy_line_blocks(columns)}, ScalarType::Double);
  problem.vector = rows_are_vectors(logits);
  problem.row_terms = mutable_data<float>(row_terms);
  problem.column_terms = mutable_data<float>(column_terms);
  problem.row_partial = mutable_data<float>(row_partial);
  problem.column_partial = mutable_data<float>(column_partial);
  problem.row_sums = mutable_data<double>(row_sums);
  problem.column_sums = mutable_data<double>(column_sums);
  problem.loss = mutable_data<float>(loss);
  kernels::pair_cross_entropy(problem, device.stream());
  check_launch("contrastive_pair_cross_entropy");
  return {loss, row_terms, column_terms};
}

Tensor pair_cross_entropy_backward(const Tensor& grad, const Tensor& logits_, const Tensor& labels_,
                                   const Tensor& row_terms_, const Tensor& column_terms_, bool both,
                                   double label_smoothing) {
  check_pairs(logits_, labels_, both);
  const int64_t rows = logits_.size(0), columns = logits_.size(1);
  check("grad", grad, {}, ScalarType::Float);
  check("row_terms", row_terms_, {2, rows}, ScalarType::Float);
  check("column_terms", column_terms_, {2, both ? columns : 0}, ScalarType::Float);
  const OnDevice device(logits_);
  const Tensor logits = with_unit_stride(logits_), labels = torch::stable::contiguous(labels_);
  const Tensor row_terms = torch::stable::contiguous(row_terms_);
  const Tensor column_terms = torch::stable::contiguous(column_terms_);
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, columns});
  if (rows == 0) return grad_logits;
  kernels::PairCrossEntropy problem = pair_problem(logits, labels, both, label_smoothing);
  problem.vector =
      rows_are_vectors(logits) && rows_are_vectors(grad_logits) && (!both || rows_are_vectors(column_terms));
  problem.row_terms = mutable_data<float>(row_terms);
  problem.column_terms = mutable_data<float>(column_terms);
  problem.grad = data<float>(grad);
  problem.grad_logits = grad_logits.mutable_data_ptr();
  kernels::pair_cross_entropy_backward(problem, device.stream());
  check_launch("contrastive_pair_cross_entropy_backward");
  return grad_logits;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("contrastive_pair_cross_entropy", TORCH_BOX(&pair_cross_entropy));
  m.impl("contrastive_pair_cross_entropy_backward", TORCH_BOX(&pair_cross_entropy_backward));
  m.impl("contrastive_token_maxima", TORCH_BOX(&token_maxima));
  m.impl("contrastive_token_maxima_backward", TORCH_BOX(&token_maxima_backward));
}

}  // namespace
}  // namespace mlip::bindings
