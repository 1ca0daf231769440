// Convolutions of the persistent kernel: panels of 16 output channels are shared out among the members of
// a team, and the work of a panel among the threads of a block.
//
// The cells' products are brought to shared memory, some blocks of kBlock at a time. A thread then has
//   tile 0     one output and one block of products: few cells, where the chain of a block is what takes time
//   tile 1..4  that many cells by four channels, all blocks
// Each block is one chain of fused multiply-adds from 0, and blocks are added to the init in order, so the
// result does not depend on the tile.
#pragma once

#include "step.cuh"

namespace genperf::pixel {

inline constexpr int kPitch = 4;  // floats between rows, so that neighbouring rows lie in other banks

struct Chunk {
  int begin, end, pitch;  // products; floats from one cell to the next
};

// Products [begin, end) of cells [first, first + count) of an entry.
template <int kWidth>
__device__ __forceinline__ void load_sources(const Context& c, const Step& s, const Entry& e, Chunk k,
                                             int first, int count) {
  const int channels = s.channels_in;
  int lanes = 1;  // that share a tap of a cell
  while (lanes < 32 && lanes * kWidth < channels) lanes *= 2;
  const int tap_first = k.begin / channels, taps = (k.end - 1) / channels - tap_first + 1;
  const int lane = threadIdx.x % lanes;
  for (int item = threadIdx.x / lanes; item < taps * count; item += kThreads / lanes) {
    const int tap = item / count, m = item - tap * count;
    const int column = (first + m) / c.images, b = (first + m) - column * c.images;
    const int2 shift = c.taps[s.tap_begin + tap_first + tap];
    int y = e.row * s.num + shift.x, x = (e.col + column) * s.num + shift.y;
    bool whole = true;
    if (s.den != 1) {
      const int y_rest = wrap(y, s.den), x_rest = wrap(x, s.den);
      whole = y_rest == 0 && x_rest == 0;
      y = (y - y_rest) / s.den, x = (x - x_rest) / s.den;
    }
    const float* from = whole ? source_at(c, s.a, y, x, b) : nullptr;
    const int offset = (tap_first + tap) * channels;
    const int low = k.begin > offset ? k.begin - offset : 0;
    const int high = k.end - offset < channels ? k.end - offset : channels;
    float* to = c.sources + m * k.pitch + offset - k.begin;
    for (int i = low + lane * kWidth; i < high; i += lanes * kWidth) {
      if constexpr (kWidth == 4) {
        *reinterpret_cast<float4*>(to + i) =
            from ? *reinterpret_cast<const float4*>(from + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      } else {
        to[i] = from ? from[int64_t{i} * s.a.stride_c] : 0.0f;
      }
    }
  }
}

// One panel of the weights, [depth, 16].
struct Panel {
  const float* weight;
  int channel;  // first
};

// The panel number `index` of those that this member has for the cells of a tile.
__device__ __forceinline__ Panel panel_at(const Context& c, const Step& s, int owned_first, int index) {
  const int panel = owned_first + index * c.size;
  const int64_t size = int64_t{s.depth} * kPanel;
  const float* weight = s.resident >= 0 ? c.resident + s.resident + index * size
                                        : reinterpret_cast<const float*>(s.table) + panel * size;
  return {weight, panel * kPanel};
}

struct Output {
  float* out;
  const float* init;  // null: 0
};

__device__ __forceinline__ Output output_at(const Context& c, const Step& s, const Entry& e, int cell,
                                            int channel) {
  const int column = cell / c.images, b = cell - column * c.images;
  float* out = cell_at(c, s.out, e.row, e.col + column, b) + channel;
  const float* init = s.op ? source_at(c, s.b, e.row, e.col + column, b) : nullptr;
  return {out, init ? init + int64_t{channel} * s.b.stride_c : nullptr};
}

__device__ __forceinline__ float fma_chain(float x, float w, float sum) { return __fmaf_rn(x, w, sum); }

// The chain of products [begin, end) of one output.
__device__ __forceinline__ float narrow_block(const float* x, const float* w, int begin, int end) {
  float sum = 0.0f;
  int k = begin;
  for (; k + 8 <= end; k += 8) {
    float xs[8], ws[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) ws[i] = w[(k + i) * kPanel];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(x + k + i);
      xs[i] = v.x, xs[i + 1] = v.y, xs[i + 2] = v.z, xs[i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fma_chain(xs[i], ws[i], sum);
  }
  for (; k < end; ++k) sum = fma_chain(x[k], w[k * kPanel], sum);
  return sum;
}

// Tile 0: cells * 16 * blocks <= kThreads, for at least one block.
__device__ __forceinline__ void convolve_narrow(const Context& c, const Step& s, const Entry& e, int first,
                                                int count, int owned_first, int owned) {
  const int outputs = count * kPanel, blocks = (s.depth + kBlock - 1) / kBlock;
  int chunk = kThreads / outputs < blocks ? kThreads / outputs : blocks;
  while (chunk > 1 && count * (chunk * kBlock + kPitch) > c.args.source_floats) --chunk;
  int together = kThreads / (outputs * chunk);  // panels
  together = together < owned ? together : owned;
  const int n = threadIdx.x % kPanel, rest = threadIdx.x / kPanel;
  const int m = rest % count, block = rest / count % chunk, p = rest / count / chunk;
  for (int panel = 0; panel < owned; panel += together) {
    const bool works = p < together && panel + p < owned;
    const Panel own = panel_at(c, s, owned_first, works ? panel + p : panel);
    const bool sums = works && block == 0 && own.channel + n < s.channels;
    Output output{};
    float total = 0.0f;
    if (sums) {
      output = output_at(c, s, e, first + m, own.channel + n);
      if (output.init) total = *output.init;
    }
    for (int begin = 0; begin < s.depth; begin += chunk * kBlock) {
      const int end = begin + chunk * kBlock < s.depth ? begin + chunk * kBlock : s.depth;
      const Chunk k{begin, end, chunk * kBlock + kPitch};
      if (chunk < blocks || panel == 0) {
        __syncthreads();
        if (s.a.vectors) {
          load_sources<4>(c, s, e, k, first, count);
        } else {
          load_sources<1>(c, s, e, k, first, count);
        }
      }
      __syncthreads();
      const int from = block * kBlock;
      if (works && begin + from < end) {
        const int to = end - begin < from + kBlock ? end - begin : from + kBlock;
        c.partials[threadIdx.x] =
            narrow_block(c.sources + m * k.pitch, own.weight + int64_t{begin} * kPanel + n, from, to);
      }
      __syncthreads();
      if (sums) {
        for (int b = 0; begin + b * kBlock < end; ++b) total += c.partials[threadIdx.x + b * outputs];
      }
    }
    if (sums) *output.out = total;
  }
}

template <int kCells>
__device__ __forceinline__ void multiply(const float* const (&x)[kCells], int k, float4 w,
                                         float (&sum)[kCells][4]) {
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    const float v = x[i][k];
    sum[i][0] = fma_chain(v, w.x, sum[i][0]);
    sum[i][1] = fma_chain(v, w.y, sum[i][1]);
    sum[i][2] = fma_chain(v, w.z, sum[i][2]);
    sum[i][3] = fma_chain(v, w.w, sum[i][3]);
  }
}

// Products [begin, end), at most a block, for kCells cells by four channels.
template <int kCells>
__device__ __forceinline__ void tile_block(const float* const (&x)[kCells], const float* w, int begin,
                                           int end, float (&total)[kCells][4]) {
  float sum[kCells][4] = {};
  int k = begin;
  for (; k + 4 <= end; k += 4) {
    float4 ws[4], xs[kCells];
#pragma unroll
    for (int i = 0; i < 4; ++i) ws[i] = *reinterpret_cast<const float4*>(w + (k + i) * kPanel);
#pragma unroll
    for (int i = 0; i < kCells; ++i) xs[i] = *reinterpret_cast<const float4*>(x[i] + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const float v = j == 0 ? xs[i].x : j == 1 ? xs[i].y : j == 2 ? xs[i].z : xs[i].w;
        sum[i][0] = fma_chain(v, ws[j].x, sum[i][0]);
        sum[i][1] = fma_chain(v, ws[j].y, sum[i][1]);
        sum[i][2] = fma_chain(v, ws[j].z, sum[i][2]);
        sum[i][3] = fma_chain(v, ws[j].w, sum[i][3]);
      }
    }
  }
  for (; k < end; ++k) multiply(x, k, *reinterpret_cast<const float4*>(w + k * kPanel), sum);
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
#pragma unroll
    for (int n = 0; n < 4; ++n) total[i][n] += sum[i][n];
  }
}

