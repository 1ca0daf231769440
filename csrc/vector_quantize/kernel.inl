// CPU kernels, built once per instruction set (GENPERF_ISA).
//
// A block of vectors passes through the cache once. Which vectors are a block follows from the shapes, so
// that sums are the same for any number of threads.
#include <algorithm>

#include "../codebook_statistics/codes.h"
#include "../codebook_statistics/segments.h"
#include "../vq_nearest/rows_out.h"
#include "row.h"
#include "vector_quantize.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// Vectors of all heads in blocks, and in groups that share a mean: a block is part of a group, or several
// whole ones.
struct Blocks {
  int64_t rows, dim, heads, of_head;  // of_head: vectors of a head
  int64_t groups, of_group;           // of_group: vectors of a group
  int64_t most;                       // vectors of a block
  int64_t blocks_of_group, of_block;  // of_block: groups of a block
  int64_t n;

  Blocks(const View& x, Reduction reduction) {
    heads = x.shape[0], dim = x.shape[x.ndim - 1];
    rows = x.numel() / dim, of_head = heads == 0 ? 0 : rows / heads;
    groups = reduction == Reduction::kMean ? 1 : reduction == Reduction::kSample ? heads * x.shape[1] : rows;
    of_group = groups == 0 ? 0 : rows / groups;
    most = std::clamp<int64_t>((1 << 15) / dim, 8, Rows::kMost);
    blocks_of_group = of_group > most ? (of_group + most - 1) / most : 1;
    of_block = of_group > most || of_group == 0 ? 1 : most / of_group;
    n = rows == 0 ? 0 : blocks_of_group > 1 ? groups * blocks_of_group : (groups + of_block - 1) / of_block;
  }

  int64_t first(int64_t block) const {
    return blocks_of_group > 1 ? block / blocks_of_group * of_group + block % blocks_of_group * most
                               : block * of_block * of_group;
  }
  int64_t end(int64_t block) const {
    const int64_t begin = first(block);
    return blocks_of_group > 1 ? std::min(begin + most, (begin / of_group + 1) * of_group)
                               : std::min(begin + of_block * of_group, rows);
  }
  bool large() const { return rows * dim > 1 << 15; }
};

// The sum of a group's terms, and how many.
struct Sum {
  double value;
  int64_t number;
};

float mean(const Sum& sum, int64_t dim) {
  return static_cast<float>(sum.value / (static_cast<double>(std::max<int64_t>(sum.number, 1)) * dim));
}

int64_t* integers(const View& v) { return static_cast<int64_t*>(v.data); }
float* floats(const View& v) { return static_cast<float*>(v.data); }

// Indices as they are used: those given or found, -1 where the mask is 0.
void choose(const QuantizeArgs& a, int64_t n) {
  int64_t* const chosen = integers(a.chosen);
  if (a.mask) {
    Scratch<int64_t> mask(n);
    read_codes(a.mask, 2, mask.get());
    Scratch<int64_t> given(a.indices ? n : 0);
    if (a.indices) read_codes(a.indices, a.codebook.shape[1], given.get());
    for (int64_t i = 0; i < n; ++i) chosen[i] = mask[i] ? (a.indices ? given[i] : chosen[i]) : -1;
  } else if (a.indices) {
    read_codes(a.indices, a.codebook.shape[1], chosen);
  }
}

void count(const int64_t* chosen, const Blocks& b, int64_t codewords, int64_t* counts) {
  std::fill(counts, counts + b.heads * codewords, int64_t{0});
  for (int64_t i = 0, h = 0; h < b.heads; ++h)
    for (const int64_t end = (h + 1) * b.of_head; i < end; ++i)
      if (chosen[i] >= 0) ++counts[h * codewords + chosen[i]];
}

// For each group, what a gradient of its mean is for a term of a vector: times 2, over the number of terms.
void coefficients(const View& gradient, const int64_t* chosen, const Blocks& b, float* to) {
  const View all = collapse(gradient);
  Position at(all, 0);
  for (int64_t g = 0; g < b.groups; at.next_run(all))
    for (int64_t j = 0; j < at.run && g < b.groups; ++j, ++g) {
      int64_t number = 0;
      for (int64_t i = g * b.of_group; i < (g + 1) * b.of_group; ++i) number += chosen[i] >= 0;
      const float value = floats(all)[at.offset + j * all.stride[all.ndim - 1]];
      to[g] = 2.0f * value / (static_cast<float>(std::max<int64_t>(number, 1)) * static_cast<float>(b.dim));
    }
}

// b (c - x), for the gradient of the codebook.
struct Pull {
  struct Columns {
    const Rows words;
    const float* coefficient;
    int64_t first_row, of_group, width;
    Scratch<float> word;

    const float* operator()(int64_t row, int64_t code, const float* x, float* buffer) const {
      const float* c = words.row(code, word.get());
      const float b = coefficient[of_group == 1 ? first_row + row : (first_row + row) / of_group];
      for (int64_t d = 0; d < width; d += kLanes)
        store_some(buffer + d, (load_some(c + d, width - d) - load_some(x + d, width - d)) * b, width - d);
      return buffer;
    }
  };

  Columns operator()(int64_t head, int64_t first, int64_t width) const {
    return {Rows(sliced(select_first(codebook, head), 1, first, width)),
            coefficient,
            head * blocks.of_head,
            blocks.of_group,
            width,
            Scratch<float>(width)};
  }

  const View& codebook;
  const Blocks& blocks;
  const float* coefficient;
};

}  // namespace

