// CPU kernels, built once per instruction set (GENPERF_ISA).
//
// One loop does all the arithmetic: kTile sums, each over a vector of kWidth rows, of products of a packed
// vector and a scalar that is read where it lies. Forward (and for the gradient of x) the packed vectors are
// weights, and the scalars pixels of the source; for the gradient of the weight the packed vectors are
// gradients, and the scalars again pixels. The source is copied once, by blocks of rows of the image, into
// a buffer with the zeros around it, so that a pair (channel, tap) is an offset and no index is ever tested.
#include "../common/lanes.h"
#include "../common/scratch.h"
#include "../common/transpose.h"
#include "plan.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// kTile x kWide blocks of 16 sums fill the registers, with room for one vector and one scalar.
#if defined(__AVX512F__)
constexpr int kTile = 8, kWide = 2;
#elif defined(__AVX2__)
constexpr int kTile = 6, kWide = 1;
#else
constexpr int kTile = 2, kWide = 1;
#endif
constexpr int kWidth = kWide * kLanes;
constexpr int64_t kDepth = 256;  // products in one chain: packed vectors that the first-level cache holds
constexpr int64_t kBlockPixels = 256;   // of dst, for which a source is copied
constexpr int64_t kPairsPerTask = 768;  // of the gradient of the weight
constexpr int64_t kSlices = 8;          // of the batch, for the gradient of the weight
constexpr int64_t kSliceElements = 1 << 22;

GENPERF_HD Vf multiply_add(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]); });
#elif defined(__AVX2__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#else
  return a * b + c;
#endif
}

// Whether the work pays for waking up threads.
bool is_large(const LiveConv& a) {
  return static_cast<double>(a.batch) * a.dst_h * a.dst_w * a.rows * (a.pairs + 1) >= 1e6;
}

GENPERF_HD int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// sums[r][lane] (+)= sum_k scalars[r][offset[k]] * vectors[k][lane], for r < kTile.
GENPERF_HD void multiply_tile(const float* const* scalars, const int64_t* offset, const float* vectors,
                              int64_t n, float* sums, bool add) {
  Vf acc[kTile][kWide];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) acc[r][v] = splat<Vf>(0.0f);
  const float* row[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) row[r] = scalars[r];
  for (int64_t k = 0; k < n; ++k) {
    Vf vector[kWide];
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) vector[v] = load(vectors + k * kWidth + v * kLanes);
    const int64_t at = offset[k];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const Vf scalar = splat<Vf>(row[r][at]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) acc[r][v] = multiply_add(scalar, vector[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      float* to = sums + r * kWidth + v * kLanes;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// to[lane][i] = from[i][lane] + bias[lane], for i < n and lane < lanes.
void transpose_out(const float* from, int64_t n, int lanes, const float* bias, float* const* to) {
  int64_t i = 0;
  for (; lanes == kWidth && i + 4 <= n; i += 4) {
    for (int first = 0; first < kWidth; first += kNative) {
      Nf x[4], b;
      std::memcpy(&b, bias + first, sizeof b);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        std::memcpy(&x[j], from + (i + j) * kWidth + first, sizeof b);
        x[j] = x[j] + b;
      }
      transpose_4(x);
#pragma GCC unroll 4
      for (int quad = 0; quad < kNative / 4; ++quad)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_quad(to[first + 4 * quad + j] + i, x[j], quad);
    }
  }
  for (; i < n; ++i)
    for (int lane = 0; lane < lanes; ++lane) to[lane][i] = from[i * kWidth + lane] + bias[lane];
}

// to[i][lane] = from[lane][i], and 0 for lanes <= lane < kWidth.
void transpose_in(const float* const* from, int64_t n, int lanes, float* to) {
  int64_t i = 0;
  for (; lanes == kWidth && i + 4 <= n; i += 4) {
    for (int first = 0; first < kWidth; first += kNative) {
      Nf x[4];
#pragma GCC unroll 4
      for (int quad = 0; quad < kNative / 4; ++quad)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) load_quad(x[j], from[first + 4 * quad + j] + i, quad);
      transpose_4(x);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) std::memcpy(to + (i + j) * kWidth + first, &x[j], sizeof x[j]);
    }
  }
  for (; i < n; ++i)
    for (int lane = 0; lane < kWidth; ++lane) to[i * kWidth + lane] = lane < lanes ? from[lane][i] : 0.0f;
}

