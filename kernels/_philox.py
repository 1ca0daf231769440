"""Philox4x32-10 and the uniforms and normals made of it: ``csrc/common/philox.h``, the same bits."""

import triton
import triton.language as tl

from ._math import cos_sin_of_turn, log_normal


@triton.jit
def philox_words(seed, offset, i_group):
    """The four random words of elements 4 i_group .. 4 i_group + 3; all arguments int64."""
    return tl.philox(
        seed,
        i_group.to(tl.uint32),
        (i_group >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )


@triton.jit
def uniform_from_bits(bits):
    """A uniform in [2^-25, 1] of the upper 24 bits."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8 + 2.98023223876953125e-8


@triton.jit
def normals_from_bits(even, odd):
    """Two independent standard normals of the words of an even and of the next odd element."""
    radius = tl.sqrt_rn(-2.0 * log_normal(uniform_from_bits(even)))
    cosine, sine = cos_sin_of_turn((odd >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def gumbel_from_bits(bits):
    """A standard Gumbel variate of 32 bits."""
    i = bits.to(tl.int32, bitcast=True)
    m_low = i >= 0
    w = (i ^ (i >> 31)).to(tl.float32) * 2.3283064365386963e-10 + 1.16415321826934814453125e-10
    rest = 1.0 - w  # below one half v = w, else 1 - v = w
    logarithm = log_normal(tl.where(m_low, rest, w))
    lost = tl.div_rn(-w - (rest - 1.0), rest)  # of w, in the rounding of `rest`
    return -log_normal(-tl.where(m_low, logarithm + lost, logarithm))


@triton.jit
def interleave4(x0, x1, x2, x3):
    """Four blocks [..., N] as one [..., 4 N] that takes an element of each in turn."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def normals_of_groups(seed, offset, i_group):
    """The normals of whole groups of four elements: i_group [..., N] to [..., 4 N]."""
    w0, w1, w2, w3 = philox_words(seed, offset, i_group)
    n0, n1 = normals_from_bits(w0, w1)
    n2, n3 = normals_from_bits(w2, w3)
    return interleave4(n0, n1, n2, n3)


@triton.jit
def normals_at(seed, offset, i):
    """The normals of any elements i, at up to four times the work of `normals_of_groups`."""
    w0, w1, w2, w3 = philox_words(seed, offset, i >> 2)
    m_first = (i & 2) == 0
    n0, n1 = normals_from_bits(tl.where(m_first, w0, w2), tl.where(m_first, w1, w3))
    return tl.where((i & 1) == 0, n0, n1)


@triton.jit
def gumbels_of_groups(seed, offset, i_group):
    """The Gumbel variates of whole groups of four elements: i_group [..., N] to [..., 4 N]."""
    w0, w1, w2, w3 = philox_words(seed, offset, i_group)
    return gumbel_from_bits(interleave4(w0, w1, w2, w3))


@triton.jit
def gumbels_at(seed, offset, i):
    """The Gumbel variates of any elements i, at up to four times the work of `gumbels_of_groups`."""
    w0, w1, w2, w3 = philox_words(seed, offset, i >> 2)
    low, high = tl.where((i & 1) == 0, w0, w1), tl.where((i & 1) == 0, w2, w3)
    return gumbel_from_bits(tl.where((i & 2) == 0, low, high))


@triton.jit
def uniform_ends_from_bits(bits):
    """Of the uniform u = (bits + 1/2) 2^-32 the distance to the nearer of 0 and 1, and whether that is 0."""
    i = bits.to(tl.int32, bitcast=True)
    w = (i ^ (i >> 31)).to(tl.float32) * 2.3283064365386963e-10 + 1.16415321826934814453125e-10
    return w, i >= 0


@triton.jit
def uniform_ends_of_groups(seed, offset, i_group):
    """The same of whole groups of four elements: i_group [..., N] to two blocks [..., 4 N]."""
    w0, w1, w2, w3 = philox_words(seed, offset, i_group)
    return uniform_ends_from_bits(interleave4(w0, w1, w2, w3))
