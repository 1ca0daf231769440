// CPU kernel, built once per instruction set (GENPERF_ISA).
//
// A chunk of uniforms is made in the first-level cache and becomes normals there. The order of operations
// in `log` and `cos_sin`, and which of them round once together, is that of torch's build (-mfma lets the
// compiler contract; the polynomials are Cephes', as in common/math.h): nothing here may be regrouped.
#include "../common/lanes.h"
#include "torch_normal.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int kWords = 624, kShift = 397;
constexpr int kChunk = 512;
// Lanes of radii, then of angles, of a block of 16 uniforms.
constexpr int kHalf = 8;

// a b + c, rounded once.
Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return {{(Nf)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}};
#elif defined(__FMA__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#else
  for (int i = 0; i < kLanes; ++i) {
    constexpr int n = kLanes / kParts;
    c.part[i / n][i % n] = std::fma(a.part[i / n][i % n], b.part[i / n][i % n], c.part[i / n][i % n]);
  }
  return c;
#endif
}

Vf fma(Vf a, Vf b, float c) { return fma(a, b, splat<Vf>(c)); }
Vf fma(Vf a, float b, Vf c) { return fma(a, splat<Vf>(b), c); }

// The words of torch's engine, from the one that it would give next.
class Engine {
 public:
  explicit Engine(int64_t* state) : state_(state) {
    next_ = static_cast<int>(state[2]);
    left_ = static_cast<int32_t>(state[1]) - 1;
    if (left_ > kWords - next_) left_ = kWords - next_;  // no state that torch itself would leave
    for (int i = 0; i < kWords; ++i) word_[i] = static_cast<uint32_t>(state[3 + i]);
  }

  // n uniforms in [0, 1); up to 15 more are written.
  void uniforms(int n, float* out) {
    while (n > 0) {
      if (left_ == 0) advance();
      const int count = n < left_ ? n : left_;
      for (int i = 0; i < count; i += kLanes) store(out + i, uniform(load(word_ + next_ + i)));
      next_ += count, left_ -= count;
      out += count, n -= count;
    }
  }

  void save() const {
    const int32_t left = left_ + 1;
    std::memcpy(&state_[1], &left, sizeof left);
    state_[2] = next_;
    for (int i = 0; i < kWords; ++i) state_[3 + i] = word_[i];
  }

 private:
  // Word k + 624 follows from words k, k + 1 and k + 397.
  void advance() {
    for (int k = 0; k < kWords; k += kLanes) {
      const Vu low = load(word_ + k + 1);
      const Vu y = (load(word_ + k) & 0x80000000u) ^ (low & 0x7fffffffu);
      const Vu odd = (Vu) - (Vi)(low & 1u);
      store(word_ + kWords + k, load(word_ + k + kShift) ^ (y >> 1) ^ (odd & 0x9908b0dfu));
    }
    std::memcpy(word_, word_ + kWords, kWords * sizeof(uint32_t));
    next_ = 0, left_ = kWords;
  }

  static Vf uniform(Vu y) {
    y = y ^ (y >> 11);
    y = y ^ ((y << 7) & 0x9d2c5680u);
    y = y ^ ((y << 15) & 0xefc60000u);
    y = y ^ (y >> 18);
    return floats_of((Vi)(y & 0xffffffu)) * 0x1p-24f;
  }

  int64_t* state_;
  int left_, next_;  // words not yet given, and where they begin
  alignas(64) uint32_t word_[2 * kWords] = {};
};

// log(x) for x in [2^-24, 1].
Vf log(Vf x) {
  Vi exponent = (Vi)((Vu)x >> 23) - 126;
  Vf m = (Vf)(((Vi)x & 0x007fffff) ^ 0x3f000000);  // [1/2, 1)
  const Vi small = m < 0.707106781186547524f;
  Vf e = floats_of(exponent + small);  // a true comparison is -1
  m = (m - 1.0f) + (Vf)((Vi)m & small);
  const Vf z = m * m;
  Vf y = splat<Vf>(7.0376836292e-2f);
  constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                     1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                     -2.4999993993e-1f, 3.3333331174e-1f};
  for (float c : kCoefficients) y = fma(y, m, c);
  y = fma(y * m, z, e * -2.12194440e-4f);
  y = fma(z, -0.5f, y);
  return fma(e, 0.693359375f, m + y);
}

