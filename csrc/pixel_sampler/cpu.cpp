#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "../common/isa.h"
#include "head.h"
#include "pixel_sampler.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace genperf::pixel {

GENPERF_ISA_TABLE(pixel_sampler_member, MemberArgs);
GENPERF_ISA_TABLE(sum_floats, SumArgs);

namespace {

int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

int64_t floor_mod(int64_t a, int64_t m) { return (a % m + m) % m; }

uint32_t extent(int64_t low, int64_t high) {
  return static_cast<uint32_t>(std::clamp<int64_t>(high - low, 0, INT32_MAX));
}

int32_t clipped(int64_t x) {
  return static_cast<int32_t>(std::clamp<int64_t>(x, INT32_MIN / 2, INT32_MAX / 2));
}

// Products of one convolution, cut at taps and at blocks.
void append_pieces(const Conv& conv, std::vector<Piece>& pieces) {
  const int64_t depth = (conv.tap_end - conv.tap_begin) * conv.channels_in;
  for (int64_t k = 0; k < depth;) {
    const int64_t tap = k / conv.channels_in, channel = k % conv.channels_in;
    const int64_t length = std::min(conv.channels_in - channel, kBlock - k % kBlock);
    const bool last = (k + length) % kBlock == 0 || k + length == depth;
    pieces.push_back(
        {static_cast<int32_t>(tap), static_cast<int32_t>(channel), static_cast<int32_t>(length), last, k});
    k += length;
  }
}

}  // namespace

// The place in a ring of every coordinate that can occur, times a factor.
const int32_t* Plan::ring(int64_t size, int64_t factor) {
  const std::pair<int64_t, int64_t> key(size, factor);
  const auto found = std::find(ring_keys_.begin(), ring_keys_.end(), key);
  if (found == ring_keys_.end()) {
    std::vector<int32_t> table;
    for (int64_t x = low_; x < high_; ++x) table.push_back(static_cast<int32_t>(floor_mod(x, size) * factor));
    ring_keys_.push_back(key);
    rings_.push_back(std::move(table));
    return rings_.back().data() - low_;
  }
  return rings_[found - ring_keys_.begin()].data() - low_;
}

// Product::by_product.
const float* Plan::by_product(const Conv& conv, const Operand& source, const Product& p) {
  if (source.is_const || conv.channels % kPanel != 0) return nullptr;
  int64_t rectified = 0;
  for (const Instruction& i : instructions_) {
    if (i.kind != Kind::kPointwise || i.pointwise.op != Op::kRelu || i.pointwise.out != source.index)
      continue;
    const int64_t begin = std::max(source.channel, i.pointwise.out_channel);
    const int64_t end =
        std::min(source.channel + conv.channels_in, i.pointwise.out_channel + i.pointwise.channels);
    rectified += std::max<int64_t>(0, end - begin);
  }
  const int64_t width = p.panels * kPanel, size = p.depth * width;
  if (rectified < conv.channels_in ||
      !std::all_of(p.weight, p.weight + size, [](float x) { return std::isfinite(x); }))
    return nullptr;
  std::vector<float> weight(size);
  for (int64_t panel = 0; panel < p.panels; ++panel)
    for (int64_t k = 0; k < p.depth; ++k)
      std::copy_n(p.weight + (panel * p.depth + k) * kPanel, kPanel,
                  weight.data() + k * width + panel * kPanel);
  by_product_.push_back(std::move(weight));
  return by_product_.back().data();
}

