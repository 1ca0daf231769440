// The program of a pixel sampler, as genperf/sampling/_program.py packs it: tables of 64-bit words.
// The Python classes of the same names hold the definitions; fields stand in the same order.
#pragma once

#include <cstdint>

namespace genperf::pixel {

inline constexpr int kPanel = 16;   // output channels that are packed side by side
inline constexpr int kBlock = 128;  // products of a convolution that are summed in one chain

enum class Kind : int64_t { kConv, kPointwise, kAttention, kEmbed };

enum class Op : int64_t {
  kCopy,
  kAffine,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMaximum,
  kMinimum,
  kRelu,
  kLeakyRelu,
  kElu,
  kTanh,
  kSigmoid,
  kSilu,
  kGelu,
  kGeluTanh,
  kSoftplus,
  kExp,
  kLog,
  kSqrt,
  kReciprocal,
  kSquare,
  kAbs,
  kClamp,
  kTanhSigmoid,
  kMulSigmoid,
  kErf
};

enum class HeadKind : int64_t { kCallback, kCategorical, kBernoulli, kGaussian, kLogisticMixture };

enum class FeedbackKind : int64_t { kNone, kScaled, kOneHot };

struct Buffer {
  int64_t offset, ring_rows, ring_cols, channels;
};

struct Const {
  int64_t index, stride_b, stride_y, stride_x, stride_c;
};

struct Operand {
  int64_t is_const, index, channel, dy, dx, y0, y1, x0, x1;
};

struct Tap {
  int64_t dy, dx;
};

struct Conv {
  int64_t out, out_channel, channels, source, channels_in, tap_begin, tap_end, num, den, weight, init;
};

struct Pointwise {
  int64_t out, out_channel, channels;
  Op op;
  int64_t a, b;
  double p, q;
};

struct Attention {
  int64_t out, out_channel, q, k, v, heads, dim_k, dim_v;
  double scale;
  int64_t count, cols;
};

struct Embed {
  int64_t out, out_channel, channels, table, draw, tap_begin, tap_end, init;
};

struct Instruction {
  Kind kind;
  union {
    Conv conv;
    Pointwise pointwise;
    Attention attention;
    Embed embed;
  };
};
static_assert(sizeof(Instruction) == 12 * sizeof(int64_t));

struct Head {
  HeadKind kind;
  int64_t params, rows, cols, draws, values, noises, classes, stride_class, stride_draw;
  FeedbackKind feedback;
  int64_t input;
  double scale, offset;
};

struct Segment {
  int32_t instruction, row, col, cols;
};

}  // namespace genperf::pixel
