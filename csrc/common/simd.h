// Sixteen floats, whatever the CPU instruction set: one AVX-512 vector, two AVX2 vectors or four SSE
// vectors. The parts of a block are independent chains of operations, which a processor needs in plenty
// to stay busy, and share each constant. Included by lanes.h in builds that name a GENPERF_ISA; the
// native width follows the compiler's flags.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genperf {
inline namespace GENPERF_ISA {

#if defined(__AVX512F__)
inline constexpr int kNativeBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kNativeBytes = 32;
#else
inline constexpr int kNativeBytes = 16;
#endif

inline constexpr int kLanes = 16;
inline constexpr int kParts = kLanes * 4 / kNativeBytes;

// The result of f on each part.
template <class R, class Function>
GENPERF_HD R for_parts(Function f) {
  // Written out: a loop would keep the parts in memory.
  if constexpr (kParts == 1) {
    return R{{f(0)}};
  } else if constexpr (kParts == 2) {
    return R{{f(0), f(1)}};
  } else {
    return R{{f(0), f(1), f(2), f(3)}};
  }
}

// A block of 16 numbers of T in native vectors.
template <class T>
struct Block {
  typedef T Native __attribute__((vector_size(kNativeBytes)));
  Native part[kParts];

  // The same bits as numbers of another type.
  template <class To>
  GENPERF_HD explicit operator Block<To>() const {
    return for_parts<Block<To>>([&](int i) { return (typename Block<To>::Native)part[i]; });
  }
};

using Vf = Block<float>;
using Vi = Block<int32_t>;
using Vu = Block<uint32_t>;

namespace detail {
template <>
struct Lanes<Vf> {
  using Int = Vi;
  using Uint = Vu;
};
}  // namespace detail

#define GENPERF_ARITHMETIC(op)                                                 \
  template <class T>                                                           \
  GENPERF_HD Block<T> operator op(Block<T> a, Block<T> b) {                    \
    return for_parts<Block<T>>([&](int i) { return a.part[i] op b.part[i]; }); \
  }                                                                            \
  template <class T>                                                           \
  GENPERF_HD Block<T> operator op(Block<T> a, std::common_type_t<T> b) {       \
    return for_parts<Block<T>>([&](int i) { return a.part[i] op b; });         \
  }                                                                            \
  template <class T>                                                           \
  GENPERF_HD Block<T> operator op(std::common_type_t<T> a, Block<T> b) {       \
    return for_parts<Block<T>>([&](int i) { return a op b.part[i]; });         \
  }
GENPERF_ARITHMETIC(+)
GENPERF_ARITHMETIC(-)
GENPERF_ARITHMETIC(*)
GENPERF_ARITHMETIC(/)
GENPERF_ARITHMETIC(&)
GENPERF_ARITHMETIC(^)
#undef GENPERF_ARITHMETIC

// Comparisons: all bits set where they hold.
#define GENPERF_COMPARISON(op)                                           \
  template <class T>                                                     \
  GENPERF_HD Vi operator op(Block<T> a, Block<T> b) {                    \
    return for_parts<Vi>([&](int i) { return a.part[i] op b.part[i]; }); \
  }                                                                      \
  template <class T>                                                     \
  GENPERF_HD Vi operator op(Block<T> a, std::common_type_t<T> b) {       \
    return for_parts<Vi>([&](int i) { return a.part[i] op b; });         \
  }
GENPERF_COMPARISON(<)
GENPERF_COMPARISON(<=)
GENPERF_COMPARISON(>)
GENPERF_COMPARISON(>=)
GENPERF_COMPARISON(==)
#undef GENPERF_COMPARISON

template <class T>
GENPERF_HD Block<T> operator-(Block<T> a) {
  return for_parts<Block<T>>([&](int i) { return -a.part[i]; });
}

template <class T>
GENPERF_HD Block<T> operator<<(Block<T> a, int n) {
  return for_parts<Block<T>>([&](int i) { return a.part[i] << n; });
}

template <class T>
GENPERF_HD Block<T> operator>>(Block<T> a, int n) {
  return for_parts<Block<T>>([&](int i) { return a.part[i] >> n; });
}

template <class T>
GENPERF_HD Block<T> select(Vi mask, Block<T> a, Block<T> b) {
  return for_parts<Block<T>>([&](int i) { return mask.part[i] ? a.part[i] : b.part[i]; });
}

GENPERF_HD Vi to_bits(Vf x) { return (Vi)x; }
GENPERF_HD Vf floats_of(Vi x) {
  return for_parts<Vf>([&](int i) { return __builtin_convertvector(x.part[i], Vf::Native); });
}
GENPERF_HD Vf abs(Vf x) { return (Vf)((Vi)x & 0x7fffffff); }

template <class T>
GENPERF_HD Block<T> load(const T* p) {
  return for_parts<Block<T>>([&](int i) {
    typename Block<T>::Native x;
    std::memcpy(&x, p + i * (kLanes / kParts), sizeof x);
    return x;
  });
}

template <class T>
GENPERF_HD void store(T* p, Block<T> x) {
  for (int i = 0; i < kParts; ++i) std::memcpy(p + i * (kLanes / kParts), &x.part[i], sizeof x.part[i]);
}

// Of native vectors:
//   sqrt_native         correctly rounded
//   multiply_low_words  64-bit products of the low halves of 64-bit lanes
//   low_words           in each 128 bits, the low halves of a's two lanes and of b's two lanes
//   unpack_*            in each 128 bits, interleaving of the low or high halves, by one or two floats
using Nf = Vf::Native;
using Nu = Vu::Native;
using Nw = Block<uint64_t>::Native;

#if defined(__AVX512F__)
GENPERF_HD Nf sqrt_native(Nf x) { return (Nf)_mm512_sqrt_ps((__m512)x); }
GENPERF_HD Nw multiply_low_words(Nw a, Nw b) { return (Nw)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
GENPERF_HD Nu low_words(Nw a, Nw b) { return (Nu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88); }
GENPERF_HD Nf unpack_low(Nf a, Nf b) { return (Nf)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
GENPERF_HD Nf unpack_high(Nf a, Nf b) { return (Nf)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
GENPERF_HD Nf unpack_low_pairs(Nf a, Nf b) { return (Nf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
GENPERF_HD Nf unpack_high_pairs(Nf a, Nf b) { return (Nf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
GENPERF_HD Nf sqrt_native(Nf x) { return (Nf)_mm256_sqrt_ps((__m256)x); }
GENPERF_HD Nw multiply_low_words(Nw a, Nw b) { return (Nw)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
GENPERF_HD Nu low_words(Nw a, Nw b) { return (Nu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88); }
GENPERF_HD Nf unpack_low(Nf a, Nf b) { return (Nf)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
GENPERF_HD Nf unpack_high(Nf a, Nf b) { return (Nf)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
GENPERF_HD Nf unpack_low_pairs(Nf a, Nf b) { return (Nf)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
GENPERF_HD Nf unpack_high_pairs(Nf a, Nf b) { return (Nf)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#elif defined(__x86_64__)
GENPERF_HD Nf sqrt_native(Nf x) { return (Nf)_mm_sqrt_ps((__m128)x); }
GENPERF_HD Nw multiply_low_words(Nw a, Nw b) { return (Nw)_mm_mul_epu32((__m128i)a, (__m128i)b); }
GENPERF_HD Nu low_words(Nw a, Nw b) { return (Nu)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88); }
GENPERF_HD Nf unpack_low(Nf a, Nf b) { return (Nf)_mm_unpacklo_ps((__m128)a, (__m128)b); }
GENPERF_HD Nf unpack_high(Nf a, Nf b) { return (Nf)_mm_unpackhi_ps((__m128)a, (__m128)b); }
GENPERF_HD Nf unpack_low_pairs(Nf a, Nf b) { return (Nf)_mm_unpacklo_pd((__m128d)a, (__m128d)b); }
GENPERF_HD Nf unpack_high_pairs(Nf a, Nf b) { return (Nf)_mm_unpackhi_pd((__m128d)a, (__m128d)b); }
#else
GENPERF_HD Nf sqrt_native(Nf x) {
  return Nf{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
}
GENPERF_HD Nw multiply_low_words(Nw a, Nw b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
GENPERF_HD Nu low_words(Nw a, Nw b) {
  return Nu{(uint32_t)a[0], (uint32_t)a[1], (uint32_t)b[0], (uint32_t)b[1]};
}
GENPERF_HD Nf unpack_low(Nf a, Nf b) { return Nf{a[0], b[0], a[1], b[1]}; }
GENPERF_HD Nf unpack_high(Nf a, Nf b) { return Nf{a[2], b[2], a[3], b[3]}; }
GENPERF_HD Nf unpack_low_pairs(Nf a, Nf b) { return Nf{a[0], a[1], b[0], b[1]}; }
GENPERF_HD Nf unpack_high_pairs(Nf a, Nf b) { return Nf{a[2], a[3], b[2], b[3]}; }
#endif

GENPERF_HD Vf sqrt_rn(Vf x) {
  return for_parts<Vf>([&](int i) { return sqrt_native(x.part[i]); });
}

}  // namespace GENPERF_ISA
}  // namespace genperf
