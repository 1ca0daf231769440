// CPU kernels, built once per instruction set (GENPERF_ISA).
#include "tiles.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

bool large(const Layout& l) { return l.outer * l.classes * l.inner > 1 << 15; }

View collapsed(const View& v) { return v ? collapse(v) : v; }

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void put_one(const View& v, int64_t at) {
  constexpr uint16_t kFloat16One = 0x3c00, kBFloat16One = 0x3f80;
  if (v.dtype == DType::kFloat32) {
    static_cast<float*>(v.data)[at] = 1.0f;
  } else {
    static_cast<uint16_t*>(v.data)[at] = v.dtype == DType::kFloat16 ? kFloat16One : kBFloat16One;
  }
}

// Zeros but for a one, in the elements start, start + step, ... of each class; NaN where `index` is negative.
void one_hot(const View& v, int64_t start, int64_t step, int64_t classes, int32_t index) {
  if (index >= 0) return put_one(v, start + index * step);
  const float nan = kNaN;
  for (int64_t k = 0; k < classes; ++k) Rows::write(v, start + k * step, 1, &nan);
}

void zero(const View& v, int64_t start, int64_t n) {
  std::memset(static_cast<char*>(v.data) + start * size_of(v.dtype), 0, n * size_of(v.dtype));
}

// As what the noise of a key is wanted.
GumbelForm form_of(const GumbelSoftmaxArgs& a) {
  if (a.hard) return GumbelForm::kWords;
  return a.key && a.tau == 1.0 ? GumbelForm::kExponentials : GumbelForm::kGumbels;
}

// What is done with a tile; `index` is for hard draws.
template <bool kRow, class Noise>
void work(const GumbelSoftmaxArgs& a, Tile<kRow> tile, Noise& noise, float* room, int32_t* index) {
  const float scale = static_cast<float>(1.0 / a.tau);
  if (!a.logits) {
    Vi sound[tile.kBlocks];
    for (Vi& s : sound) s = splat<Vi>(-1);
    return finish(tile, sound, weigh_known(tile), scale);
  }
  Level<kRow> level(tile);
  if (!level.finite) level.replace_infinite(tile, room);
  if (index) {
    a.noise ? draw<kRow, true>(tile, noise, index) : draw<kRow, false>(tile, noise, index);
    alignas(64) int32_t sound[kHeld];
    for (int i = 0; i < tile.active(); ++i) store(sound + i * kLanes, level.sound[i]);
    for (int i = 0; i < (kRow ? 1 : tile.active() * kLanes); ++i)
      if (!sound[i]) index[i] = -1;
    return;
  }
  const bool once = form_of(a) == GumbelForm::kExponentials;
  const Sums<kRow> sums = once ? weigh_once(tile, level, noise) : weigh(tile, scale, noise);
  finish(tile, level.sound, sums, scale);
}

// The arrays of a thread; `shape` of the tensors, `out` what is written.
struct Plan {
  const GumbelSoftmaxArgs& a;
  const View& out;
  const Layout layout;
  const View logits, noise, grad, y;
  const GumbelForm form;
  const bool pairs;  // sums of two floats are held

  Plan(const GumbelSoftmaxArgs& a, const View& out)
      : a(a),
        out(out),
        layout(out, a.dim, a.key),
        logits(collapsed(a.logits)),
        noise(collapsed(a.noise)),
        grad(collapsed(a.grad)),
        y(collapsed(a.grad ? a.y : View{})),
        form(form_of(a)),
        pairs(a.logits && form == GumbelForm::kGumbels) {}
};

