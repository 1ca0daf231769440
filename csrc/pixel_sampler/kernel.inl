// One thread of the CPU executor, built once per instruction set (GENPERF_ISA).
#include <sched.h>

#include <utility>

#include "attention.h"
#include "head.h"
#include "pointwise.h"
#include "product.h"

namespace genperf::pixel {
namespace GENPERF_ISA {

namespace {

// Work (multiply-adds) from which a segment is shared out in a team.
constexpr int64_t kShared = 16384;
// Polls of a waiting thread before it lets others run.
constexpr int kPolls = 200;

template <Op kOp>
void pointwise_loop(const float* a, const float* b, float* out, int64_t n, float p, float q) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vf x = load(a + i);
    store(out + i, pointwise<kOp>(x, is_binary(kOp) ? load(b + i) : x, p, q));
  }
  if (i < n) {
    float x[kLanes] = {}, y[kLanes] = {};
    std::memcpy(x, a + i, (n - i) * sizeof(float));
    if (is_binary(kOp)) std::memcpy(y, b + i, (n - i) * sizeof(float));
    store(x, pointwise<kOp>(load(x), load(y), p, q));
    std::memcpy(out + i, x, (n - i) * sizeof(float));
  }
}

using PointwiseLoop = void (*)(const float*, const float*, float*, int64_t, float, float);

template <int... kOp>
constexpr PointwiseLoop pointwise_loop_of(Op op, std::integer_sequence<int, kOp...>) {
  constexpr PointwiseLoop loops[] = {pointwise_loop<static_cast<Op>(kOp)>...};
  return loops[static_cast<int>(op)];
}

void run_pointwise(const Context& c, const Pointwise& i, const Segment& s) {
  const PointwiseLoop loop = pointwise_loop_of(i.op, std::make_integer_sequence<int, kOps>());
  const Source& first = c.plan.sources[i.a];
  const Source* second = i.b < 0 ? nullptr : c.plan.sources + i.b;
  const Target& target = c.plan.targets[i.out];
  const float p = static_cast<float>(i.p), q = static_cast<float>(i.q);
  for (int64_t x = s.col; x < s.col + s.cols; ++x) {
    const Cell a = read(c, first, s.row, x);
    const Cell b = second ? read(c, *second, s.row, x) : a;
    float* out = write(c, target, s.row, x) + i.out_channel;
    if (target.channels == i.channels && a.stride == i.channels && b.stride == i.channels) {
      loop(a.p, b.p, out, c.images * i.channels, p, q);
    } else {
      for (int64_t image = 0; image < c.images; ++image)
        loop(a.p + image * a.stride, b.p + image * b.stride, out + image * target.channels, i.channels, p, q);
    }
  }
}

// out[0, kVectors) = from + the sum of some rows, in order.
template <int kVectors>
void add_channels(const float* const* rows, int count, int64_t channel, const float* from, float* out) {
  Nf sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = load_native(from + channel + v * kNativeLanes);
  for (int r = 0; r < count; ++r) {
    const float* row = rows[r] + channel;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] += load_native(row + v * kNativeLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store_native(out + channel + v * kNativeLanes, sum[v]);
}

void add_rows(const float* const* rows, int count, int64_t channels, const float* from, float* out) {
  constexpr int kWide = 8;
  int64_t n = 0;
  for (; n + kWide * kNativeLanes <= channels; n += kWide * kNativeLanes)
    add_channels<kWide>(rows, count, n, from, out);
  for (; n + kNativeLanes <= channels; n += kNativeLanes) add_channels<1>(rows, count, n, from, out);
  for (; n < channels; ++n) {
    float sum = from[n];
    for (int r = 0; r < count; ++r) sum += rows[r][n];
    out[n] = sum;
  }
}

void run_embed(const Context& c, const Embed& i, const Segment& s, const float* values) {
  const Head& head = c.plan.head;
  const Tap* taps = c.plan.taps + i.tap_begin;
  const int64_t tap_count = i.tap_end - i.tap_begin;
  const int64_t classes = c.plan.tensor_sizes[i.table] / (tap_count * i.channels);
  const Source* init = i.init < 0 ? nullptr : c.plan.sources + i.init;
  const Target& target = c.plan.targets[i.out];
  for (int64_t x = s.col; x < s.col + s.cols; ++x) {
    const Cell from = init ? read(c, *init, s.row, x) : Cell{c.plan.zeros, 0};
    float* out = write(c, target, s.row, x) + i.out_channel;
    for (int64_t image = 0; image < c.images; ++image) {
      const float* drawn = values + (c.first + image) * head.rows * head.cols * head.values + i.draw;
      const float* table = static_cast<const float*>(c.plan.tensors[i.table]);
      int count = 0;
      for (int64_t t = 0; t < tap_count; ++t, table += classes * i.channels) {
        const int64_t row = s.row + taps[t].dy, col = x + taps[t].dx;
        if (row < 0 || row >= head.rows || col < 0 || col >= head.cols) continue;
        const float value = drawn[(row * head.cols + col) * head.values];
        // Of a value that is no class, or NaN: a row that exists.
        const bool valid = value >= 0.0f && value < static_cast<float>(classes);
        c.pointers[count++] = table + (valid ? static_cast<int64_t>(value) : 0) * i.channels;
      }
      add_rows(c.pointers, count, i.channels, from.p + image * from.stride, out + image * target.channels);
    }
  }
}

// What a segment that is shared out can be divided into.
int64_t divisions(const Context& c, const Segment& s) {
  const Instruction& i = c.plan.instructions[s.instruction];
  return i.kind == Kind::kConv ? c.plan.products[s.instruction].panels : i.attention.heads;
}

void run_part(const Context& c, const Segment& s, int64_t part, int64_t parts) {
  const Instruction& i = c.plan.instructions[s.instruction];
  const int64_t n = divisions(c, s), begin = n * part / parts, end = n * (part + 1) / parts;
  if (i.kind == Kind::kConv) {
    convolve(c, i.conv, c.plan.products[s.instruction], s, static_cast<int>(begin), static_cast<int>(end));
  } else {
    attend(c, i.attention, s, begin, end);
  }
}

int64_t work(const Context& c, const Instruction& i, const Segment& s) {
  const int64_t cells = s.cols * c.images;
  if (i.kind == Kind::kConv) return cells * c.plan.products[s.instruction].depth * i.conv.channels;
  if (i.kind != Kind::kAttention) return 0;
  const Attention& a = i.attention;
  const int64_t* count = static_cast<const int64_t*>(c.plan.tensors[a.count]) + s.row * a.cols + s.col;
  return cells * a.heads * (a.dim_k + a.dim_v) * count[s.cols - 1];
}

template <class Ready>
void wait_until(Ready ready) {
  for (int polls = 0; !ready(); ++polls) {
    if (polls >= kPolls) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

constexpr uint64_t kEnd = ~uint64_t{0};

// Takes and runs parts of the segment that `ticket` names until there are none, or until another is handed
// out.
void run_parts(const Context& c, Team& team, uint64_t ticket) {
  const uint64_t number = ticket >> 32;
  while (ticket >> 32 == number) {
    const uint64_t parts = ticket >> 16 & 0xffff, part = ticket & 0xffff;
    if (part == parts) break;
    if (!__atomic_compare_exchange_n(&team.ticket, &ticket, ticket + 1, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE))
      continue;
    // The segment stays until this part is done.
    run_part(c, *team.segment, static_cast<int64_t>(part), static_cast<int64_t>(parts));
    __atomic_add_fetch(&team.done, 1, __ATOMIC_RELEASE);
    ticket = __atomic_load_n(&team.ticket, __ATOMIC_ACQUIRE);
  }
}

void run_in_team(const Context& c, const Segment& s, Team& team) {
  const int64_t wanted = 2 * team.size, most = divisions(c, s);
  const int64_t parts = wanted < most ? wanted : most;
  const uint64_t number = ((team.ticket >> 32) + 1) & 0x7fffffff;
  team.segment = &s;
  team.done = 0;
  const uint64_t ticket = number << 32 | static_cast<uint64_t>(parts) << 16;
  __atomic_store_n(&team.ticket, ticket, __ATOMIC_RELEASE);
  run_parts(c, team, ticket);
  wait_until([&] { return __atomic_load_n(&team.done, __ATOMIC_ACQUIRE) == parts; });
}

void serve(const Context& c, Team& team) {
  for (uint64_t last = 0, ticket = 0;; last = ticket) {
    wait_until([&] {
      ticket = __atomic_load_n(&team.ticket, __ATOMIC_ACQUIRE);
      return ticket >> 32 != last >> 32;
    });
    if (ticket == kEnd) return;
    run_parts(c, team, ticket);
  }
}

void run_segment(Context& c, const Segment& s, const Segment* end, const RunArgs& run, Team* team) {
  const Instruction& i = c.plan.instructions[s.instruction];
  if (i.kind == Kind::kConv) {
    const Segment* next = &s + 1;
    while (next < end && c.plan.instructions[next->instruction].kind != Kind::kConv) ++next;
    const Product& product = c.plan.products[next < end ? next->instruction : s.instruction];
    c.next_weight = product.weight;
    c.next_panel_size = product.depth * kPanel;
  }
  if (team && team->size > 1 && work(c, i, s) >= kShared) return run_in_team(c, s, *team);
  switch (i.kind) {
    case Kind::kConv: {
      const Product& product = c.plan.products[s.instruction];
      if (s.cols * c.images == 1 && convolve_one(c, i.conv, product, s)) return;
      return convolve(c, i.conv, product, s, 0, product.panels);
    }
    case Kind::kPointwise:
      return run_pointwise(c, i.pointwise, s);
    case Kind::kAttention:
      return attend(c, i.attention, s, 0, i.attention.heads);
    case Kind::kEmbed:
      return run_embed(c, i.embed, s, run.values);
  }
}

// Before the first slot of a pixel: what is not drawn yet is 0.
void clear_pixel(const Context& c, const RunArgs& run, int64_t y, int64_t x) {
  const Head& head = c.plan.head;
  for (int64_t image = c.first; image < c.first + c.images; ++image)
    for (int64_t v = 0; v < head.values; ++v)
      run.values[((image * head.rows + y) * head.cols + x) * head.values + v] = 0.0f;
  if (head.feedback == FeedbackKind::kNone) return;
  const Target& input = c.plan.targets[head.input];
  std::memset(write(c, input, y, x), 0, c.images * input.channels * sizeof(float));
}

void draw_pixel(const Context& c, const RunArgs& run, int64_t y, int64_t x, int index) {
  const Head& head = c.plan.head;
  const Cell params = read(c, c.plan.sources[head.params], y, x);
  const Sampling sampling{run.temperature, run.top_k};
  const int64_t count = head.values / head.draws;
  for (int64_t image = 0; image < c.images; ++image) {
    const int64_t pixel = ((c.first + image) * head.rows + y) * head.cols + x;
    const int64_t at = pixel * head.values;
    const Drawn drawn =
        draw(Serial(), head, index, params.p + image * params.stride, run.noise + pixel * head.noises,
             sampling, run.known ? run.known + at : nullptr, run.mask ? run.mask + at : nullptr, c.head);
    for (int64_t v = 0; v < count; ++v) run.values[at + index + v] = drawn.value[v];
    if (head.feedback == FeedbackKind::kNone) continue;
    const Target& input = c.plan.targets[head.input];
    float* cell = write(c, input, y, x) + image * input.channels;
    if (head.feedback == FeedbackKind::kScaled) {
      const float scale = static_cast<float>(head.scale), offset = static_cast<float>(head.offset);
      for (int64_t v = 0; v < count; ++v) cell[index + v] = drawn.value[v] * scale + offset;
    } else {
      const float value = drawn.value[0];
      const bool valid = value >= 0.0f && value < static_cast<float>(head.classes);
      if (valid) cell[index * head.classes + static_cast<int64_t>(value)] = 1.0f;
    }
  }
}

}  // namespace

void pixel_sampler_member(const MemberArgs& member) {
  const RunArgs& run = *member.run;
  const Plan& plan = *run.plan;
  float* scratch = member.scratch;
  Context c{plan, run.workspace, run.batch, member.first, member.last - member.first};
  c.pointers = reinterpret_cast<const float**>(scratch);
  c.pieces = reinterpret_cast<Piece*>(scratch += plan.scratch_pointers);
  c.needed = reinterpret_cast<bool*>(scratch += plan.scratch_pieces);
  c.factors = reinterpret_cast<Factor*>(scratch += plan.scratch_needed);
  c.scores = scratch += plan.scratch_factors;
  c.head = scratch += plan.scratch_scores;
  c.next_weight = plan.zeros;
  if (member.team && member.member > 0) return serve(c, *member.team);

  const Head& head = plan.head;
  const Segment* end = plan.segments + plan.slot_begin[run.end];
  for (int64_t slot = run.begin; slot < run.end; ++slot) {
    const int64_t pixel = slot / head.draws, y = pixel / head.cols, x = pixel % head.cols;
    const int index = static_cast<int>(slot % head.draws);
    if (index == 0) clear_pixel(c, run, y, x);
    for (int64_t i = plan.slot_begin[slot]; i < plan.slot_begin[slot + 1]; ++i)
      run_segment(c, plan.segments[i], end, run, member.team);
    if (head.kind != HeadKind::kCallback) draw_pixel(c, run, y, x, index);
  }
  if (member.team) __atomic_store_n(&member.team->ticket, kEnd, __ATOMIC_RELEASE);
}

// Eight independent chains, so that the reads are what it waits for.
void sum_floats(const SumArgs& args) {
  constexpr int kChains = 8;
  Nf chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kNativeLanes <= args.n; i += kChains * kNativeLanes)
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) chains[j] += load_native(args.x + i + j * kNativeLanes);
  double sum = 0.0;
  for (const Nf& chain : chains)
    for (int lane = 0; lane < kNativeLanes; ++lane) sum += chain[lane];
  for (; i < args.n; ++i) sum += args.x[i];
  *args.sum = sum;
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
