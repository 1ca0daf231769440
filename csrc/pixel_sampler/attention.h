// Attention over the first cells of a grid, in an order that no thread or batch changes:
//   s_j = scale * <q, k_j>, the products summed as in a convolution
//   w_j = exp(s_j - max s)
//   out = sum_j w_j v_j / sum_j w_j, each sum in blocks of kBlock keys, which are added in order
#pragma once

#include "context.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

// Pointers to the first image's numbers of the keys.
inline void find_keys(const Context& c, const Source& s, int64_t cols, int64_t keys, const float** pointers) {
  for (int64_t j = 0; j < keys;) {
    const int64_t y = j / cols + s.dy, end = j + cols < keys ? j + cols : keys;
    for (int64_t x = s.dx; j < end; ++j, ++x) pointers[j] = cell_at(c, s, y, x).p;
  }
}

// In each 128 bits, four floats from c on of every fourth key, so that a transposition stays within them.
GENPERF_HD Nf load_quads(const float* const* key, int64_t c) {
#if defined(__AVX512F__)
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(key[0] + c));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(key[4] + c), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(key[8] + c), 2);
  return (Nf)_mm512_insertf32x4(x, _mm_loadu_ps(key[12] + c), 3);
#elif defined(__AVX2__)
  return (Nf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(key[0] + c)), _mm_loadu_ps(key[4] + c),
                                  1);
#else
  return load_native(key[0] + c);
#endif
}

// Channels c to c + 3 of 16 keys: of each channel, all keys in one block.
GENPERF_HD void load_columns(const float* const* key, int64_t c, Vf* columns) {
  for (int part = 0; part < kParts; ++part) {
    Nf rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = load_quads(key + part * kNativeLanes + r, c);
    const Nf low01 = unpack_low(rows[0], rows[1]), high01 = unpack_high(rows[0], rows[1]);
    const Nf low23 = unpack_low(rows[2], rows[3]), high23 = unpack_high(rows[2], rows[3]);
    columns[0].part[part] = unpack_low_pairs(low01, low23);
    columns[1].part[part] = unpack_high_pairs(low01, low23);
    columns[2].part[part] = unpack_low_pairs(high01, high23);
    columns[3].part[part] = unpack_high_pairs(high01, high23);
  }
}

GENPERF_HD Vf multiply_add(float x, Vf y, Vf sum) {
  return for_parts<Vf>([&](int i) { return fma_native(splat<Nf>(x), y.part[i], sum.part[i]); });
}

// scores[h][j] for keys [0, keys), -inf from there to `stride`.
inline void score(const Attention& a, const float* q, const float* const* k, int64_t shift, int64_t keys,
                  int64_t head_begin, int64_t head_end, float* scores, int64_t stride) {
  const float scale = static_cast<float>(a.scale);
  for (int64_t j0 = 0; j0 < keys; j0 += kLanes) {
    const float* key[kLanes];
    for (int i = 0; i < kLanes; ++i) key[i] = k[j0 + i < keys ? j0 + i : j0] + shift;
    for (int64_t h = head_begin; h < head_end; ++h) {
      Vf total = splat<Vf>(0.0f);
      for (int64_t block = h * a.dim_k, end = block + a.dim_k; block < end; block += kBlock) {
        const int64_t block_end = block + kBlock < end ? block + kBlock : end;
        Vf sum = splat<Vf>(0.0f);
        int64_t c = block;
        for (; c + 4 <= block_end; c += 4) {
          Vf columns[4];
          load_columns(key, c, columns);
          for (int i = 0; i < 4; ++i) sum = multiply_add(q[c + i], columns[i], sum);
        }
        for (; c < block_end; ++c) {
          float column[kLanes];
          for (int i = 0; i < kLanes; ++i) column[i] = key[i][c];
          sum = multiply_add(q[c], load(column), sum);
        }
        total = block == h * a.dim_k ? sum : total + sum;
      }
      store(scores + (h - head_begin) * stride + j0, total * scale);
    }
  }
  for (int64_t h = 0; h < head_end - head_begin; ++h)
    for (int64_t j = keys; j < stride; ++j) scores[h * stride + j] = -kInfinity;
}

// The sum of n numbers in blocks; four blocks at a time, each a chain of its own.
inline float sum_in_blocks(const float* x, int64_t n) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < n; begin += 4 * kBlock) {
    float sums[4] = {};
    if (begin + 4 * kBlock <= n) {
      for (int64_t j = begin; j < begin + kBlock; ++j)
        for (int i = 0; i < 4; ++i) sums[i] = sums[i] + x[j + i * kBlock];
    } else {
      for (int64_t j = begin; j < n; ++j) sums[(j - begin) / kBlock] += x[j];
    }
    for (int i = 0; i < 4 && begin + i * kBlock < n; ++i) total = begin + i == 0 ? sums[0] : total + sums[i];
  }
  return total;
}

