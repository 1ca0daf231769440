// CPU kernels, built once per instruction set (GENPERF_ISA).
//
// Some panels of 16 positions at a time: they are read once, from whatever strides and dtype, multiplied by
// tiles of the packed matrix while they are in the first-level cache, and written once. For the gradient of
// the matrix a block of positions is kept, the gradients as panels and the inputs as rows, of which no sum is
// broken off.
#include "factors.h"
#include "mixing.h"
#include "positions.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

bool large(const Positions& positions, int64_t channels) {
  return static_cast<double>(positions.count()) * channels * (channels + 16) > 1e6;
}

// Panels whose sums are made in one go: from the shapes alone, so that the order of additions is.
int64_t panels_of_chunk(int64_t panels) {
  const int64_t wanted = (panels + 63) / 64;
  return wanted < 16 ? 16 : wanted > 64 ? 64 : wanted;
}

// Panels whose gradients and inputs lie in the second-level cache; at most kDepth positions.
int64_t panels_of_block(int64_t channels) {
  const int64_t fit = (1 << 15) / (channels * kLanes);
  return fit < 2 ? 2 : fit > kDepth / kLanes ? kDepth / kLanes : fit;
}

// Panels that lie in the first-level cache, so that a tile of the matrix serves all of them, and a page of
// each channel. Of many channels one: two or three are not faster.
int64_t panels_of_group(int64_t channels) {
  const int64_t fit = 384 / channels;
  return fit < 4 ? 1 : fit > 8 ? 8 : fit;
}

// to = matrix * panels [count, C, 16] of `from`, which is left in `panels`, by way of `room` for as many.
void mix(const Packed& matrix, const Field& from, int64_t panel, int64_t count, const float* before,
         float* panels, const float* after, float* room, Field& to) {
  const float* const run = from.run(panel, count);
  if (!run && count > 1 && from.has_runs()) {  // across the end of a sample: one by one
    for (int64_t k = 0; k < count; ++k)
      mix(matrix, from, panel + k, 1, before, panels + k * from.channels * kLanes, after, room, to);
    return;
  }
  float* const direct = to.run(panel, count);
  const Target target =
      direct ? Target{direct, to.pitch, kLanes, after} : Target{room, kLanes, to.channels * kLanes, after};
  if (run) {
    matrix.multiply(Source{run, from.pitch, from.run(panel + count, count)}, before, panels, count, target);
  } else {
    from.read(panel, count, before, panels);
    matrix.multiply(panels, count, target);
  }
  if (!direct) to.write(panel, count, room);
}

// sums [C, pitch] += gradients times inputs, over `panels` panels of positions.
template <int kRows>
GENPERF_HD void outer_tile(const float* gradient, const float* input, int64_t channels, int64_t pitch,
                           int64_t panels, float* sums) {
  Vf sum[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sum[r] = splat<Vf>(0.0f);
  for (int64_t k = 0; k < panels; ++k, gradient += channels * kLanes)
    for (int j = 0; j < kLanes; ++j, input += pitch) {
      const Vf x = load(input);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) sum[r] = multiply_add(splat<Vf>(gradient[r * kLanes + j]), x, sum[r]);
    }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) store(sums + r * pitch, load(sums + r * pitch) + sum[r]);
}

void add_outer(const float* gradient, const float* input, int64_t channels, int64_t pitch, int64_t panels,
               float* sums) {
  for (int64_t j = 0; j < channels; j += kLanes) {
    int64_t i = 0;
    for (; i + kTile <= channels; i += kTile)
      outer_tile<kTile>(gradient + i * kLanes, input + j, channels, pitch, panels, sums + i * pitch + j);
    if (i < channels)
      with_rows<kTile>(channels - i, [&](auto rows) {
        outer_tile<decltype(rows)::value>(gradient + i * kLanes, input + j, channels, pitch, panels,
                                          sums + i * pitch + j);
      });
  }
}

