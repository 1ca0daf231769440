// What happens between the steps of a slot: a new pixel is cleared, its values are drawn and fed back. All
// members of a team do the same.
#pragma once

#include "../common/philox.cuh"
#include "head.cuh"
#include "step.cuh"

namespace genperf::pixel {

// Before the first slot of a pixel: what is not drawn yet is 0.
__device__ __forceinline__ void run_clear(const Context& c, const Step& s, const Entry& e) {
  const int values = static_cast<int>(c.args.head.values);
  for (int i = threadIdx.x; i < c.images * values; i += kThreads)
    c.args.values[pixel_of(c, e.row, e.col, i / values) * values + i % values] = 0.0f;
  for (int i = threadIdx.x; i < c.images * s.channels; i += kThreads)
    cell_at(c, s.out, e.row, e.col, i / s.channels)[i % s.channels] = 0.0f;
}

// The numbers that make_noise gives this pixel, made by the lanes of a warp.
__device__ __forceinline__ const float* make_noise(const Context& c, int64_t pixel, int image, float* noise) {
  const Head& head = c.args.head;
  if (c.args.noise) return c.args.noise + pixel * head.noises;
  const int64_t index = c.args.images ? c.args.images[image] : image;
  const PhiloxKey key{static_cast<uint64_t>(c.args.key[0]), static_cast<uint64_t>(c.args.key[1] + index)};
  const uint64_t first = (pixel - int64_t{image} * head.rows * head.cols) * head.noises;
  for (int i = threadIdx.x % 32; i < head.noises; i += 32) {
    if (head.kind == HeadKind::kGaussian) {
      float normal[1];
      philox_normals_at(key, first + i, normal);
      noise[i] = normal[0];
    } else {
      uint32_t words[4];
      philox_words(key, (first + i) / 4, words);
      const int lane = (first + i) % 4;
      noise[i] = uniform_from_bits<float>(lane < 2 ? (lane == 0 ? words[0] : words[1])
                                                   : (lane == 2 ? words[2] : words[3]));
    }
  }
  __syncwarp();
  return noise;
}

// Draw `e.cols` of pixel (e.row, e.col), an image a warp at a time.
__device__ __forceinline__ void run_draw(const Context& c, const Step& s, const Entry& e, float* scratch) {
  const Head& head = c.args.head;
  const int lane = threadIdx.x % 32, index = e.cols;
  const int values = static_cast<int>(head.values), count = values / static_cast<int>(head.draws);
  const int noises = (static_cast<int>(head.noises) + 3) / 4 * 4;
  for (int b = threadIdx.x / 32; b < c.images; b += kWarps) {
    const int64_t pixel = pixel_of(c, e.row, e.col, b), at = pixel * values;
    const float* noise = make_noise(c, pixel, c.image + b, scratch);
    const float* params = source_at(c, s.a, e.row, e.col, b);
    const Drawn drawn =
        draw(Warp(), head, index, params, noise, c.args.sampling, c.args.known ? c.args.known + at : nullptr,
             c.args.mask ? c.args.mask + at : nullptr, scratch + noises);
    __syncwarp();
    if (lane != 0) continue;
    float* cell = head.feedback == FeedbackKind::kNone ? nullptr : cell_at(c, s.out, e.row, e.col, b);
#pragma unroll
    for (int v = 0; v < kMaxDrawn; ++v) {
      if (v >= count) break;
      c.args.values[at + index + v] = drawn.value[v];
      if (head.feedback == FeedbackKind::kScaled) {
        cell[index + v] = drawn.value[v] * static_cast<float>(head.scale) + static_cast<float>(head.offset);
      }
    }
    const float value = drawn.value[0];
    if (head.feedback == FeedbackKind::kOneHot && value >= 0.0f && value < static_cast<float>(head.classes))
      cell[index * head.classes + static_cast<int64_t>(value)] = 1.0f;
  }
}

}  // namespace genperf::pixel
