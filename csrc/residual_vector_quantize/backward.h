// The gradient by x, vector by vector: through the stages for their residuals, and back.
//
// With a_i the gradient by r_i, J_i the estimator's derivative and f the fraction,
//   a_i = a_{i+1} + J_i' (g - f a_{i+1}) + coefficient_i (r_i - c_i).
#pragma once

#include <cmath>

#include "../vector_quantize/row.h"
#include "stages.h"

namespace genperf {
namespace GENPERF_ISA {
namespace residual {

class Gradient {
 public:
  Gradient(const ResidualBackwardArgs& a, const Sizes& s)
      : a_(a),
        s_(s),
        residual_((s.stages + 1) * s.pitch),
        word_(s.stages * s.pitch),
        difference_(s.stages * s.pitch),
        here_(s.pitch),
        coefficient_(s.stages) {}

  // grad: the gradient by `quantized` in, by x out; both vectors are padded.
  void run(const View* codebooks, const int64_t* indices, const float* coefficients, const float* x,
           float* grad) {
    const int64_t pitch = s_.pitch, passed = go(codebooks, indices, coefficients, x);
    Scratch<float>& total = total_;
    total.fill(0.0f);
    for (int64_t k = passed - 1; k >= 0; --k) {
      const float *difference = difference_.get() + k * pitch, coefficient = coefficient_[k];
      if (a_.of_sum) {
        for (int64_t d = 0; d < pitch; d += kLanes)
          store(&total[d], load(&total[d]) + load(difference + d) * coefficient);
        continue;
      }
      for (int64_t d = 0; d < pitch; d += kLanes)
        store(&here_[d], load(grad + d) - load(&total[d]) * a_.fraction);
      if (a_.rotation)
        rotated_row(here_.get(), residual_.get() + k * pitch, word_.get() + k * pitch, pitch, here_.get());
      for (int64_t d = 0; d < pitch; d += kLanes)
        store(&total[d], load(&total[d]) + (load(difference + d) * coefficient + load(&here_[d])));
    }
    if (a_.of_sum && passed > 0) {
      std::memcpy(here_.get(), grad, pitch * sizeof(float));
      if (a_.rotation) {
        float* sum = word_.get();
        for (int64_t k = 1; k < passed; ++k)
          for (int64_t d = 0; d < pitch; d += kLanes)
            store(sum + d, load(sum + d) + load(sum + k * pitch + d));
        rotated_row(here_.get(), x, sum, pitch, here_.get());
      }
      for (int64_t d = 0; d < pitch; d += kLanes) store(&total[d], load(&total[d]) + load(&here_[d]));
    }
    std::memcpy(grad, total.get(), pitch * sizeof(float));
  }

 private:
  // Residuals, codewords and their differences of the stages that were not left out; their number.
  int64_t go(const View* codebooks, const int64_t* indices, const float* coefficients, const float* x) {
    const int64_t pitch = s_.pitch;
    std::memcpy(residual_.get(), x, pitch * sizeof(float));
    int64_t passed = 0;
    for (int64_t i = 0; i < s_.stages; ++i) {
      if (indices[i] < 0) continue;
      const float* r = residual_.get() + passed * pitch;
      float *word = word_.get() + passed * pitch, *difference = difference_.get() + passed * pitch;
      read_rows(Rows(codebooks[i]), indices[i], 1, s_.dim, word, pitch);
      for (int64_t d = 0; d < pitch; d += kLanes) store(difference + d, load(r + d) - load(word + d));
      coefficient_[passed++] = coefficients[i];
      float* next = residual_.get() + passed * pitch;
      std::memcpy(next, difference, pitch * sizeof(float));
      round_row(next, s_.dim, a_.x.dtype);
    }
    return passed;
  }

  const ResidualBackwardArgs& a_;
  const Sizes& s_;
  Scratch<float> residual_, word_, difference_;  // of one stage after another
  Scratch<float> here_;
  Scratch<float> coefficient_;
  Scratch<float> total_{s_.pitch};
};

inline void backward(const ResidualBackwardArgs& a) {
  constexpr int64_t kRows = 32;
  const Sizes s(a);
  const int64_t blocks = (s.n + kRows - 1) / kRows;
  [[maybe_unused]] const bool large = static_cast<double>(s.groups * s.n) * s.dim * s.stages > 1e5;
#pragma omp parallel if (large)
  {
    Subnormals mine;
    Gradient gradient(a, s);
    Scratch<float> x(kRows * s.pitch), grad(kRows * s.pitch);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.groups * blocks; ++b) {
      const int64_t group = b / blocks, first = b % blocks * kRows, n = std::min(kRows, s.n - first);
      read_rows(Rows(select_first(a.x, group)), first, n, s.dim, x.get(), s.pitch);
      read_rows(Rows(select_first(a.grad, group)), first, n, s.dim, grad.get(), s.pitch);
      const int64_t* indices = static_cast<const int64_t*>(a.indices.data);
      const float* coefficients = static_cast<const float*>(a.coefficients.data) + group * s.stages;
      for (int64_t r = 0; r < n; ++r)
        gradient.run(a.codebooks + group * s.stages, indices + (group * s.n + first + r) * s.stages,
                     coefficients, x.get() + r * s.pitch, grad.get() + r * s.pitch);
      RowsOut(select_first(a.grad_x, group)).write(first, n, grad.get(), s.pitch);
    }
  }
}

}  // namespace residual
}  // namespace GENPERF_ISA
}  // namespace genperf