// Blocks of rows of dst, and the part of the source that one of them needs.
struct Blocks {
  int64_t rows, per_image, height, width;  // of dst; of the part of the source

  explicit Blocks(const LiveConv& a) {
    rows = a.dst_w == 0 ? 1 : kBlockPixels / a.dst_w;
    rows = rows < 1 ? 1 : rows;
    per_image = (a.dst_h + rows - 1) / rows;
    rows = per_image == 0 ? 0 : (a.dst_h + per_image - 1) / per_image;
    height = (rows - 1) * a.stride_h + a.max_dy - a.min_dy + 1;
    width = (a.dst_w - 1) * a.stride_w + a.max_dx - a.min_dx + 1;
  }
  int64_t plane() const { return height * width; }
};

// One channel of the part of an image that the block from row h0 of dst needs, zeros where there is no
// source.
void copy_source(const LiveConv& a, const Blocks& blocks, int64_t image, int64_t channel, int64_t h0,
                 float* to) {
  const float* from = a.src + (image * a.channels + channel) * a.src_h * a.src_w;
  const int64_t first = a.min_dx < 0 ? -a.min_dx : 0;  // column of the buffer with the first pixel
  const int64_t left = first < blocks.width ? first : blocks.width;
  const int64_t start = a.min_dx + left;
  int64_t count = a.src_w - start < blocks.width - left ? a.src_w - start : blocks.width - left;
  count = count < 0 ? 0 : count;
  for (int64_t r = 0; r < blocks.height; ++r, to += blocks.width) {
    const int64_t y = h0 * a.stride_h + a.min_dy + r;
    if (y < 0 || y >= a.src_h) {
      std::memset(to, 0, blocks.width * sizeof(float));
      continue;
    }
    for (int64_t i = 0; i < left; ++i) to[i] = 0.0f;
    std::memcpy(to + left, from + y * a.src_w + start, count * sizeof(float));
    for (int64_t i = left + count; i < blocks.width; ++i) to[i] = 0.0f;
  }
}

// The pairs that the rows [first, first + kWidth) of the order use.
struct Span {
  int64_t begin, end;
};
Span span_of(const LiveConv& a, int64_t first) {
  Span s{a.pairs, 0};
  for (int64_t i = first; i < first + kWidth && i < a.rows; ++i) {
    if (a.begin[i] == a.end[i]) continue;
    s.begin = a.begin[i] < s.begin ? a.begin[i] : s.begin;
    s.end = a.end[i] > s.end ? a.end[i] : s.end;
  }
  return s.begin < s.end ? s : Span{0, 0};
}

int lanes_of(const LiveConv& a, int64_t panel) {
  const int64_t left = a.rows - panel * kWidth;
  return static_cast<int>(left < kWidth ? left : kWidth);
}

void pack_weights(const LiveConv& a, int64_t first, Span span, float* to) {
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    const bool present = first + lane < a.rows;
    const int64_t row = present ? a.row[first + lane] : 0;
    const float* weight = a.weight + row * a.row_stride;
    const float* mask = a.mask + row * a.mask_row_stride;
    float* lane_to = to + lane;
    for (int64_t k = span.begin; k < span.end; ++k, lane_to += kWidth) {
      const int64_t c = a.channel[k], t = a.tap[k];
      const float m = present ? mask[c * a.mask_channel_stride + t] : 0.0f;
      *lane_to = m == 0.0f ? 0.0f : weight[c * a.channel_stride + t] * m;
    }
  }
}

// sums[lane] (+)= sum_i vectors[i][lane], by short chains for the sake of accuracy.
void add_rows(const float* vectors, int64_t n, float* sums, bool add) {
  for (int64_t v = 0; v < kWidth; v += kLanes) {
    Vf sum = splat<Vf>(0.0f);
    for (int64_t i = 0; i < n;) {
      Vf chain = splat<Vf>(0.0f);
      for (const int64_t end = i + 32 < n ? i + 32 : n; i < end; ++i)
        chain = chain + load(vectors + i * kWidth + v);
      sum = sum + chain;
    }
    store(sums + v, add ? load(sums + v) + sum : sum);
  }
}

}  // namespace

