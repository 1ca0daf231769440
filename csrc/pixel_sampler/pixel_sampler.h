// The CPU executor of a program (program.h): slots [begin, end) for a batch of images in one call.
//
// Threads share out the images, each running the whole program for its own. Where there are fewer
// images than threads, one team runs all of them: its first thread does everything but the large
// convolutions and attentions, whose output channels and heads are shared out. The results are the same bits
// either way, since no output value depends on what is computed beside it.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace genperf::pixel {

inline constexpr int kAlignment = 64;  // of the workspace, of weights and of scratch memory, in bytes
inline constexpr int kRows = 96;       // rows of a matrix product that are worked on together
inline constexpr int kAtOnce = 4;      // products that are added to a sum between its load and its store

// An operand with all that its address depends on. `row` and `col` map a coordinate to its place in the
// ring, `row` times the ring's columns.
struct Source {
  int32_t dy, dx, y0, x0;
  uint32_t height, width;  // of the window
  const int32_t *row, *col;
  int64_t offset, channels;  // of the buffer
  int64_t channel;
  const float* constant;  // at the operand's channel; null for a buffer
  int64_t stride_b, stride_y, stride_x;
};

// Where results go.
struct Target {
  const int32_t *row, *col;
  int64_t offset, channels;
};

// Products [k, k + length) of a convolution: channels from `channel` on of one tap, in one block of kBlock.
struct Piece {
  int32_t tap, channel, length;
  bool last;  // of its block
  int64_t k;
};

// A number that is not 0, and which product of an output value it is in.
struct Factor {
  int32_t k;
  float x;
};

// A convolution with its products in order.
struct Product {
  const Piece* pieces;
  int32_t piece_count, panels;
  int64_t depth;  // products of an output value
  const float* weight;
  // [depth, panels * kPanel] where the source is what a ReLU writes and all are finite, so that zeros need no
  // products; else null.
  const float* by_product;
};

// What Python hands over, and keeps alive.
struct Tables {
  const Head* head;
  const Buffer* buffers;
  const Const* consts;
  const Operand* operands;
  const Tap* taps;
  const Instruction* instructions;
  const Segment* segments;
  const int64_t* slot_begin;  // slots + 1
  int64_t buffer_count, operand_count, instruction_count, segment_count;
  std::vector<const void*> tensors;   // float32, or int64 for counts
  std::vector<int64_t> tensor_sizes;  // elements
  std::vector<const float*> weights;  // packed
};

// Tables ready to run. Raw pointers: the kernels, which are built for several instruction sets, share no
// inline function of the standard library.
class Plan {
 public:
  explicit Plan(const Tables& tables);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Head head;
  const Source* sources;
  const Target* targets;
  const Instruction* instructions;
  const Product* products;  // by instruction
  const Tap* taps;
  const Segment* segments;
  const int64_t* slot_begin;
  const void* const* tensors;
  const int64_t* tensor_sizes;
  const float* zeros;  // as many as any operand has channels

  // Scratch memory of a thread, in floats: each part begins at a multiple of 16.
  int64_t scratch_pointers;  // to the rows that taps read
  int64_t scratch_pieces;
  int64_t scratch_needed;   // which taps are
  int64_t scratch_factors;  // those of a convolution that are not 0
  int64_t scratch_scores;   // of attention
  int64_t scratch_head;
  int64_t scratch;  // all of it

 private:
  const int32_t* ring(int64_t size, int64_t factor);
  const float* by_product(const Conv& conv, const Operand& source, const Product& p);

  std::vector<Source> sources_;
  std::vector<Target> targets_;
  std::vector<Instruction> instructions_;
  std::vector<Product> products_;
  std::vector<Piece> pieces_;
  std::vector<std::vector<float>> by_product_;
  std::vector<Tap> taps_;
  std::vector<const void*> tensors_;
  std::vector<int64_t> tensor_sizes_;
  std::vector<float> zeros_;
  std::vector<std::vector<int32_t>> rings_;
  std::vector<std::pair<int64_t, int64_t>> ring_keys_;
  int64_t low_ = 0, high_ = 0;  // coordinates that can occur
};

struct RunArgs {
  const Plan* plan;
  float* workspace;     // Program.workspace * batch floats
  float* values;        // [batch, rows, cols, values]
  const float* noise;   // [batch, rows, cols, noises]; null for a callback
  const float* known;   // [batch, rows, cols, values], or null
  const uint8_t* mask;  // the same shape, or null
  float* scratch;       // threads * Plan.scratch floats
  int64_t batch, begin, end;
  float temperature;
  int64_t top_k;
  int threads;
};

// Threads of one team. The first one hands out segments in parts, which whoever comes first takes: it waits
// for parts under way, and not for a thread that the system has not let run.
struct Team {
  int size = 1;
  // Number of the segment handed out, its parts, and those taken: 32, 16 and 16 bits; all ones at the end.
  alignas(64) uint64_t ticket = 0;
  const Segment* segment = nullptr;
  alignas(64) int64_t done = 0;  // parts
};

// One thread's part of a call: images [first, last), or its share of a team's work.
struct MemberArgs {
  const RunArgs* run;
  int64_t first, last;
  Team* team;  // null where the thread works alone
  int member;
  float* scratch;
};

void pixel_sampler_cpu(const RunArgs& args);

// The sum of n floats by one thread, as fast as it can read them: what benchmarks compare the streaming of
// weights with.
struct SumArgs {
  const float* x;
  int64_t n;
  double* sum;
};

void sum_floats_cpu(const SumArgs& args);

}  // namespace genperf::pixel
