// Where the numbers of a running program lie, for the images of one thread.
#pragma once

#include "../common/math.h"
#include "pixel_sampler.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

// One cell's numbers of the thread's first image, and floats from one image to the next.
struct Cell {
  const float* p;
  int64_t stride;
};

struct Context {
  const Plan& plan;
  float* workspace;
  int64_t batch, first, images;      // all images, and those of this thread
  const float** pointers = nullptr;  // scratch memory
  Piece* pieces = nullptr;
  bool* needed = nullptr;     // by tap
  Factor* factors = nullptr;  // of one output cell
  float* scores = nullptr;
  float* head = nullptr;
  const float* next_weight = nullptr;  // of the convolution that comes after this segment
  int64_t next_panel_size = 0;
};

GENPERF_HD bool is_inside(const Source& s, int64_t y, int64_t x) {
  return static_cast<uint64_t>(y - s.y0) < s.height && static_cast<uint64_t>(x - s.x0) < s.width;
}

// A cell in the window of the source.
GENPERF_HD Cell cell_at(const Context& c, const Source& s, int64_t y, int64_t x) {
  if (s.constant) return {s.constant + y * s.stride_y + x * s.stride_x + c.first * s.stride_b, s.stride_b};
  const int64_t at = s.offset + (static_cast<int64_t>(s.row[y]) + s.col[x]) * s.channels;
  return {c.workspace + at * c.batch + c.first * s.channels + s.channel, s.channels};
}

// What the source is for output cell (y, x); zeros outside its window.
GENPERF_HD Cell read(const Context& c, const Source& s, int64_t y, int64_t x) {
  y += s.dy, x += s.dx;
  if (!is_inside(s, y, x)) return {c.plan.zeros, 0};
  return cell_at(c, s, y, x);
}

GENPERF_HD float* write(const Context& c, const Target& t, int64_t y, int64_t x) {
  const int64_t at = t.offset + (static_cast<int64_t>(t.row[y]) + t.col[x]) * t.channels;
  return c.workspace + at * c.batch + c.first * t.channels;
}

#if defined(__AVX512F__)
GENPERF_HD Nf fma_native(Nf a, Nf b, Nf c) { return (Nf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
GENPERF_HD Nf fma_native(Nf a, Nf b, Nf c) { return (Nf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
GENPERF_HD Nf fma_native(Nf a, Nf b, Nf c) { return a * b + c; }  // rounded twice: there is no instruction
#endif

inline constexpr int kNativeLanes = kLanes / kParts;

GENPERF_HD Nf load_native(const float* p) {
  Nf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
GENPERF_HD void store_native(float* p, Nf x) { std::memcpy(p, &x, sizeof x); }

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
