// CPU kernels, built once per instruction set (GENPERF_ISA).
#include "positions.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

bool large(const GumbelQuantizeArgs& a) { return a.logits.numel() > 1 << 15; }

// The codebook as rows of `pitch` floats, with zeros beyond it.
struct Table {
  const int64_t dim, pitch, padded;
  Scratch<float> rows;

  explicit Table(const View& codebook)
      : dim(codebook.shape[1]),
        pitch(round_up(dim, kWords)),
        padded(round_up(codebook.shape[0], kWords)),
        rows(padded * pitch, 0.0f) {
    const Rows from(codebook);
    for (int64_t k = 0; k < codebook.shape[0]; ++k) from.read(k, 1, rows.get() + k * pitch, pitch);
  }
};

// Draws `n` positions; their noisy logits to `held`, if given, kHeld apart for each codeword.
void draw(const Source& source, Reader& reader, int n, Draw& result, Online* logits, float* held) {
  result.open();
  if (logits) logits->open();
  for (int64_t k = 0; k < source.words; ++k) {
    const float* l = reader.logits(k);
    const float* g = reader.noise(k);
    for (int i = 0; i < n; i += kLanes) {
      const Vf logit = load(l + i);
      if (reader.gives_words()) {
        result.take_words(i, logit, g, static_cast<int32_t>(k));
      } else {
        const Vf z = noisy(logit, load(g + i));
        result.take(i, z, static_cast<int32_t>(k));
        if (held) store(held + k * kHeld + i, z);
      }
      if (logits) logits->take(i, logit);
    }
    if (logits && (k % kPart == kPart - 1 || k == source.words - 1)) logits->close_part(padded(n));
  }
}

// exp of the differences from the largest, times `scale`, in place; their sum, and that of their products
// with `weights`, which may be null.
void weigh(int64_t words, int n, const Lane& largest, float scale, const float* weights, float* held,
           Lane& sum, Lane& weighted) {
  const Vf zero = splat<Vf>(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vf most = load(largest + i);
    Vf total = zero, of_weights = zero;
    for (int64_t from = 0; from < words; from += kPart) {
      const int64_t end = from + kPart < words ? from + kPart : words;
      Vf here = zero, weights_here = zero;
      for (int64_t k = from; k < end; ++k) {
        float* at = held + k * kHeld + i;
        const Vf y = exp_of_negative(not_infinite((load(at) - most) * scale));
        store(at, y);
        here = here + y;
        if (weights) weights_here = multiply_add(y, load(weights + k * kHeld + i), weights_here);
      }
      total = total + here, of_weights = of_weights + weights_here;
    }
    store(sum + i, total), store(weighted + i, of_weights);
  }
}

// The sums over the logits without noise that the gradient of the divergence takes.
void sum_logits(const Source& source, Reader& reader, int n, Online& logits) {
  logits.open();
  for (int64_t k = 0; k < source.words; ++k) {
    const float* l = reader.logits(k);
    for (int i = 0; i < n; i += kLanes) logits.take(i, load(l + i));
    if (k % kPart == kPart - 1 || k == source.words - 1) logits.close_part(padded(n));
  }
}

// Gradients by the logits of one block, from its y, unnormalised, in `y` and those by y in `by_y`; `first` is
// the number of its first position.
void gradient_of_logits(const GumbelQuantizeArgs& a, const Source& source, Reader& reader, int64_t first,
                        int n, const float* y, const float* by_y, const Lane& sum, const Lane& weighted,
                        const Online& logits) {
  Buffer kl_buffer = {};
  const float temperature = static_cast<float>(1.0 / a.temperature);
  const View out = collapse(a.grad_logits);
  const float* of_kl = nullptr;
  if (a.grad_kl) of_kl = read_chunk(collapse(a.grad_kl), first, n, kl_buffer);
  for (int64_t k = 0; k < source.words; ++k) {
    const float* l = of_kl ? reader.logits(k) : nullptr;
    float* g = reader.open_gradient(out, k);
    for (int i = 0; i < n; i += kLanes) {
      Vf gradient = splat<Vf>(0.0f);
      if (by_y) {
        const Vf inverse = 1.0f / load(sum + i), mean = load(weighted + i) * inverse;
        gradient = load(y + k * kHeld + i) * inverse * (load(by_y + k * kHeld + i) - mean) * temperature;
      }
      if (of_kl) {
        const Vf inverse = 1.0f / load(logits.sum + i),
                 difference = not_infinite(load(l + i) - load(logits.largest + i));
        const Vf q = exp_of_negative(difference) * inverse;
        gradient = gradient + load(of_kl + i) * q * (difference - load(logits.moment + i) * inverse);
      }
      store(g + i, gradient);
    }
    reader.close_gradient(out, k, g);
  }
  reader.close_gradients(out);
}