Plan::Plan(const Tables& t)
    : head(*t.head),
      instructions_(t.instructions, t.instructions + t.instruction_count),
      tensors_(t.tensors),
      tensor_sizes_(t.tensor_sizes) {
  // Coordinates that can occur.
  int64_t largest = std::max(head.rows, head.cols);
  for (int64_t i = 0; i < t.segment_count; ++i)
    largest = std::max<int64_t>({largest, t.segments[i].row + 1, t.segments[i].col + t.segments[i].cols});
  int64_t scale = 1, shift = 0, taps = 0, tap_count = 0;
  for (const Instruction& i : instructions_) {
    if (i.kind != Kind::kConv && i.kind != Kind::kEmbed) continue;
    const bool conv = i.kind == Kind::kConv;
    const int64_t tap_begin = conv ? i.conv.tap_begin : i.embed.tap_begin;
    const int64_t tap_end = conv ? i.conv.tap_end : i.embed.tap_end;
    if (conv) scale = std::max(scale, i.conv.num);
    taps = std::max(taps, tap_end - tap_begin);
    tap_count = std::max(tap_count, tap_end);
  }
  taps_.assign(t.taps, t.taps + tap_count);
  for (const Tap& tap : taps_) shift = std::max({shift, std::abs(tap.dy), std::abs(tap.dx)});
  int64_t offset = 0;
  for (int64_t i = 0; i < t.operand_count; ++i)
    offset = std::max({offset, std::abs(t.operands[i].dy), std::abs(t.operands[i].dx)});
  low_ = -(shift + offset + 1);
  high_ = largest * scale + shift + offset + 1;

  for (int64_t i = 0; i < t.operand_count; ++i) {
    const Operand& o = t.operands[i];
    Source s{};
    s.dy = clipped(o.dy), s.dx = clipped(o.dx), s.y0 = clipped(o.y0), s.x0 = clipped(o.x0);
    s.height = extent(s.y0, o.y1), s.width = extent(s.x0, o.x1);
    s.channel = o.channel;
    if (o.is_const) {
      const Const& c = t.consts[o.index];
      s.constant = static_cast<const float*>(tensors_[c.index]) + o.channel;
      s.stride_b = c.stride_b, s.stride_y = c.stride_y, s.stride_x = c.stride_x;
    } else {
      const Buffer& b = t.buffers[o.index];
      s.row = ring(b.ring_rows, b.ring_cols), s.col = ring(b.ring_cols, 1);
      s.offset = b.offset, s.channels = b.channels;
    }
    sources_.push_back(s);
  }
  for (int64_t i = 0; i < t.buffer_count; ++i) {
    const Buffer& b = t.buffers[i];
    targets_.push_back({ring(b.ring_rows, b.ring_cols), ring(b.ring_cols, 1), b.offset, b.channels});
  }

  int64_t channels = 1, pieces = 0, pointers = taps * kRows, factors = 0;
  std::vector<int64_t> first_piece;
  scratch_scores = 0;
  for (const Instruction& i : instructions_) {
    Product p{};
    first_piece.push_back(static_cast<int64_t>(pieces_.size()));
    if (i.kind == Kind::kConv) {
      append_pieces(i.conv, pieces_);
      p.piece_count = static_cast<int32_t>(pieces_.size() - first_piece.back());
      p.panels = static_cast<int32_t>((i.conv.channels + kPanel - 1) / kPanel);
      p.depth = (i.conv.tap_end - i.conv.tap_begin) * i.conv.channels_in;
      p.weight = t.weights[i.conv.weight];
      p.by_product = by_product(i.conv, t.operands[i.conv.source], p);
      if (p.by_product) factors = std::max(factors, p.depth + 2 * kAtOnce);
      channels = std::max({channels, i.conv.channels, i.conv.channels_in});
      pieces = std::max<int64_t>(pieces, p.piece_count);
    } else if (i.kind == Kind::kPointwise) {
      channels = std::max(channels, i.pointwise.channels);
    } else if (i.kind == Kind::kAttention) {
      const int64_t* count = static_cast<const int64_t*>(tensors_[i.attention.count]);
      const int64_t keys = *std::max_element(count, count + tensor_sizes_[i.attention.count]);
      channels = std::max(channels, i.attention.heads * std::max(i.attention.dim_k, i.attention.dim_v));
      scratch_scores = std::max(scratch_scores, i.attention.heads * padded(keys));
      pointers = std::max(pointers, 2 * keys);
    } else {
      channels = std::max(channels, i.embed.channels);
    }
    products_.push_back(p);
  }
  for (size_t i = 0; i < products_.size(); ++i) products_[i].pieces = pieces_.data() + first_piece[i];
  zeros_.assign(padded(channels), 0.0f);

  sources = sources_.data();
  targets = targets_.data();
  instructions = instructions_.data();
  products = products_.data();
  this->taps = taps_.data();
  segments = t.segments;
  slot_begin = t.slot_begin;
  tensors = tensors_.data();
  tensor_sizes = tensor_sizes_.data();
  zeros = zeros_.data();
  scratch_pointers =
      padded(pointers * static_cast<int64_t>(sizeof(const float*)) / static_cast<int64_t>(sizeof(float)));
  scratch_pieces = padded(pieces * static_cast<int64_t>(sizeof(Piece) / sizeof(float)));
  scratch_needed = padded(taps);
  scratch_factors = padded(factors * static_cast<int64_t>(sizeof(Factor) / sizeof(float)));
  scratch_head = padded(head_scratch(head));
  scratch =
      scratch_pointers + scratch_pieces + scratch_needed + scratch_factors + scratch_scores + scratch_head;
}

void pixel_sampler_cpu(const RunArgs& args) {
  const int threads = std::max(1, args.threads);
  auto member = [&](int thread, int64_t first, int64_t last, Team* team) {
    pixel_sampler_member_isas(
        MemberArgs{&args, first, last, team, thread, args.scratch + thread * args.plan->scratch});
  };
  if (threads == 1) return member(0, 0, args.batch, nullptr);
  if (args.batch >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      member(part, args.batch * part / threads, args.batch * (part + 1) / threads, nullptr);
    return;
  }
  Team team;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();  // as many as there really are: they wait for each other
    member(omp_get_thread_num(), 0, args.batch, &team);
  }
#else
  member(0, 0, args.batch, &team);
#endif
}

void sum_floats_cpu(const SumArgs& args) { sum_floats_isas(args); }

}  // namespace genperf::pixel
