// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <cstring>

#include "statistics.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// Vectors whose sums over them are made in one go: from the shapes alone, so that the order of additions is.
int64_t vectors_of_chunk(int64_t n) {
  const int64_t wanted = round_up((n + 63) / 64, 96);
  return wanted > 960 ? 960 : wanted;
}

bool large(const SoftAssignmentHead& a) {
  return static_cast<double>(a.n) * a.codewords * (a.dim + 16) > 1e6;
}

// total += part
void add_to(Scratch<double>& total, const Scratch<float>& part) {
  for (int64_t i = 0; i < total.size(); ++i) total[i] += part[i];
}

void write(const float* from, int64_t n, DType dtype, void* to, int64_t offset) {
  if (dtype == DType::kFloat32)
    std::memcpy(static_cast<float*>(to) + offset, from, n * sizeof(float));
  else
    narrow(from, static_cast<int>(n), dtype, static_cast<uint16_t*>(to) + offset, 1);
}

void forward_of_block(const SoftAssignmentHead& a, Scores& block, float* mean) {
  for (int i = 0; i < block.n; ++i) {
    const RowSums r = block.sums(i, nullptr);
    const int64_t n = block.first + i;
    a.log_sum_exp[n] = static_cast<float>((r.largest + block.shift(i)) + std::log(r.sum));
    a.entropy[n] = static_cast<float>(r.entropy());
    if (a.nll) {
      const int64_t target = a.targets[n];
      const bool known = target >= 0 && target < a.codewords;
      const float* s = block.s.get() + i * block.pitch;
      a.nll[n] = known ? static_cast<float>(std::log(r.sum) - (static_cast<double>(s[target]) - r.largest))
                 : target == -1 ? 0.0f
                                : kNaN;
    }
    if (!mean) continue;
    const Vf inverse = splat<Vf>(static_cast<float>(1.0 / r.sum));
    for (int64_t k = 0; k < block.words.padded; k += kLanes)
      store(mean + k, multiply_add(load(block.e.get() + k), inverse, load(mean + k)));
  }
}

// The gradient by the scores of vector i in place of these, times what makes it that of the distances; its
// sum over the codewords, and over vectors into `by_word`.
float gradient_of_row(const SoftAssignmentHead& a, Scores& block, int i, const float* of_mean,
                      float* by_word) {
  const RowSums r = block.sums(i, of_mean);
  const int64_t n = block.first + i, target = a.targets ? a.targets[n] : -1;
  const bool known = target >= 0 && target < a.codewords;
  const double of_nll = a.nll && known ? a.nll[n] : 0.0, of_entropy = a.entropy ? a.entropy[n] : 0.0;
  // p (constant + slope (s - largest) + of_mean)
  double constant = of_nll + (a.log_sum_exp ? a.log_sum_exp[n] : 0.0) - r.weighted / r.sum;
  if (a.entropy) constant += of_entropy * (r.moment / r.sum);
  const Vf factor = splat<Vf>(static_cast<float>(1.0 / r.sum)),
           base = splat<Vf>(static_cast<float>(constant)), slope = splat<Vf>(static_cast<float>(-of_entropy));
  float* s = block.s.get() + i * block.pitch;
  const float* e = block.e.get();
  const float at_target = known ? s[target] : 0.0f;
  const bool root = a.score == Score::kEuclidean;
  const float minus = static_cast<float>(-a.temperature);
  const auto of_distance = [&](auto g, auto score) {
    auto distance = score * minus;
    return select(distance <= kLeast, splat<decltype(g)>(0.0f), g / (2.0f * distance));
  };
  Vf sum = splat<Vf>(0.0f);
  for (int64_t from = 0; from < block.words.padded; from += kSegment) {
    const int64_t end = from + kSegment < block.words.padded ? from + kSegment : block.words.padded;
    Vf here = splat<Vf>(0.0f);
    for (int64_t k = from; k < end; k += kLanes) {
      const Vf score = load(s + k);
      Vf g = multiply_add(slope, not_infinite(score - r.largest), base);
      if (of_mean) g = g + load(of_mean + k);
      g = g * (load(e + k) * factor);
      if (root) g = of_distance(g, score);
      store(s + k, g);
      here = here + g;
      if (by_word) store(by_word + k, load(by_word + k) + g);
    }
    sum = sum + here;
  }
  float less = static_cast<float>(of_nll);
  if (known && root) less = of_distance(less, at_target);
  if (known) s[target] -= less;
  if (known && by_word) by_word[target] -= less;
  return static_cast<float>(total(sum) - (known ? less : 0.0f));
}