// cos(x) and sin(x) for x in [0, 2 pi].
void cos_sin(Vf x, Vf& cosine, Vf& sine) {
  // The nearest even octant, and the angle from there in three steps.
  Vi octant = for_parts<Vi>(
      [&](int i) { return __builtin_convertvector((x * 1.27323954473516f).part[i], Vi::Native); });
  octant = (octant - -1) & ~1;
  const Vf o = floats_of(octant);
  x = fma(o, -0.78515625f, x);
  x = fma(o, -2.4187564849853515625e-4f, x);
  x = fma(o, -3.77489497744594108e-8f, x);
  const Vf z = x * x;
  Vf c = fma(splat<Vf>(2.443315711809948e-5f), z, -1.388731625493765e-3f);
  c = fma(c, z, 4.166664568298827e-2f);
  c = fma(c * z, z, z * -0.5f) + 1.0f;
  Vf s = fma(splat<Vf>(-1.9515295891e-4f), z, 8.3321608736e-3f);
  s = fma(s, z, -1.6666654611e-1f);
  s = fma(s * z, x, x);
  const Vi swapped = (octant << 30) < 0;
  const Vi sign = splat<Vi>(INT32_MIN);
  sine = (Vf)((Vi)select(swapped, c, s) ^ ((octant << 29) & sign));
  cosine = (Vf)((Vi)select(swapped, s, c) ^ (((octant - -2) << 29) & sign));
}

// Lanes 0 to 7 (half 0) or 8 to 15 (half 1) of two blocks of 16.
Vf load_halves(const float* block, int half) {
  return for_parts<Vf>([&](int i) {
    constexpr int n = kLanes / kParts;
    Nf x;
    if constexpr (n <= kHalf) {
      std::memcpy(&x, block + i * n / kHalf * kLanes + i * n % kHalf + half * kHalf, sizeof x);
    } else {
      std::memcpy(&x, block + half * kHalf, sizeof x / 2);
      std::memcpy((char*)&x + sizeof x / 2, block + kLanes + half * kHalf, sizeof x / 2);
    }
    return x;
  });
}

void store_halves(float* block, int half, Vf x) {
  for (int i = 0; i < kLanes / kHalf; ++i)
    std::memcpy(block + i * kLanes + half * kHalf, (const char*)&x + i * sizeof x / 2, sizeof x / 2);
}

// 32 normals from 32 uniforms.
void normals(const float* uniforms, float* out) {
  const Vf radius = sqrt_rn(log(1.0f - load_halves(uniforms, 0)) * -2.0f);
  Vf cosine, sine;
  cos_sin(load_halves(uniforms, 1) * 6.283185307179586f, cosine, sine);
  // + 0 as torch adds its mean: no normal is -0.
  store_halves(out, 0, radius * cosine + 0.0f);
  store_halves(out, 1, radius * sine + 0.0f);
}

// n <= kChunk of them, n a multiple of 16.
void normals(Engine& engine, int n, float* out) {
  alignas(64) float uniforms[kChunk + kLanes], rest[2 * kLanes];
  engine.uniforms(n, uniforms);
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) normals(uniforms + i, out + i);
  if (i == n) return;
  std::memset(uniforms + n, 0, kLanes * sizeof(float));
  normals(uniforms + i, rest);
  std::memcpy(out + i, rest, kLanes * sizeof(float));
}

}  // namespace

void torch_normal(const TorchNormalArgs& a) {
  const int64_t n = a.out.numel(), blocks = n / kLanes * kLanes;
  float* const out = static_cast<float*>(a.out.data);
  Engine engine(static_cast<int64_t*>(a.state.data));
  for (int64_t i = 0; i < blocks; i += kChunk)
    normals(engine, static_cast<int>(blocks - i < kChunk ? blocks - i : kChunk), out + i);
  if (blocks < n) {
    float unused[2 * kLanes];
    engine.uniforms(static_cast<int>(n - blocks), unused);
    normals(engine, kLanes, out + n - kLanes);
  }
  engine.save();
}

}  // namespace GENPERF_ISA
}  // namespace genperf
