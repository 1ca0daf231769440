// Choice of the CPU instruction set at run time. Every csrc/<op>/kernel.inl is built once for each
// instruction set, in a namespace of its name.
#pragma once

namespace genperf {

enum class Isa : int { baseline, avx2, avx512 };

bool has_isa(Isa isa);
// The widest that this machine has, unless `set_isa` chose another.
Isa current_isa();
void set_isa(Isa isa);

// One function built for every instruction set.
template <class Args>
struct IsaTable {
  void (*baseline)(const Args&);
  void (*avx2)(const Args&);
  void (*avx512)(const Args&);

  void operator()(const Args& args) const {
    switch (current_isa()) {
      case Isa::avx512:
        return avx512(args);
      case Isa::avx2:
        return avx2(args);
      case Isa::baseline:
        return baseline(args);
    }
  }
};

}  // namespace genperf

// GENPERF_ISA_TABLE(f, Args): declares `void f(const Args&)` in each instruction set's namespace, and
// the table `f_isas` of them.
#if defined(__x86_64__) && !defined(GENPERF_SIMT)
#define GENPERF_ISA_TABLE(f, Args) \
  namespace baseline {             \
  void f(const Args&);             \
  }                                \
  namespace avx2 {                 \
  void f(const Args&);             \
  }                                \
  namespace avx512 {               \
  void f(const Args&);             \
  }                                \
  constexpr IsaTable<Args> f##_isas { baseline::f, avx2::f, avx512::f }
#else
#define GENPERF_ISA_TABLE(f, Args) \
  namespace baseline {             \
  void f(const Args&);             \
  }                                \
  constexpr IsaTable<Args> f##_isas { baseline::f, baseline::f, baseline::f }
#endif