// Sums over positions: gradient times input [C, pitch], and gradient [C, 16] in sixteen parts.
template <class T>
struct Sums {
  Scratch<T> outer, gradient;

  Sums(int64_t channels, int64_t pitch) : outer(channels * pitch, T(0)), gradient(channels * kLanes, T(0)) {}
  void clear() { outer.fill(T(0)), gradient.fill(T(0)); }
  template <class U>
  void add(const Sums<U>& part) {
    for (int64_t i = 0; i < outer.size(); ++i) outer[i] += part.outer[i];
    for (int64_t i = 0; i < gradient.size(); ++i) gradient[i] += part.gradient[i];
  }
};

// Gradients of the parameters from the sums, and from that of the log-determinants.
void finish(const InvertibleConv1x1Args& a, const Mixing& mixing, const Positions& positions,
            const Sums<double>& sums, int64_t pitch) {
  const int64_t n = mixing.channels;
  double by_total = 0.0;
  for (int64_t b = 0; a.grad_logdet && b < positions.samples; ++b)
    by_total += static_cast<double>(floats_of(a.grad_logdet)[b]) * positions.counted(b);
  if (a.inverse) by_total = -by_total;
  const auto to = [](const View& v) { return v ? static_cast<float*>(v.data) : nullptr; };
  float *of_matrix = to(a.grad_matrix), *of_shift = to(a.grad_shift), *of_scale = to(a.grad_scale);
  *to(a.grad_logabsdet) = static_cast<float>(by_total);
  Scratch<double> by_scale(n, 0.0), by_shift(n, 0.0);
  for (int64_t o = 0; sums.outer.size() > 0 && o < n; ++o) {
    const double* outer = sums.outer.get() + o * pitch;
    double total = 0.0;
    for (int j = 0; j < kLanes; ++j) total += sums.gradient[o * kLanes + j];
    double along = 0.0;
    for (int64_t c = 0; c < n; ++c) {
      const double product = mixing.matrix[o * n + c] * outer[c];
      if (a.inverse)
        along += product;
      else
        by_scale[c] += product, by_shift[c] += mixing.folded(o, c) * total;
      if (of_matrix)
        of_matrix[o * n + c] =
            static_cast<float>(a.inverse ? outer[c] / mixing.s[o] : outer[c] * mixing.s[c]);
    }
    if (a.inverse) by_scale[o] = -along / (mixing.s[o] * mixing.s[o]), by_shift[o] = -total;
  }
  for (int64_t c = 0; c < n; ++c) {
    if (of_shift) of_shift[c] = static_cast<float>(by_shift[c]);
    if (!of_scale) continue;
    const double s = mixing.s[c];
    of_scale[c] = static_cast<float>(a.log ? by_scale[c] * s + by_total : by_scale[c] + by_total / s);
  }
}

}  // namespace

void invertible_forward(const InvertibleConv1x1Args& a) {
  const Mixing mixing(a);
  const int64_t channels = mixing.channels;
  const Positions positions(a.source, a.lengths);
  const double total = *floats_of(a.logabsdet) + mixing.log_scales();
  for (int64_t b = 0; b < positions.samples; ++b)
    static_cast<float*>(a.logdet.data)[b] =
        static_cast<float>(positions.counted(b) * (a.inverse ? -total : total));
  const Packed packed(channels, [&](int64_t o, int64_t c) { return mixing.folded(o, c); });
  const int64_t panels = positions.panels();
  const int64_t group = panels_of_group(channels);
#pragma omp parallel if (large(positions, channels))
  {
    Field from(a.source, positions), to(a.result, positions);
    Scratch<float> input(group * channels * kLanes), room(group * channels * kLanes);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = panels - first < group ? panels - first : group;
      mix(packed, from, first, count, mixing.before(a.inverse), input.get(), mixing.after(a.inverse),
          room.get(), to);
    }
  }
}