void mix_of_block(const GumbelQuantizeArgs& a, const Table& table, const Reader& reader, int n,
                  const float* y, const Lane& sum, const Draw& drawn, float* mixed) {
  multiply({table.rows.get(), 1, table.pitch}, y, kHeld, table.pitch, kHeld, a.logits.shape[1], mixed, kHeld,
           false);
  const int64_t positions = a.logits.shape[2];
  for (int64_t d = 0; d < table.dim; ++d) {
    float* to = static_cast<float*>(a.mix.data) + d * positions;
    for (int i = 0; i < n; ++i)
      to[reader.place(table.dim, i)] = mixed[d * kHeld + i] / sum[i] + drawn.doubt[i];
  }
}

}  // namespace

void gumbel_forward(const GumbelQuantizeArgs& a) {
  const Source source(a);
  const bool mix = static_cast<bool>(a.mix);
  const Blocks blocks(source, a.logits.shape[0], mix ? kHeld : kDrawn);
  const Table table(mix ? a.codebook : View{nullptr, DType::kFloat32, 2});
  const double log_words = std::log(static_cast<double>(source.words));
  const float scale = static_cast<float>(1.0 / a.temperature);
#pragma omp parallel if (large(a))
  {
    Reader reader(source, mix ? GumbelForm::kGumbels : GumbelForm::kWords);
    Draw drawn;
    Online logits;
    Lane sum, unused;
    Scratch<float> y(mix ? table.padded * kHeld : 0, 0.0f), mixed(mix ? table.pitch * kHeld : 0);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t sample = blocks.sample(b), position = blocks.first(b);
      const int n = blocks.size(b);
      reader.open(sample, position, n, true);
      draw(source, reader, n, drawn, a.kl ? &logits : nullptr, mix ? y.get() : nullptr);
      for (int i = 0; i < n; ++i) {
        const int64_t at = sample * source.positions + position + i;
        static_cast<int64_t*>(a.indices.data)[at] = drawn.doubt[i] == 0.0f ? drawn.index[i] : -1;
        if (a.kl) static_cast<float*>(a.kl.data)[at] = static_cast<float>(log_words - logits.entropy(i));
      }
      if (!mix) continue;
      weigh(source.words, n, drawn.largest, scale, nullptr, y.get(), sum, unused);
      mix_of_block(a, table, reader, n, y.get(), sum, drawn, mixed.get());
    }
  }
}

void gumbel_backward(const GumbelQuantizeArgs& a) {
  const Source source(a);
  const Blocks blocks(source, a.logits.shape[0], kHeld);
  const bool by_mix = static_cast<bool>(a.grad_mix), by_codebook = by_mix && a.grad_codebook;
  const Table table(by_mix ? a.codebook : View{nullptr, DType::kFloat32, 2});
  const View grad_mix = by_mix ? collapse(a.grad_mix) : View{};
  const float scale = static_cast<float>(1.0 / a.temperature);
  Scratch<double> total(by_codebook ? table.padded * table.pitch : 0, 0.0);
  const int64_t chunk = (blocks.count + 63) / 64;
#pragma omp parallel if (large(a))
  {
    Reader reader(source, GumbelForm::kGumbels);
    Draw drawn;
    Online logits;
    Lane sum, weighted;
    Scratch<float> y(by_mix ? table.padded * kHeld : 0, 0.0f), by_y(y.size());
    Scratch<float> gradient(by_mix ? table.dim * kHeld : 0, 0.0f),
        turned(by_codebook ? kHeld * table.pitch : 0, 0.0f);
    Scratch<float> partial(total.size());
#pragma omp for ordered schedule(static, 1)
    for (int64_t from = 0; from < blocks.count; from += chunk) {
      partial.fill(0.0f);
      for (int64_t b = from; b < from + chunk && b < blocks.count; ++b) {
        const int64_t sample = blocks.sample(b), position = blocks.first(b);
        const int n = blocks.size(b);
        reader.open(sample, position, n, by_mix);
        if (by_mix) {
          reader.gather(grad_mix, table.dim, gradient.get());
          draw(source, reader, n, drawn, nullptr, y.get());
          multiply({table.rows.get(), table.pitch, 1}, gradient.get(), kHeld, table.padded, kHeld, table.dim,
                   by_y.get(), kHeld, false);
          weigh(source.words, n, drawn.largest, scale, by_y.get(), y.get(), sum, weighted);
        }
        if (a.grad_logits) {
          if (a.grad_kl) sum_logits(source, reader, n, logits);
          gradient_of_logits(a, source, reader, sample * source.positions + position, n, y.get(),
                             by_mix ? by_y.get() : nullptr, sum, weighted, logits);
        }
        if (!by_codebook) continue;
        for (int i = 0; i < n; ++i)
          for (int64_t d = 0; d < table.dim; ++d)
            turned[i * table.pitch + d] = gradient[d * kHeld + i] / sum[i];
        multiply({y.get(), kHeld, 1}, turned.get(), table.pitch, table.padded, table.pitch, n, partial.get(),
                 table.pitch, true);
      }
      if (by_codebook) {
#pragma omp ordered
        for (int64_t i = 0; i < total.size(); ++i) total[i] += partial[i];
      }
    }
  }
  for (int64_t k = 0; by_codebook && k < source.words; ++k)
    for (int64_t d = 0; d < table.dim; ++d)
      static_cast<float*>(a.grad_codebook.data)[k * table.dim + d] =
          static_cast<float>(total[k * table.pitch + d]);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
