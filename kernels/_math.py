"""Single-precision elementary functions: ``csrc/common/math.h``, the same bits.

Only IEEE operations are used (``tl.div_rn`` and ``tl.sqrt_rn`` where Triton's own are approximate),
and kernels are launched with ``enable_fp_fusion=False``, so a block gets on the GPU what the other
backends get on the host.
"""

import os

import triton
import triton.language as tl

FLOAT_MAX = tl.constexpr(3.402823466e38)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
LOG2_E = tl.constexpr(1.44269504088896341)
LOG_2PI = tl.constexpr(1.8378770664093453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def log_normal(x):
    """log(x) for x in [2^-126, inf), within 1 ulp."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # x = 2^e m with m in [sqrt(1/2), sqrt(2))
    t = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    fe = e.to(tl.float32)
    z = t * t
    z2 = z * z
    low = (3.3333331174e-1 + -2.4999993993e-1 * t) + (2.0000714765e-1 + -1.6668057665e-1 * t) * z
    high = (1.4249322787e-1 + -1.2420140846e-1 * t) + (1.1676998740e-1 + -1.1514610310e-1 * t) * z
    y = (low + (high + 7.0376836292e-2 * z2) * z2) * t * z
    y = y + fe * LN2_LOW
    y = y - 0.5 * z
    return (t + y) + fe * LN2_HIGH


@triton.jit
def log(x):
    """log(x): -inf at 0, NaN below it, subnormals included."""
    m_tiny = x < 1.17549435e-38
    y = log_normal(x * tl.where(m_tiny, 8388608.0, 1.0)) - tl.where(m_tiny, 15.942385152878742, 0.0)
    y = tl.where(x == 0.0, float("-inf"), y)
    y = tl.where(x == float("inf"), x, y)
    return tl.where(x >= 0.0, y, float("nan"))


@triton.jit
def log_1p(x):
    """log(1 + x) for x > -1, without the rounding of 1 + x."""
    y = 1.0 + x
    return log_normal(y) + tl.div_rn(x - (y - 1.0), y)


@triton.jit
def _exp_fraction(x):
    """e^x = y 2^n for |x| <= 104 or NaN: n as the low bits of the first result, and y in [0.7, 1.5]."""
    shifted = x * LOG2_E + 12582912.0  # adding 3 * 2^22 rounds to an integer
    n = shifted - 12582912.0
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    r2 = r * r
    y = (5.0000001201e-1 + 1.6666665459e-1 * r) + (4.1665795894e-2 + 8.3334519073e-3 * r) * r2
    y = y + (1.3981999507e-3 + 1.9875691500e-4 * r) * (r2 * r2)
    return shifted, y * r2 + r + 1.0


@triton.jit
def exp(x):
    """e^x, overflowing to inf and underflowing gradually to 0; NaN stays NaN."""
    c = tl.where(x > 89.0, 89.0, x)
    c = tl.where(c < -104.0, -104.0, c)
    shifted, y = _exp_fraction(c)
    # 2^n in two factors, since n reaches 128 and -150.
    k = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = k >> 1
    y = y * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return y * ((k - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_bounded(x):
    """e^x for -87 <= x <= 88 or NaN: the same bits as exp."""
    shifted, y = _exp_fraction(x)
    return y * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def exp_m1_mx(x, exp_x):
    """e^x - 1 - x, never negative, to a few ulp, given e^x."""
    x2 = x * x
    q = (0.5 + 1.666666716e-1 * x) + (4.166579247e-2 + 8.333181962e-3 * x) * x2
    q = q + (1.398219727e-3 + 1.996218634e-4 * x) * (x2 * x2)
    return tl.where(tl.abs(x) <= 0.5, q * x2, (exp_x - 1.0) - x)


@triton.jit
def exp_m1(x, exp_x):
    """e^x - 1 without cancellation, given e^x."""
    return tl.where(tl.abs(x) <= 0.5, exp_m1_mx(x, exp_x) + x, exp_x - 1.0)


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow: x at inf, 0 at -inf."""
    y = exp(-tl.abs(x))
    u = 1.0 + y
    log1p = log_normal(u) + tl.div_rn(y - (u - 1.0), u)
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), 1.0 + e)


@triton.jit
def tanh(x):
    """tanh(x) and its derivative, from e^-2|x| - 1."""
    a = -2.0 * tl.abs(x)
    u = exp(a)
    e = exp_m1(a, u)
    d = 2.0 + e
    t = tl.div_rn(-e, d)
    return tl.where(x < 0.0, -t, t), tl.div_rn(4.0 * u, d * d)


@triton.jit
def cos_sin_of_turn(k):
    """cos and sin of 2 pi (k + 1/2) / 2^24 for int32 k in [0, 2^24): the quadrant is exact."""
    quadrant = (k + (1 << 21)) >> 22  # 0..4, nearest axis
    rest = k - (quadrant << 22)  # [-2^21, 2^21)
    x = (rest.to(tl.float32) + 0.5) * 3.7450705e-7  # (pi / 2) 2^-22
    z = x * x
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = 2.443315711809948e-5 * z + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    m_swap = (quadrant & 1) != 0
    cq = tl.where(m_swap, s, c)
    sq = tl.where(m_swap, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -cq, cq), tl.where((quadrant & 2) != 0, -sq, sq)


@triton.jit
def saturate(x):
    """x, and the largest finite float32 where it is larger; NaN stays NaN."""
    return tl.where(x > FLOAT_MAX, FLOAT_MAX, x)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 x rounded to nearest even in dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