// Tiles of kCells cells: cells * 4 <= kThreads * kCells.
template <int kCells>
__device__ __forceinline__ void convolve_tiles(const Context& c, const Step& s, const Entry& e, int first,
                                               int count, int owned_first, int owned) {
  const int groups = (e.cells + kCells - 1) / kCells;
  int together = kThreads / (4 * groups);  // panels
  together = together < owned ? together : owned;
  const int chunk_most = (c.args.source_floats / e.cells - kPitch) / kBlock;
  const int chunk = (chunk_most > 1 ? chunk_most : 1) * kBlock;
  const int quad = threadIdx.x % 4 * 4, group = threadIdx.x / 4 % groups, p = threadIdx.x / 4 / groups;
  for (int panel = 0; panel < owned; panel += together) {
    const bool works = p < together && panel + p < owned;
    const Panel own = panel_at(c, s, owned_first, works ? panel + p : panel);
    float total[kCells][4] = {};
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int m = group + i * groups;
      if (!works || m >= count) continue;
      const Output output = output_at(c, s, e, first + m, own.channel + quad);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (output.init && own.channel + quad + n < s.channels) total[i][n] = output.init[n * s.b.stride_c];
      }
    }
    for (int begin = 0; begin < s.depth; begin += chunk) {
      const int end = begin + chunk < s.depth ? begin + chunk : s.depth;
      const Chunk k{begin, end, chunk + kPitch};
      if (chunk < s.depth || panel == 0) {
        __syncthreads();
        if (s.a.vectors) {
          load_sources<4>(c, s, e, k, first, count);
        } else {
          load_sources<1>(c, s, e, k, first, count);
        }
        __syncthreads();
      }
      if (!works) continue;
      const float* x[kCells];
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int m = group + i * groups;
        x[i] = c.sources + (m < count ? m : 0) * k.pitch;
      }
      const float* w = own.weight + int64_t{begin} * kPanel + quad;
      for (int from = 0; from < end - begin; from += kBlock) {
        tile_block<kCells>(x, w, from, end - begin < from + kBlock ? end - begin : from + kBlock, total);
      }
    }
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int m = group + i * groups;
      if (!works || m >= count) continue;
      float* out = output_at(c, s, e, first + m, own.channel + quad).out;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (own.channel + quad + n < s.channels) out[n] = total[i][n];
      }
    }
  }
}

// Panel p of tile t of the cells belongs to member (first + p) modulo the team's size, or, where the step
// is spread, to (first + p + panels * t).
__device__ __forceinline__ void convolve(const Context& c, const Step& s, const Entry& e) {
  const int cells = e.cols * c.images;
  for (int first = 0, tile = 0; first < cells; first += e.cells, ++tile) {
    const int shift = s.first + (s.spread ? tile * s.panels : 0);
    const int owned_first = wrap(c.rank - shift, c.size);
    if (owned_first >= s.panels) continue;
    const int owned = (s.panels - owned_first + c.size - 1) / c.size;
    const int count = cells - first < e.cells ? cells - first : e.cells;
    switch (e.tile) {
      case 0:
        convolve_narrow(c, s, e, first, count, owned_first, owned);
        break;
      case 1:
        convolve_tiles<1>(c, s, e, first, count, owned_first, owned);
        break;
      case 2:
        convolve_tiles<2>(c, s, e, first, count, owned_first, owned);
        break;
      default:
        convolve_tiles<4>(c, s, e, first, count, owned_first, owned);
    }
  }
}

}  // namespace genperf::pixel