// In place: weights from scores [0, stride), and their sum.
inline float weigh(float* scores, int64_t stride) {
  Vf most = load(scores);
  for (int64_t j = kLanes; j < stride; j += kLanes) {
    const Vf x = load(scores + j);
    most = select(x > most, x, most);
  }
  float lanes[kLanes];
  store(lanes, most);
  float largest = lanes[0];
  for (float x : lanes) largest = x > largest ? x : largest;
  for (int64_t j = 0; j < stride; j += kLanes) store(scores + j, exp(load(scores + j) - largest));
  return sum_in_blocks(scores, stride);
}

// Channels of one head, at most 16, that are summed together.
struct Slice {
  const float* weights;
  int64_t channel;  // of v and of the result
  int length;
  float total;  // of the weights
};

template <int kSlices>
void mix(const Slice* slices, const float* const* v, int64_t shift, int64_t keys, float* out) {
  Vf total[kSlices];
  for (int64_t block = 0; block < keys; block += kBlock) {
    const int64_t end = block + kBlock < keys ? block + kBlock : keys;
    Vf sum[kSlices];
    for (Vf& s : sum) s = splat<Vf>(0.0f);
    for (int64_t j = block; j < end; ++j) {
      for (int s = 0; s < kSlices; ++s) {
        const float* from = v[j] + shift + slices[s].channel;
        float partial[kLanes];
        if (slices[s].length < kLanes) {
          for (int i = 0; i < kLanes; ++i) partial[i] = i < slices[s].length ? from[i] : 0.0f;
          from = partial;
        }
        sum[s] = multiply_add(slices[s].weights[j], load(from), sum[s]);
      }
    }
    for (int s = 0; s < kSlices; ++s) total[s] = block == 0 ? sum[s] : total[s] + sum[s];
  }
  for (int s = 0; s < kSlices; ++s) {
    float result[kLanes];
    store(result, total[s] / slices[s].total);
    std::memcpy(out + slices[s].channel, result, slices[s].length * sizeof(float));
  }
}

inline constexpr int kMixed = 4;  // slices at a time

// Heads [head_begin, head_end) for the cells of a segment.
inline void attend(const Context& c, const Attention& a, const Segment& s, int64_t head_begin,
                   int64_t head_end) {
  const Source* sources = c.plan.sources;
  const Target& target = c.plan.targets[a.out];
  const int64_t* counts = static_cast<const int64_t*>(c.plan.tensors[a.count]) + s.row * a.cols;
  for (int64_t x = s.col; x < s.col + s.cols; ++x) {
    const int64_t keys = counts[x], stride = (keys + kLanes - 1) / kLanes * kLanes;
    const Cell q = read(c, sources[a.q], s.row, x);
    float* out = write(c, target, s.row, x) + a.out_channel;
    const float** k = c.pointers;
    const float** v = c.pointers + keys;
    find_keys(c, sources[a.k], a.cols, keys, k);
    find_keys(c, sources[a.v], a.cols, keys, v);
    const Source &ks = sources[a.k], &vs = sources[a.v];
    const int64_t k_stride = ks.constant ? ks.stride_b : ks.channels;
    const int64_t v_stride = vs.constant ? vs.stride_b : vs.channels;
    for (int64_t image = 0; image < c.images; ++image, out += target.channels) {
      if (keys == 0) {
        for (int64_t i = head_begin * a.dim_v; i < head_end * a.dim_v; ++i) out[i] = 0.0f;
        continue;
      }
      score(a, q.p + image * q.stride, k, image * k_stride, keys, head_begin, head_end, c.scores, stride);
      Slice slices[kMixed];
      int n = 0;
      for (int64_t h = head_begin; h < head_end; ++h) {
        const float* weights = c.scores + (h - head_begin) * stride;
        const float total = weigh(c.scores + (h - head_begin) * stride, stride);
        for (int64_t d = 0; d < a.dim_v; d += kLanes) {
          const int length = static_cast<int>(a.dim_v - d < kLanes ? a.dim_v - d : kLanes);
          slices[n++] = {weights, h * a.dim_v + d, length, total};
          if (n == kMixed) {
            mix<kMixed>(slices, v, image * v_stride, keys, out);
            n = 0;
          }
        }
      }
      for (int i = 0; i < n; ++i) mix<1>(slices + i, v, image * v_stride, keys, out);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
