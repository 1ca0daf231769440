"""Distances of a vector from a codeword: in float64 with an error bound, and their order without rounding.

The bounds are derived in ``docs/vector_quantization.md``. Pointers are to the vectors' first elements, with
the strides of their elements.
"""

import triton
import triton.language as tl

from ._tile import offset_of

L2 = tl.constexpr(0)
COSINE = tl.constexpr(1)
DOT = tl.constexpr(2)

# Digits of 32 bits in a sum of products of float32, whose least unit is 2^-350; see csrc/vq_nearest/exact.h.
DIGITS = tl.constexpr(20)


@triton.jit
def load_doubles(p, stride, i_d, D):
    return tl.load(p + i_d * stride, mask=i_d < D, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def measure(p_x, s_x, p_c, s_c, D, METRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    """What orders codewords by their distance, and its error bound."""
    value = tl.zeros([BLOCK_D], tl.float64)
    size = tl.zeros([BLOCK_D], tl.float64)
    square = tl.zeros([BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        b_x = load_doubles(p_x, s_x, i_d, D)
        b_c = load_doubles(p_c, s_c, i_d, D)
        if METRIC == L2:
            value += (b_x - b_c) * (b_x - b_c)
        else:
            value -= b_x * b_c
            size += tl.abs(b_x * b_c)
        if METRIC == COSINE:
            square += b_c * b_c
    if METRIC == L2:
        size = value
    unit = (tl.zeros([], tl.float64) + D + 16) * 2.220446049250313e-16
    result, bound = tl.sum(value, axis=0), tl.sum(size, axis=0) * unit
    if METRIC == COSINE:
        length = tl.sqrt(tl.sum(square, axis=0))
        length = tl.where(length == 0.0, 1.0, length)  # of products that are 0 as well
        result, bound = result / length, bound / length
    return result, bound


@triton.jit
def digits_of(term, digit):
    """Digit number ``digit`` of products of two float32 (or twice those), signed: int64."""
    bits = term.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 0x7FF
    mantissa = tl.where(exponent == 0, 0, (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000)
    place = exponent - 725 - 32 * digit
    left = tl.minimum(tl.maximum(place, 0), 31)  # only the lower 32 bits are wanted
    right = tl.minimum(tl.maximum(-place, 0), 63)
    shifted = tl.where(place >= 32, 0, (mantissa << left) >> right) & 0xFFFFFFFF
    return tl.where(bits < 0, -shifted, shifted)


@triton.jit
def _compare_sums(p_x, s_x, p_a, p_b, s_c, D, METRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    carry = tl.zeros([], tl.int64)
    nonzero = tl.zeros([], tl.int64)
    for digit in range(DIGITS):
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            b_x = load_doubles(p_x, s_x, i_d, D)
            b_a = load_doubles(p_a, s_c, i_d, D)
            b_b = load_doubles(p_b, s_c, i_d, D)
            if METRIC == L2:
                terms = digits_of(b_a * b_a, digit) - digits_of(b_b * b_b, digit)
                terms += digits_of(2.0 * b_x * b_b, digit) - digits_of(2.0 * b_x * b_a, digit)
            else:
                terms = digits_of(b_x * b_b, digit) - digits_of(b_x * b_a, digit)
            carry += tl.sum(terms, axis=0)
        nonzero = nonzero | (carry & 0xFFFFFFFF)
        carry = carry >> 32
    return tl.where(carry < 0, -1, tl.where((carry | nonzero) == 0, 0, 1))


@triton.jit
def _sign_and_digits(p_x, s_x, p_y, s_y, D, BLOCK_D: tl.constexpr):
    """The sign of x.y, and the digits of its absolute value: [64], the lowest first."""
    i_digit = tl.arange(0, 64)
    digits = tl.zeros([64], tl.int64)
    sign = tl.full([], 1, tl.int64)
    for _ in range(2):  # the first time for the sign
        carry = tl.zeros([], tl.int64)
        for digit in range(DIGITS):
            for d in range(0, D, BLOCK_D):
                i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
                terms = load_doubles(p_x, s_x, i_d, D) * load_doubles(p_y, s_y, i_d, D)
                carry += sign * tl.sum(digits_of(terms, digit), axis=0)
            digits = tl.where(i_digit == digit, carry & 0xFFFFFFFF, digits)
            carry = carry >> 32
        sign = tl.where(carry < 0, -sign, sign)
    return tl.where(tl.sum(digits, axis=0) == 0, 0, sign), digits


@triton.jit
def _product(a, b):
    """Digits of the product of natural numbers, [64] each."""
    i_digit = tl.arange(0, 64)
    digits = tl.zeros([64], tl.int64)
    carry = tl.zeros([], tl.int64)
    for k in range(64):
        other = tl.gather(b, tl.maximum(k - i_digit, 0), 0)
        terms = tl.where(i_digit <= k, a, 0).to(tl.uint64) * other.to(tl.uint64)
        carry += tl.sum((terms & 0xFFFFFFFF).to(tl.int64), axis=0)
        digits = tl.where(i_digit == k, carry & 0xFFFFFFFF, digits)
        carry = (carry >> 32) + tl.sum((terms >> 32).to(tl.int64), axis=0)
    return digits


@triton.jit
def _compare_cosines(p_x, s_x, p_a, p_b, s_c, D, BLOCK_D: tl.constexpr):
    """By the signs of x.a and x.b and, where these agree, by (x.a)^2 |b|^2 and (x.b)^2 |a|^2."""
    sign_a, xa = _sign_and_digits(p_x, s_x, p_a, s_c, D, BLOCK_D)
    sign_b, xb = _sign_and_digits(p_x, s_x, p_b, s_c, D, BLOCK_D)
    _, aa = _sign_and_digits(p_a, s_c, p_a, s_c, D, BLOCK_D)
    _, bb = _sign_and_digits(p_b, s_c, p_b, s_c, D, BLOCK_D)
    difference = _product(_product(xa, xa), bb) - _product(_product(xb, xb), aa)
    i_digit = tl.arange(0, 64)
    highest = tl.max(tl.where(difference != 0, i_digit, 0), axis=0)
    larger = tl.sum(tl.where(i_digit == highest, difference, 0), axis=0)
    order = tl.where(larger == 0, 0, tl.where(larger > 0, -sign_a, sign_a))
    return tl.where(sign_a == sign_b, order, sign_b - sign_a)


@triton.jit
def compare(p_x, s_x, p_a, p_b, s_c, D, METRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sign of the difference of the distances of a and b from x: negative where a is nearer."""
    if METRIC == COSINE:
        order = _compare_cosines(p_x, s_x, p_a, p_b, s_c, D, BLOCK_D)
    else:
        order = _compare_sums(p_x, s_x, p_a, p_b, s_c, D, METRIC, BLOCK_D)
    return order


@triton.jit
def rank_kernel(
    p_x, p_codebook, p_usable, p_list, p_count, p_found, p_candidates, p_out, sizes, strides, s_d,
    s_head, s_k, s_cd, N, K, D, METRIC: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The nearest among the candidates of each listed vector."""
    for i in range(tl.program_id(0), tl.load(p_count), tl.num_programs(0)):
        i_row = tl.load(p_list + i)
        i_head = i_row // N
        p_vector = p_x + offset_of(i_head, i_row - i_head * N, sizes, strides)
        p_book = p_codebook + i_head * s_head
        found = tl.load(p_found + i)
        p_named = p_candidates + (tl.zeros([], tl.int64) + i) * CANDIDATES
        every = found > CANDIDATES
        nearest = tl.zeros([], tl.int64)
        least = tl.full([], float("inf"), tl.float64)
        error = tl.zeros([], tl.float64)
        for j in range(tl.where(every, K, found)):
            named = tl.load(p_named + j, mask=~every, other=0)
            k = tl.where(every, j, named).to(tl.int64)
            usable = tl.load(p_usable + i_head * K + k) != 0
            p_word = p_book + k * s_k
            value, bound = measure(p_vector, s_d, p_word, s_cd, D, METRIC, BLOCK_D)
            nearer = usable & (value + bound < least - error)
            if usable & (nearer == 0) & ((least + error < value - bound) == 0):
                order = compare(p_vector, s_d, p_word, p_book + nearest * s_k, s_cd, D, METRIC, BLOCK_D)
                nearer = (order < 0) | ((order == 0) & (k < nearest))
            nearest = tl.where(nearer, k, nearest)
            least = tl.where(nearer, value, least)
            error = tl.where(nearer, bound, error)
        tl.store(p_out + i_row, nearest)
