// The CPU kernels, built once per instruction set (GENPERF_ISA). Vector lanes are classes.
#include "../common/philox_cpu.h"
#include "categorical_sample.h"
#include "weights.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// For each thread an object of `make()`: `row(weights, row, number of the row, its place in the tile)` for
// each row, and `tile(number of the first row, rows)` after some of them.
template <class Make>
void for_rows(const CategoricalArgs& a, const Rows& rows, Make make) {
  const int together = rows.together();
  const int64_t count = rows.count(), tiles = (count + together - 1) / together;
#pragma omp parallel if (count * rows.classes() >= 16384)
  {
    Weights weights(rows.classes(), a.temperature, a.top_k, a.top_p);
    Scratch<float> buffer(rows.in_place() ? 0 : together * rows.pitch());
    int64_t offset[Rows::kTogether];
    Row row;
    auto user = make();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t start = t * together;
      const int n = static_cast<int>(count - start < together ? count - start : together);
      rows.locate(start, n, offset);
      if (!rows.in_place()) rows.read(offset, n, buffer.get());
      for (int i = 0; i < n; ++i) {
        row.set(rows.in_place() ? rows.at(offset[i]) : buffer.get() + i * rows.pitch(), rows.classes());
        weights.set(row);
        user.row(weights, row, start + i, i);
      }
      user.tile(start, n);
    }
  }
}

int64_t* index_of(const CategoricalArgs& a) { return static_cast<int64_t*>(a.index.data); }
float* log_prob_of(const CategoricalArgs& a) { return static_cast<float*>(a.log_prob.data); }

double uniform_of(const CategoricalArgs& a, int64_t per_sample, int64_t row) {
  if (a.noise && a.noise.dtype == DType::kFloat64) return static_cast<const double*>(a.noise.data)[row];
  if (a.noise) return static_cast<const float*>(a.noise.data)[row];
  const int64_t sample = a.key.ndim == 2 ? row / per_sample : 0;
  const uint64_t element = static_cast<uint64_t>(row - sample * (a.key.ndim == 2 ? per_sample : 0));
  uint32_t words[4];
  philox_words(philox_key(a.key, sample), element / 4, words);
  return uniform_from_bits<float>(words[element % 4]);
}

struct Draw {
  const CategoricalArgs& a;
  const int64_t per_sample;

  void row(const Weights& weights, const Row&, int64_t i, int) const {
    const int64_t chosen = weights.valid() ? weights.choose(uniform_of(a, per_sample, i)) : 0;
    index_of(a)[i] = chosen;
    if (a.log_prob) log_prob_of(a)[i] = weights.log_prob(chosen);
  }
  void tile(int64_t, int) const {}
};

struct Nats {
  const CategoricalArgs& a;

  void row(const Weights& weights, const Row&, int64_t i, int) const {
    log_prob_of(a)[i] = weights.log_prob(index_of(a)[i]);
  }
  void tile(int64_t, int) const {}
};

// (1 for the class, else 0, less its probability) / temperature * grad, of the classes that are kept.
struct Gradient {
  const CategoricalArgs& a;
  const Rows& out;
  Scratch<float> buffer;  // of a tile, unless it is written in place

  Gradient(const CategoricalArgs& args, const Rows& rows, int together)
      : a(args), out(rows), buffer(out.in_place() ? 0 : together * out.pitch()) {}

  void row(const Weights& weights, const Row& row, int64_t i, int place) const {
    int64_t offset;
    out.locate(i, 1, &offset);
    float* const to = out.in_place() ? out.at(offset) : buffer.get() + place * out.pitch();
    const int64_t n = row.n, chosen = index_of(a)[i];
    if (!weights.valid() || chosen < 0 || chosen >= n) {
      for (int64_t k = 0; k < n; ++k) to[k] = kNaN;
      return;
    }
    const float grad = static_cast<const float*>(a.grad.data)[i] / a.temperature, total = weights.total();
    const float share = 1.0f / total;
    int64_t b = 0;
    for (; b < n / kLanes; ++b) store(to + b * kLanes, -(weights.block(b) * share) * grad);
    alignas(64) float block[kLanes];
    if (b < blocks_of(n)) {
      store(block, -(weights.block(b) * share) * grad);
      for (int64_t k = b * kLanes; k < n; ++k) to[k] = block[k % kLanes];
    }
    if (weights.keeps(chosen)) {
      store(block, weights.block(chosen / kLanes));
      to[chosen] = (1.0f - block[chosen % kLanes] / total) * grad;
    }
  }

  void tile(int64_t start, int n) const {
    if (out.in_place()) return;
    int64_t offset[Rows::kTogether];
    out.locate(start, n, offset);
    out.write(offset, n, buffer.get());
  }
};

}  // namespace

void categorical_draw(const CategoricalArgs& a) {
  const Rows rows(a.logits);
  const int64_t samples = a.logits.ndim > 1 ? a.logits.shape[0] : 1;
  for_rows(a, rows, [&] { return Draw{a, samples > 0 ? rows.count() / samples : 0}; });
}

void categorical_nats(const CategoricalArgs& a) {
  for_rows(a, Rows(a.logits), [&] { return Nats{a}; });
}

void categorical_gradient(const CategoricalArgs& a) {
  const Rows rows(a.logits), out(a.of_logits);
  for_rows(a, rows, [&] { return Gradient(a, out, rows.together()); });
}

}  // namespace GENPERF_ISA
}  // namespace genperf