void by_rows(const Plan& p) {
  const Rows rows(p.layout);
  const int64_t classes = p.layout.classes;
#pragma omp parallel if (large(p.layout))
  {
    RowArray logits(p.logits ? rows.floats() : 0), noise(rows.floats()), grad(p.grad ? rows.floats() : 0),
        y(p.y ? rows.floats() : 0), out(p.a.hard ? 0 : rows.floats());
    Scratch<float> rest(p.pairs ? rows.pitch() : 0), room(rows.pitch());
    alignas(64) PhiloxBuffer chunk, own_chunk;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < rows.groups(); ++g) {
      const int count = rows.rows(g);
      bool ready = true;
      if (p.logits) rows.read(p.logits, g, -kInfinity, logits);
      if (p.grad) rows.read(p.grad, g, 0.0f, grad);
      if (p.y) rows.read(p.y, g, 0.0f, y);
      if (p.noise) {
        rows.read(p.noise, g, 0.0f, noise);
      } else if (p.a.key) {
        ready = rows.read_noise(p.form, g, chunk, noise);
      }
      if (p.a.hard) {
        zero(p.out, p.layout.element(rows.first(g)), count * classes);
      } else {
        rows.open(p.out, g, out);
      }
      for (int r = 0; r < count; ++r) {
        const int64_t o = rows.first(g);
        Tile<true> tile{p.logits ? logits.row[r] : nullptr, p.grad ? grad.row[r] : nullptr,
                        p.a.hard ? nullptr : out.row[r],    rest.get(),
                        padded_classes(classes) / kLanes,   1};
        if (p.y) std::memcpy(tile.y, y.row[r], tile.steps * kLanes * sizeof(float));
        RowNoise source{ready ? noise.row[r] : nullptr, p.form, {}, 0, classes, own_chunk};
        if (!ready) source.key = p.layout.key_of(o), source.element = p.layout.element_of_key(o);
        int32_t index;
        work(p.a, tile, source, room.get(), p.a.hard ? &index : nullptr);
        if (p.a.hard) {
          const int64_t inner = p.layout.inner, start = p.layout.element(o);
          one_hot(p.out, inner == 1 ? start + r * classes : start + r, inner, classes, index);
        }
      }
      if (!p.a.hard) rows.close(p.out, g, out);
    }
  }
}

void by_positions(const Plan& p) {
  const Layout& l = p.layout;
  const int64_t tiles = (l.inner + kHeld - 1) / kHeld, floats = l.classes * kHeld;
#pragma omp parallel if (large(l))
  {
    Scratch<float> logits(p.logits ? floats : 0), grad(p.grad ? floats : 0);
    Scratch<float> y(p.a.hard ? 0 : floats), rest(p.pairs ? floats : 0);
    alignas(64) PhiloxBuffer chunk;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < l.outer * tiles; ++t) {
      const int64_t o = t / tiles, first = t % tiles * kHeld, at = l.element(o) + first;
      const int n = static_cast<int>(l.inner - first < kHeld ? l.inner - first : kHeld);
      const auto read = [&](const View& v, const Scratch<float>& to) {
        if (!v) return;
        Buffer buffer;
        for (int64_t k = 0; k < l.classes; ++k)
          std::memcpy(to.get() + k * kHeld, read_chunk(v, at + k * l.inner, n, buffer),
                      padded(n) * sizeof(float));
      };
      read(p.logits, logits), read(p.grad, grad), read(p.y, y);
      const Tile<false> tile{p.logits ? logits.get() : nullptr,
                             p.grad ? grad.get() : nullptr,
                             y.get(),
                             rest.get(),
                             l.classes,
                             padded(n) / kLanes};
      BlockNoise source{p.noise, p.form, {}, at, 0, l.inner, n, chunk};
      if (p.a.key) source.key = l.key_of(o), source.element = l.element_of_key(o) + first;
      alignas(64) int32_t index[kHeld];
      work(p.a, tile, source, logits.get(), p.a.hard ? index : nullptr);
      for (int64_t k = 0; k < l.classes; ++k) {
        if (p.a.hard) {
          zero(p.out, at + k * l.inner, n);
        } else {
          Rows::write(p.out, at + k * l.inner, n, y.get() + k * kHeld);
        }
      }
      for (int i = 0; p.a.hard && i < n; ++i) one_hot(p.out, at + i, l.inner, l.classes, index[i]);
    }
  }
}

void run(const GumbelSoftmaxArgs& a, const View& out) {
  const Plan plan(a, out);
  if (out.numel() == 0) return;
  plan.layout.by_rows() ? by_rows(plan) : by_positions(plan);
}

}  // namespace

void gumbel_softmax_forward(const GumbelSoftmaxArgs& a) { run(a, a.y); }
void gumbel_softmax_backward(const GumbelSoftmaxArgs& a) { run(a, a.grad_logits); }

}  // namespace GENPERF_ISA
}  // namespace genperf
