// The sampler's CPU executor. Multiply-adds are rounded once or twice, as the instruction set has it: the
// inputs are small integers, on which that makes no difference.
#pragma once

#include "compare.h"
#include "pixel_sampler/pixel_sampler.h"

namespace genperf {
namespace {

// A convolution of a row of cells, a pointwise function of the result, attention over the source, and a sum
// of table rows from the result on.
struct PixelSamplerCase {
  int64_t batch, cols, channels_in, channels, taps, heads;

  explicit PixelSamplerCase(Random& random) {
    constexpr int64_t kBatches[] = {1, 1, 1, 2, 3, 5, 12, 13, 16, 40};
    constexpr int64_t kChannels[] = {1, 5, 16, 17, 33, 64, 100, 128, 200};
    batch = kBatches[random.below(10)];
    cols = random.below(2) ? 1 : 1 + random.below(7);
    channels_in = kChannels[random.below(9)];
    channels = kChannels[random.below(9)];
    taps = 1 + random.below(6);
    heads = channels_in % 4 == 0 ? 4 : 1;
  }
};

std::vector<float> integers(Random& random, int64_t n) {
  std::vector<float> x(n);
  for (float& v : x) v = static_cast<float>(random.below(7) - 3);
  return x;
}

void pixel_sampler_case(const PixelSamplerCase& p, pixel::Op op, Random& random, Group& group) {
  using namespace pixel;
  constexpr int64_t kRows = 2, kNoLimit = int64_t{1} << 30;
  const int64_t source_floats = kRows * p.cols * p.channels_in, out_floats = p.cols * p.channels;
  // Buffers: source, sums, functions of them, attention.
  const std::vector<Buffer> buffers = {
      {0, kRows, p.cols, p.channels_in},
      {source_floats, 1, p.cols, p.channels},
      {source_floats + out_floats, 1, p.cols, p.channels},
      {source_floats + 2 * out_floats, 1, p.cols, p.channels_in},
      {source_floats + 2 * out_floats + p.cols * p.channels_in, 1, p.cols, p.channels},
  };
  const int64_t workspace = source_floats + 3 * out_floats + p.cols * p.channels_in;
  // Operands: the source, a bias, the sums, the sums of the next cell, the source's own cell.
  const std::vector<Const> consts = {{0, 0, 0, 0, 1}};
  const std::vector<Operand> operands = {
      {0, 0, 0, 0, 0, 0, kRows, random.below(2), p.cols}, {1, 0, 0, 0, 0, 0, kNoLimit, 0, kNoLimit},
      {0, 1, 0, 0, 0, 0, kNoLimit, 0, kNoLimit},          {0, 1, 0, 0, 1, 0, kNoLimit, 0, p.cols},
      {0, 0, 0, 0, 0, 0, kNoLimit, 0, kNoLimit},
  };
  std::vector<Tap> taps;
  for (int64_t t = 0; t < p.taps; ++t) taps.push_back({-random.below(2), random.below(5) - 2});
  std::vector<Instruction> instructions(4);
  instructions[0].kind = pixel::Kind::kConv;
  instructions[0].conv = {1, 0, p.channels, 0, p.channels_in, 0, p.taps, 1, 1, 0, random.below(3) - 1};
  if (instructions[0].conv.init == 0) instructions[0].conv.init = -1;
  instructions[1].kind = pixel::Kind::kPointwise;
  instructions[1].pointwise = {2, 0, p.channels, op, 2, 3, 0.5, 2.0};
  instructions[2].kind = pixel::Kind::kAttention;
  const int64_t dim = p.channels_in / p.heads;
  instructions[2].attention = {3, 0, 4, 4, 4, p.heads, dim, dim, 0.0, 1, p.cols};
  instructions[3].kind = pixel::Kind::kEmbed;
  instructions[3].embed = {4, 0, p.channels, 2, 0, 0, p.taps, random.below(2) ? -1 : 2};
  std::vector<Segment> segments;
  for (int32_t i = 0; i < 4; ++i) segments.push_back({i, 1, 0, static_cast<int32_t>(p.cols)});
  const std::vector<int64_t> slot_begin = {0, 4};
  const std::vector<int64_t> counts(kRows * p.cols, kRows * p.cols);
  const std::vector<float> bias = integers(random, p.channels);
  const int64_t panels = (p.channels + kPanel - 1) / kPanel;
  const std::vector<float> weights = integers(random, panels * p.taps * p.channels_in * kPanel);
  constexpr int64_t kClasses = 5;
  const std::vector<float> table = integers(random, p.taps * kClasses * p.channels);
  std::vector<float> storage(weights.size() + kAlignment / sizeof(float));
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  float* packed = storage.data() + (kAlignment - address % kAlignment) / sizeof(float);
  std::memcpy(packed, weights.data(), weights.size() * sizeof(float));

  Head head{};
  head.draws = head.values = 1;
  head.rows = kRows, head.cols = p.cols;
  Tables tables{};
  tables.head = &head;
  tables.buffers = buffers.data(), tables.buffer_count = 5;
  tables.consts = consts.data();
  tables.operands = operands.data(), tables.operand_count = 5;
  tables.taps = taps.data();
  tables.instructions = instructions.data(), tables.instruction_count = 4;
  tables.segments = segments.data(), tables.segment_count = 4;
  tables.slot_begin = slot_begin.data();
  tables.tensors = {bias.data(), counts.data(), table.data()};
  tables.tensor_sizes = {p.channels, kRows * p.cols, p.taps * kClasses * p.channels};
  tables.weights = {packed};
  const Plan plan(tables);

  const std::vector<float> source = integers(random, source_floats * p.batch);
  Tensor out({workspace * p.batch}, DType::kFloat32, Layout::kContiguous);
  std::vector<float> values = integers(random, p.batch * kRows * p.cols), scratch(plan.scratch);
  group.add({&out}, [&] {
    float* floats = static_cast<float*>(out.view().data);
    std::memcpy(floats, source.data(), source.size() * sizeof(float));
    RunArgs args{};
    args.plan = &plan;
    args.workspace = floats, args.values = values.data(), args.scratch = scratch.data();
    args.batch = p.batch, args.end = 1;
    args.temperature = 1.0f;
    args.threads = 1;
    pixel_sampler_cpu(args);
  });
}

void pixel_sampler_cases(Totals& totals) {
  Group group("pixel_sampler", totals);
  Random random(3);
  for (int repeat = 0; repeat < 12; ++repeat)
    for (int op = 0; op <= static_cast<int>(pixel::Op::kErf); ++op)
      pixel_sampler_case(PixelSamplerCase(random), static_cast<pixel::Op>(op), random, group);
}

}  // namespace
}  // namespace genperf