void vector_quantize_forward(const QuantizeArgs& a) {
  const Blocks b(a.x, a.reduction);
  const int64_t codewords = a.codebook.shape[1];
  choose(a, b.rows);
  const int64_t* const chosen = integers(a.chosen);
  const Rows x(a.x), words(a.codebook);
  const RowsOut quantized(a.quantized);
  Scratch<Sum> sums(b.n);
#pragma omp parallel if (b.large())
  {
    Scratch<float> x_tile(b.most * b.dim), q_tile(b.most * b.dim), word(b.dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b.n; ++i) {
      const int64_t first = b.first(i);
      const int n = static_cast<int>(b.end(i) - first);
      int64_t x_pitch, q_pitch;
      const float* xs = x.some(first, n, x_tile.get(), x_pitch);
      float* qs = quantized.open(first, n, q_tile.get(), q_pitch);
      Sum sum{};
      for (int r = 0; r < n; ++r) {
        const int64_t row = first + r, code = chosen[row];
        float* q = qs + r * q_pitch;
        if (code < 0) {
          std::fill(q, q + b.dim, 0.0f);
        } else {
          const float* c = words.row(row / b.of_head * codewords + code, word.get());
          sum.value += quantize_row(xs + r * x_pitch, c, b.dim, q);
          ++sum.number;
        }
        if (b.blocks_of_group == 1 && (row + 1) % b.of_group == 0) {
          floats(a.squares)[row / b.of_group] = mean(sum, b.dim);
          sum = {};
        }
      }
      sums[i] = sum;
      quantized.close(first, n, qs, q_tile.get());
    }
  }
  for (int64_t g = 0; g < b.groups && (b.blocks_of_group > 1 || b.rows == 0); ++g) {
    Sum all{};
    for (int64_t i = g * b.blocks_of_group; i < (g + 1) * b.blocks_of_group && i < b.n; ++i)
      all.value += sums[i].value, all.number += sums[i].number;
    floats(a.squares)[g] = mean(all, b.dim);
  }
  if (a.counts) count(chosen, b, codewords, integers(a.counts));
}

namespace {

void backward_of_x(const QuantizeBackwardArgs& a, const Blocks& b) {
  const int64_t codewords = a.codebook.shape[1];
  const int64_t* const chosen = integers(a.chosen);
  Scratch<float> coefficient(a.of_commitment ? b.groups : 0);
  if (a.of_commitment) coefficients(a.of_commitment, chosen, b, coefficient.get());
  const Rows x(a.x), words(a.codebook), grad(a.grad ? a.grad : a.x);
  const RowsOut out(a.grad_x);
#pragma omp parallel if (b.large())
  {
    const int64_t size = b.most * b.dim;
    Scratch<float> x_tile(size), g_tile(size), out_tile(size), word(b.dim), turned(b.dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b.n; ++i) {
      const int64_t first = b.first(i);
      const int n = static_cast<int>(b.end(i) - first);
      int64_t x_pitch, g_pitch = 0, out_pitch;
      const float* xs = x.some(first, n, x_tile.get(), x_pitch);
      const float* gs = a.grad ? grad.some(first, n, g_tile.get(), g_pitch) : nullptr;
      float* outs = out.open(first, n, out_tile.get(), out_pitch);
      for (int r = 0; r < n; ++r) {
        const int64_t row = first + r, code = chosen[row];
        float* to = outs + r * out_pitch;
        if (code < 0) {
          std::fill(to, to + b.dim, 0.0f);
          continue;
        }
        const float* c = words.row(row / b.of_head * codewords + code, word.get());
        const float* from = xs + r * x_pitch;
        const float* g = gs ? gs + r * g_pitch : nullptr;
        if (g && a.rotation) {
          rotated_row(g, from, c, b.dim, turned.get());
          g = turned.get();
        }
        if (a.of_commitment)
          straight_row(g, from, c, coefficient[row / b.of_group], b.dim, to);
        else
          std::memcpy(to, g, b.dim * sizeof(float));
      }
      out.close(first, n, outs, out_tile.get());
    }
  }
}

void backward_of_codebook(const QuantizeBackwardArgs& a, const Blocks& b) {
  const int64_t codewords = a.codebook.shape[1], size = b.heads * codewords * b.dim;
  const int64_t* const chosen = integers(a.chosen);
  const bool single = a.grad_codebook.dtype == DType::kFloat32;
  Scratch<float> coefficient(b.groups), sums(single ? 0 : size);
  Scratch<int32_t> codes(b.rows);
  coefficients(a.of_codebook, chosen, b, coefficient.get());
  for (int64_t i = 0; i < b.rows; ++i) codes[i] = static_cast<int32_t>(chosen[i]);
  Segments segments(b.heads, b.of_head, codewords, b.dim);
  segments.sum(a.x, codes.get(), Pull{a.codebook, b, coefficient.get()},
               single ? floats(a.grad_codebook) : sums.get(), nullptr);
  for (int64_t i = 0; !single && i < b.heads * codewords; ++i)
    narrow(sums.get() + i * b.dim, static_cast<int>(b.dim), a.grad_codebook.dtype,
           static_cast<uint16_t*>(a.grad_codebook.data) + i * b.dim, 1);
}

}  // namespace

void vector_quantize_backward(const QuantizeBackwardArgs& a) {
  const Blocks b(a.x, a.reduction);
  if (a.grad_x && b.rows > 0) backward_of_x(a, b);
  if (a.grad_codebook && b.heads > 0) backward_of_codebook(a, b);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