void live_conv(const LiveConv& a) {
  const Blocks blocks(a);
  const int64_t panels = (a.rows + kWidth - 1) / kWidth, pixels = blocks.rows * a.dst_w;
  const int64_t tiles = (pixels + kTile - 1) / kTile;
  if (a.batch * blocks.per_image * pixels == 0) return;

  Scratch<float> weights(panels * a.pairs * kWidth);
#pragma omp parallel for schedule(static) if (is_large(a))
  for (int64_t p = 0; p < panels; ++p)
    pack_weights(a, p * kWidth, span_of(a, p * kWidth), weights.get() + p * a.pairs * kWidth);

  Scratch<int64_t> pixel_offset(tiles * kTile), pair_offset(a.pairs);
  for (int64_t i = 0; i < tiles * kTile; ++i) {
    const int64_t p = i < pixels ? i : pixels - 1;
    pixel_offset[i] = p / a.dst_w * a.stride_h * blocks.width + p % a.dst_w * a.stride_w;
  }
  for (int64_t k = 0; k < a.pairs; ++k)
    pair_offset[k] = a.channel[k] * blocks.plane() + (a.dy[k] - a.min_dy) * blocks.width + a.dx[k] - a.min_dx;

#pragma omp parallel if (is_large(a))
  {
    Scratch<float> source(a.channels * blocks.plane()), sums(tiles * kTile * kWidth);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.batch * blocks.per_image; ++task) {
      const int64_t image = task / blocks.per_image, h0 = task % blocks.per_image * blocks.rows;
      const int64_t rows = a.dst_h - h0 < blocks.rows ? a.dst_h - h0 : blocks.rows, here = rows * a.dst_w;
      for (int64_t c = 0; c < a.channels; ++c)
        copy_source(a, blocks, image, c, h0, source.get() + c * blocks.plane());
      for (int64_t p = 0; p < panels; ++p) {
        const Span span = span_of(a, p * kWidth);
        const float* packed = weights.get() + p * a.pairs * kWidth;
        for (int64_t k = span.begin; k < span.end || k == span.begin; k += kDepth) {
          const int64_t n = span.end - k < kDepth ? span.end - k : kDepth;
          for (int64_t i = 0; i < here; i += kTile) {
            const float* scalars[kTile];
            for (int r = 0; r < kTile; ++r) scalars[r] = source.get() + pixel_offset[i + r];
            multiply_tile(scalars, pair_offset.get() + k, packed + (k - span.begin) * kWidth, n,
                          sums.get() + i * kWidth, k > span.begin);
          }
        }
        const int lanes = lanes_of(a, p);
        float bias[kWidth] = {};
        float* to[kWidth];
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t row = a.row[p * kWidth + lane];
          if (a.bias) bias[lane] = a.bias[row];
          to[lane] = a.dst + ((image * a.rows + row) * a.dst_h + h0) * a.dst_w;
        }
        transpose_out(sums.get(), here, lanes, bias, to);
      }
    }
  }
}