// From the gradient by a row as the products see it, to that of the row as given.
template <class T>
void through(const Words& words, double temperature, const float* row, float inverse, double sum,
             T* gradient) {
  if (words.by_distance()) {
    for (int64_t d = 0; d < words.dim; ++d)
      gradient[d] = static_cast<T>((gradient[d] - sum * row[d]) * (2.0 / temperature));
    return;
  }
  double along = 0.0;
  const bool cosine = words.score == Score::kCosine;
  for (int64_t d = 0; cosine && d < words.dim; ++d) along += static_cast<double>(gradient[d]) * row[d];
  for (int64_t d = 0; d < words.dim; ++d)
    gradient[d] = static_cast<T>((gradient[d] - along * row[d]) * (inverse / temperature));
}

}  // namespace

void soft_forward(const SoftAssignmentHead& a) {
  const Words words(a);
  Scratch<double> total(a.mean_prob ? words.padded : 0, 0.0);
  const int64_t chunk = vectors_of_chunk(a.n);
#pragma omp parallel if (large(a))
  {
    Scores block(a, words);
    Scratch<float> mean(total.size());
#pragma omp for ordered schedule(static, 1)
    for (int64_t from = 0; from < a.n; from += chunk) {
      const int64_t end = from + chunk < a.n ? from + chunk : a.n;
      mean.fill(0.0f);
      for (int64_t i = from; i < end; i += block.most) {
        block.open(i, i + block.most < end ? i + block.most : end);
        forward_of_block(a, block, a.mean_prob ? mean.get() : nullptr);
      }
#pragma omp ordered
      add_to(total, mean);
    }
  }
  for (int64_t k = 0; a.mean_prob && k < a.codewords; ++k)
    a.mean_prob[k] = a.n == 0 ? 0.0f : static_cast<float>(total[k] / a.n);
}

void soft_backward(const SoftAssignmentHead& a) {
  const Words words(a);
  const bool by_word = a.grad_codebook != nullptr;
  Scratch<float> of_mean(words.padded, 0.0f);
  for (int64_t k = 0; a.mean_prob && a.n > 0 && k < a.codewords; ++k)
    of_mean[k] = static_cast<float>(static_cast<double>(a.mean_prob[k]) / a.n);
  Scratch<double> total(by_word ? words.padded * words.pitch : 0, 0.0), sums(by_word ? words.padded : 0, 0.0);
  const int64_t chunk = vectors_of_chunk(a.n);
#pragma omp parallel if (large(a))
  {
    Scores block(a, words);
    Scratch<float> gradient(block.most * words.pitch), partial(total.size()), partial_sums(sums.size());
    Scratch<float> row_sums(block.most);
#pragma omp for ordered schedule(static, 1)
    for (int64_t from = 0; from < a.n; from += chunk) {
      const int64_t end = from + chunk < a.n ? from + chunk : a.n;
      partial.fill(0.0f), partial_sums.fill(0.0f);
      for (int64_t i = from; i < end; i += block.most) {
        block.open(i, i + block.most < end ? i + block.most : end);
        for (int r = 0; r < block.n; ++r)
          row_sums[r] = gradient_of_row(a, block, r, a.mean_prob ? of_mean.get() : nullptr,
                                        by_word ? partial_sums.get() : nullptr);
        if (by_word)
          multiply({block.s.get(), 1, block.pitch}, block.x.rows.get(), words.pitch, words.padded,
                   words.pitch, block.n, partial.get(), words.pitch, true);
        if (!a.grad_x) continue;
        multiply({block.s.get(), block.pitch, 1}, words.rows.get(), words.pitch, round_up(block.n, kTile),
                 words.pitch, words.padded, gradient.get(), words.pitch, false);
        for (int r = 0; r < block.n; ++r) {
          float* row = gradient.get() + r * words.pitch;
          for (int64_t d = 0; a.score == Score::kDot && words.centred && d < words.dim; ++d)
            row[d] += row_sums[r] * words.mean[d];
          through(words, a.temperature, block.x.rows.get() + r * words.pitch, block.x.inverse[r], row_sums[r],
                  row);
          write(row, words.dim, a.x.dtype, a.grad_x, (i + r) * words.dim);
        }
      }
      if (by_word) {
#pragma omp ordered
        {
          add_to(total, partial);
          add_to(sums, partial_sums);
        }
      }
    }
  }
  Scratch<float> row(words.dim);
  for (int64_t k = 0; by_word && k < a.codewords; ++k) {
    double* gradient = total.get() + k * words.pitch;
    through(words, a.temperature, words.rows.get() + k * words.pitch, words.inverse[k], sums[k], gradient);
    for (int64_t d = 0; d < words.dim; ++d) row[d] = static_cast<float>(gradient[d]);
    write(row.get(), words.dim, a.x.dtype, a.grad_codebook, k * words.dim);
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
