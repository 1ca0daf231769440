// The pointwise functions of a program, for float (CUDA) and for blocks of floats (CPU): the same bits.
#pragma once

#include "../common/math.h"
#include "program.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

// erf(x) within 2 ulp. Minimax fits: of erf(x) / x by x^2 up to 1, of log(1 - erf x) by x beyond.
template <class F>
GENPERF_HD F erf(F x) {
  F t = abs(x);
  F z = x * x;
  F r = splat<F>(7.853857824e-05f);
  r = r * z + -8.010192541e-04f;
  r = r * z + 5.188327748e-03f;
  r = r * z + -2.685381100e-02f;
  r = r * z + 1.128358543e-01f;
  r = r * z + -3.761262596e-01f;
  r = r * z + 1.283791065e-01f;
  F near_zero = r * x + x;
  t = select(t > 4.0f, splat<F>(4.0f), t);  // from there on it rounds to 1
  F s = splat<F>(1.879717893e-04f);
  s = s * t + -2.964007203e-03f;
  s = s * t + 2.190648206e-02f;
  s = s * t + -1.032562181e-01f;
  s = s * t + -6.379649639e-01f;
  s = s * t + -1.127202272e+00f;
  s = s * t + -3.124673385e-04f;
  F y = 1.0f - exp_bounded(s);
  return select(abs(x) > 1.0f, select(x < 0.0f, -y, y), near_zero);
}

// tanh(a) sigmoid(b), with one division. Both are at their limits long before the exponents' bound.
template <class F>
GENPERF_HD F tanh_sigmoid(F a, F b) {
  F x = -2.0f * abs(a), y = -abs(b);
  x = select(x < -87.0f, splat<F>(-87.0f), x);
  y = select(y < -87.0f, splat<F>(-87.0f), y);
  F e = exp_m1(x, exp_bounded(x)), t = exp_bounded(y);
  F gated = select(b < 0.0f, e * t, e) / ((2.0f + e) * (1.0f + t));
  return select(a < 0.0f, gated, -gated);
}

// `b` is read by functions of two operands only.
template <Op kOp, class F>
GENPERF_HD F pointwise(F a, [[maybe_unused]] F b, [[maybe_unused]] float p, [[maybe_unused]] float q) {
  [[maybe_unused]] const F zero = splat<F>(0.0f);
  [[maybe_unused]] F derivative;
  if constexpr (kOp == Op::kCopy) {
    return a;
  } else if constexpr (kOp == Op::kAffine) {
    return a * p + q;
  } else if constexpr (kOp == Op::kAdd) {
    return a + b;
  } else if constexpr (kOp == Op::kSub) {
    return a - b;
  } else if constexpr (kOp == Op::kMul) {
    return a * b;
  } else if constexpr (kOp == Op::kDiv) {
    return a / b;
  } else if constexpr (kOp == Op::kMaximum) {
    return select(a == a, select(a > b, a, b), a);  // NaN if either is
  } else if constexpr (kOp == Op::kMinimum) {
    return select(a == a, select(a < b, a, b), a);
  } else if constexpr (kOp == Op::kRelu) {
    return select(a < 0.0f, zero, a);
  } else if constexpr (kOp == Op::kLeakyRelu) {
    return select(a > 0.0f, a, a * p);
  } else if constexpr (kOp == Op::kElu) {
    return select(a > 0.0f, a, p * exp_m1(a, exp(a)));
  } else if constexpr (kOp == Op::kTanh) {
    return tanh(a, derivative);
  } else if constexpr (kOp == Op::kSigmoid) {
    return sigmoid(a);
  } else if constexpr (kOp == Op::kSilu) {
    return a * sigmoid(a);
  } else if constexpr (kOp == Op::kGelu) {
    return 0.5f * a * (1.0f + erf(a * 0.707106781186547524f));
  } else if constexpr (kOp == Op::kGeluTanh) {
    F inner = 0.797884560802865356f * (a + 0.044715f * (a * a * a));
    return 0.5f * a * (1.0f + tanh(inner, derivative));
  } else if constexpr (kOp == Op::kSoftplus) {
    F scaled = a * p;
    return select(scaled > q, a, softplus(scaled) / p);
  } else if constexpr (kOp == Op::kExp) {
    return exp(a);
  } else if constexpr (kOp == Op::kLog) {
    return log(a);
  } else if constexpr (kOp == Op::kSqrt) {
    return sqrt_rn(a);
  } else if constexpr (kOp == Op::kReciprocal) {
    return 1.0f / a;
  } else if constexpr (kOp == Op::kSquare) {
    return a * a;
  } else if constexpr (kOp == Op::kAbs) {
    return abs(a);
  } else if constexpr (kOp == Op::kClamp) {
    F low = select(a < p, splat<F>(p), a);
    return select(low > q, splat<F>(q), low);
  } else if constexpr (kOp == Op::kTanhSigmoid) {
    return tanh_sigmoid(a, b);
  } else if constexpr (kOp == Op::kMulSigmoid) {
    return a * sigmoid(b);
  } else {
    static_assert(kOp == Op::kErf);
    return erf(a);
  }
}

inline constexpr int kOps = static_cast<int>(Op::kErf) + 1;

GENPERF_HD constexpr bool is_binary(Op op) {
  return (op >= Op::kAdd && op <= Op::kMinimum) || op == Op::kTanhSigmoid || op == Op::kMulSigmoid;
}

namespace detail {
template <int kOp, class F>
GENPERF_HD F pointwise_from(int op, F a, F b, float p, float q) {
  if constexpr (kOp + 1 < kOps) {
    if (op != kOp) return pointwise_from<kOp + 1>(op, a, b, p, q);
  }
  return pointwise<static_cast<Op>(kOp)>(a, b, p, q);
}
}  // namespace detail

// The function by its number.
template <class F>
GENPERF_HD F pointwise(Op op, F a, F b, float p, float q) {
  return detail::pointwise_from<0>(static_cast<int>(op), a, b, p, q);
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