void invertible_backward(const InvertibleConv1x1Args& a) {
  const Mixing mixing(a);
  const int64_t channels = mixing.channels, pitch = (round_up(channels, kLanes) / kLanes | 1) * kLanes;
  const Positions positions(a.source, a.lengths);
  const bool reverse = static_cast<bool>(a.undo);
  const bool sums_wanted = a.grad_matrix || a.grad_shift || a.grad_scale;
  const Packed transposed(a.grad_x ? channels : 0, [&](int64_t c, int64_t o) { return mixing.folded(o, c); });
  const Packed undo(reverse ? channels : 0, [&](int64_t c, int64_t o) {
    return mixing.element(floats_of(a.undo), !a.inverse, c, o);
  });
  Sums<double> total(channels, sums_wanted ? pitch : 0);
  const int64_t panels = a.grad_y ? positions.panels() : 0;
  const int64_t chunk = panels_of_chunk(panels), block = panels_of_block(channels);
  const int64_t group = panels_of_group(channels), size = channels * kLanes;
#pragma omp parallel if (large(positions, channels))
  {
    Field source(a.source, positions), grad_y(a.grad_y ? a.grad_y : a.source, positions);
    Field result(reverse ? a.result : a.source, positions), grad_x(a.grad_x ? a.grad_x : a.source, positions);
    Scratch<float> gradients(block * size), rows(block * kLanes * pitch, 0.0f);
    Scratch<float> inputs(group * size), room(group * size);
    Sums<float> part(channels, sums_wanted ? pitch : 0);

    // The inputs of some panels, as the product took them, to `inputs`.
    const auto read_inputs = [&](int64_t first, int64_t count) {
      if (!reverse) return source.read(first, count, mixing.before(a.inverse), inputs.get());
      source.read(first, count, mixing.before(!a.inverse), room.get());
      undo.multiply(room.get(), count, {inputs.get(), kLanes, size, nullptr});
      const float *add = mixing.after(!a.inverse), *x = inputs.get();
      for (int64_t i = 0; add && i < count * channels; ++i)
        store(room.get() + i * kLanes, load(x + i * kLanes) + add[i % channels]);
      result.write(first, count, add ? room.get() : x);
    };

#pragma omp for ordered schedule(static, 1)
    for (int64_t from = 0; from < panels; from += chunk) {
      const int64_t end = from + chunk < panels ? from + chunk : panels;
      part.clear();
      for (int64_t begin = from; begin < end; begin += block) {
        const int64_t n = end - begin < block ? end - begin : block;
        for (int64_t k = 0; k < n; k += group) {
          const int64_t count = n - k < group ? n - k : group;
          float* const gradient = gradients.get() + k * size;
          if (a.grad_x)
            mix(transposed, grad_y, begin + k, count, nullptr, gradient, nullptr, room.get(), grad_x);
          else
            grad_y.read(begin + k, count, nullptr, gradient);
          if (!sums_wanted) continue;
          for (int64_t j = 0; j < count; ++j)
            for (int64_t c = 0; c < channels; ++c) {
              float* const sum = part.gradient.get() + c * kLanes;
              store(sum, load(sum) + load(gradient + j * size + c * kLanes));
            }
          const bool as_rows = !reverse && source.channels_last();
          if (!as_rows) read_inputs(begin + k, count);
          for (int64_t j = 0; j < count; ++j) {
            float* const to = rows.get() + (k + j) * kLanes * pitch;
            if (as_rows)
              source.read_rows(begin + k + j, mixing.before(a.inverse), to, pitch);
            else
              to_rows(inputs.get() + j * size, channels, to, pitch);
          }
        }
        if (sums_wanted) add_outer(gradients.get(), rows.get(), channels, pitch, n, part.outer.get());
      }
#pragma omp ordered
      total.add(part);
    }
  }
  finish(a, mixing, positions, total, pitch);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
