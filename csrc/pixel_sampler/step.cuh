// What the persistent kernel runs: a stream of entries, each naming a step (an instruction with all
// addresses resolved) and the cells that it is for. genperf/sampling/_cuda_steps.py makes both.
#pragma once

#include "../common/cuda.h"
#include "head.h"

namespace genperf::pixel {

inline constexpr int kThreads = 256;  // of a block
inline constexpr int kWarps = kThreads / 32;

enum class StepKind : int32_t { kConv, kPointwise, kAttention, kEmbed, kClear, kDraw };

enum class Space : int32_t { kWorkspace, kConstant };

// Where the channels of cell (y, x) of an image lie, as Operand and Buffer say. Strides are in floats.
struct Cells {
  int64_t base;  // floats from the team's workspace on; of a constant, its address
  Space space;
  int32_t ring_rows, ring_cols;  // of a constant, 0
  int32_t stride_y, stride_x, stride_b, stride_c;
  int32_t dy, dx, y0, y1, x0, x1;
  int32_t vectors;  // four channels lie aligned in 16 bytes
};
static_assert(sizeof(Cells) == 64);

struct Step {
  StepKind kind;
  int32_t op;                     // Op; convolutions, embed: whether there is an init; attention: dim_v
  int32_t channels, channels_in;  // attention: heads, dim_k
  int32_t taps, num, den;         // embed: taps, draw, classes; attention: den is columns of the grid
  int32_t panels, depth;          // of a convolution: products of an output
  int32_t first;                  // member of the team that has panel 0
  int32_t spread;                 // panels of other cells lie with other members
  int32_t resident;               // floats from the resident weights on; -1: in global memory. By member
  float p, q;                     // attention: scale
  int32_t tap_begin, unused;
  int64_t table;  // address of weights, the embedding's tables or attention's counts
  int64_t padding;
  Cells out, a, b, c;  // conv: source, init; embed: init; attention: q, k, v; clear, draw: input; parameters
};
inline constexpr int kStepQuads = sizeof(Step) / 16;
static_assert(sizeof(Step) == 336 && kStepQuads <= 32);

struct Entry {
  int32_t step, row, col, cols;
  int32_t barrier;  // what other members wrote is read, or what they read is written
  int32_t shared;   // a pointwise step or an embedding of which each member does a part
  int32_t cells;    // of a convolution that are worked on at a time
  int32_t tile;     // cells a thread, of four channels each; 0: one output and block of products a thread
};
static_assert(sizeof(Entry) == 32);

struct SamplerArgs {
  const Entry* entries;
  const uint4* steps;
  const int32_t* resident;  // [team size, steps]
  const int2* taps;
  float* workspace;       // [teams, workspace_stride]
  float* values;          // [batch, rows, cols, values]
  const float* noise;     // the same shape with `noises`; null: made from `key`
  const int64_t* key;     // [2]
  const int64_t* images;  // [batch]: indices to draw noise for; null: 0, 1, ...
  const float* known;     // [batch, rows, cols, values], or null
  const uint8_t* mask;    // the same shape, or null
  float* scratch;         // [blocks, kWarps, head_floats], where shared memory has no room for them
  unsigned* arrived;      // [teams, 32], zero before the first launch
  int64_t workspace_stride;
  int32_t begin, end;  // entries
  int32_t batch, team_images, team_size, teams, step_count, tap_count;
  int32_t source_floats, head_floats, head_in_shared, resident_floats;  // parts of shared memory
  Head head;
  Sampling sampling;
};

// Shared memory of a block, in floats.
struct Layout {
  int taps, sources, head, resident, total;

  GENPERF_HD explicit Layout(const SamplerArgs& a) {
    taps = 2 * 4 * kStepQuads + 4 * 8 + kThreads;
    sources = (taps + 2 * a.tap_count + 3) / 4 * 4;
    head = sources + a.source_floats;
    resident = head + kWarps * (a.head_in_shared ? a.head_floats : 0);
    total = resident + a.resident_floats;
  }
};

// What the functions of a block share.
struct Context {
  const SamplerArgs& args;
  float* workspace;   // of the team
  int image, images;  // first of the team, and how many
  int rank, size;     // of this block in its team
  float* partials;    // [kThreads] in shared memory
  const int2* taps;
  float* sources;   // args.source_floats in shared memory
  float* resident;  // weights in shared memory
};

__device__ __forceinline__ int wrap(int i, int n) {
  const int rest = i % n;
  return rest < 0 ? rest + n : rest;
}

// The number of a pixel of the team's image b among those of all images.
__device__ __forceinline__ int64_t pixel_of(const Context& c, int y, int x, int b) {
  return (int64_t{c.image + b} * c.args.head.rows + y) * c.args.head.cols + x;
}

// Cell (y, x) of the team's image b; to be inside the window.
__device__ __forceinline__ float* cell_at(const Context& c, const Cells& s, int y, int x, int b) {
  if (s.space == Space::kConstant) {
    return reinterpret_cast<float*>(s.base) + int64_t{y} * s.stride_y + int64_t{x} * s.stride_x +
           int64_t{c.image + b} * s.stride_b;
  }
  return c.workspace + s.base + int64_t{wrap(y, s.ring_rows)} * s.stride_y +
         int64_t{wrap(x, s.ring_cols)} * s.stride_x + int64_t{b} * s.stride_b;
}

// The source of output cell (y, x); null where it is outside the window, and reads 0.
__device__ __forceinline__ const float* source_at(const Context& c, const Cells& s, int y, int x, int b) {
  y += s.dy, x += s.dx;
  const bool inside = y >= s.y0 && y < s.y1 && x >= s.x0 && x < s.x1;
  return inside ? cell_at(c, s, y, x, b) : nullptr;
}

}  // namespace genperf::pixel