void live_conv_grad_weight(const LiveConv& a) {
  const Blocks blocks(a);
  const int64_t panels = (a.rows + kWidth - 1) / kWidth, pixels = blocks.rows * a.dst_w;
  const int64_t pairs = rounded_up(a.pairs, kTile), chunks = (pairs + kPairsPerTask - 1) / kPairsPerTask;
  const int64_t elements = panels * (pairs + 1) * kWidth;  // of a slice: for each pair, and for the bias
  int64_t slices = a.batch < kSlices ? a.batch : kSlices;
  while (slices > 1 && slices * elements > kSliceElements) --slices;
  if (pixels * blocks.per_image == 0) slices = 0;

  Scratch<float> partial(slices * elements);
  Scratch<int64_t> pixel_offset(pixels), pair_offset(pairs);
  for (int64_t i = 0; i < pixels; ++i)
    pixel_offset[i] = i / a.dst_w * a.stride_h * blocks.width + i % a.dst_w * a.stride_w;
  // Within a chunk of pairs the source has a slot for each run of pairs of one channel.
  int64_t slots = 0;
  for (int64_t k = 0, slot = 0; k < pairs; ++k) {
    const int64_t at = k < a.pairs ? k : a.pairs - 1;
    if (k % kPairsPerTask == 0)
      slot = 0;
    else if (k < a.pairs && a.channel[k] != a.channel[k - 1])
      ++slot;
    slots = slot < slots ? slots : slot + 1;
    pair_offset[k] = slot * blocks.plane() + (a.dy[at] - a.min_dy) * blocks.width + a.dx[at] - a.min_dx;
  }

#pragma omp parallel if (is_large(a))
  {
    Scratch<float> source(slots * blocks.plane()), gradient(rounded_up(pixels, 4) * kWidth);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < slices * (chunks > 0 ? chunks : 1); ++task) {
      const int64_t slice = task % slices, low = task / slices * kPairsPerTask;
      const int64_t high = low + kPairsPerTask < pairs ? low + kPairsPerTask : pairs;
      float* const sums = partial.get() + slice * elements;
      bool add = false;
      for (int64_t image = slice * a.batch / slices; image < (slice + 1) * a.batch / slices; ++image) {
        for (int64_t h0 = 0; h0 < a.dst_h; h0 += blocks.rows) {
          const int64_t rows = a.dst_h - h0 < blocks.rows ? a.dst_h - h0 : blocks.rows, here = rows * a.dst_w;
          for (int64_t k = low, slot = -1; k < high && k < a.pairs; ++k) {
            if (k > low && a.channel[k] == a.channel[k - 1]) continue;
            copy_source(a, blocks, image, a.channel[k], h0, source.get() + ++slot * blocks.plane());
          }
          for (int64_t p = 0; p < panels; ++p) {
            float* const panel = sums + p * (pairs + 1) * kWidth;
            const int lanes = lanes_of(a, p);
            const float* from[kWidth];
            for (int lane = 0; lane < lanes; ++lane)
              from[lane] =
                  a.grad_dst + ((image * a.rows + a.row[p * kWidth + lane]) * a.dst_h + h0) * a.dst_w;
            transpose_in(from, here, lanes, gradient.get());
            if (a.grad_bias && low == 0) add_rows(gradient.get(), here, panel + pairs * kWidth, add);
            const Span span = span_of(a, p * kWidth);
            const int64_t begin = span.begin / kTile * kTile;
            for (int64_t i = 0; i < here; i += kDepth) {
              const int64_t n = here - i < kDepth ? here - i : kDepth;
              for (int64_t k = begin < low ? low : begin; k < high && k < span.end; k += kTile) {
                const float* scalars[kTile];
                for (int r = 0; r < kTile; ++r) scalars[r] = source.get() + pair_offset[k + r];
                multiply_tile(scalars, pixel_offset.get() + i, gradient.get() + i * kWidth, n,
                              panel + k * kWidth, add || i > 0);
              }
            }
          }
          add = true;
        }
      }
    }
  }

  std::memset(a.grad_weight, 0, a.rows * a.row_stride * sizeof(float));
#pragma omp parallel for schedule(static) if (is_large(a))
  for (int64_t p = 0; p < panels; ++p) {
    const Span span = span_of(a, p * kWidth);
    for (int64_t lane = 0; lane < kWidth && p * kWidth + lane < a.rows; ++lane) {
      const int64_t row = a.row[p * kWidth + lane];
      const float* sums = partial.get() + p * (pairs + 1) * kWidth + lane;
      auto total = [&](int64_t k) {
        float sum = 0.0f;
        for (int64_t slice = 0; slice < slices; ++slice) sum += sums[slice * elements + k * kWidth];
        return sum;
      };
      for (int64_t k = span.begin; k < span.end; ++k) {
        const float m = a.mask[row * a.mask_row_stride + a.channel[k] * a.mask_channel_stride + a.tap[k]];
        float* to = a.grad_weight + row * a.row_stride + a.channel[k] * a.channel_stride + a.tap[k];
        if (m != 0.0f) *to = total(k) * m;
      }
      if (a.grad_bias) a.grad_bias[row] = total(pairs);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
