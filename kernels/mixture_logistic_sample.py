"""Samples of the mixture of logistics, the bits of the CPU's.

The op is ``genperf/ops/mixture_logistic_sample.py``. One launch: a thread has a position, chooses its mixture
from the logits, and reads only the parameters of that one; with a key its uniforms are made in registers.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._choose import choose
from ._logistic import LONG, POSITIONS, inner_uniform, logistic_value
from ._math import log_normal, rounded, tanh
from ._philox import philox_words, uniform_from_bits
from ._tile import LAUNCH, Example, numbering, offset_of, on_device_of, plan, tile


@triton.jit
def _choose_largest(p_logits, s_class, p_noise, s_noise, classes, m, temperature):
    """The largest logit with the Gumbel noise of uniforms; whether it is finite, and none is NaN or +inf."""
    b_temperature = tl.full(m.shape, temperature, tl.float32)
    b_most = tl.full(m.shape, float("-inf"), tl.float32)
    b_largest = b_most
    b_doubt = tl.zeros(m.shape, tl.float32)
    i_chosen = tl.zeros(m.shape, tl.int64)
    for k in range(classes):
        b_logit = tl.load(p_logits, mask=m, other=0.0).to(tl.float32)
        b_u = inner_uniform(tl.load(p_noise, mask=m, other=0.5))
        b_score = tl.div_rn(b_logit, b_temperature) - log_normal(-log_normal(b_u))
        m_better = b_score > b_most
        b_most = tl.where(m_better, b_score, b_most)
        i_chosen = tl.where(m_better, k, i_chosen)
        b_largest = tl.where(b_logit > b_largest, b_logit, b_largest)
        b_doubt = b_doubt + tl.where(b_logit == float("-inf"), 0.0, b_logit) * 0.0
        p_logits += s_class
        p_noise += s_noise
    return i_chosen, b_largest * 0.0 + b_doubt == 0.0


@triton.jit
def _uniforms_of_key(p_key, s_key, n_samples, i_b, i_number, SLOTS: tl.constexpr):
    """Elements SLOTS i_number and those after it."""
    seed = tl.load(p_key + i_b * s_key, mask=i_b < n_samples, other=0)  # [BLOCK_B, 1]
    offset = tl.load(p_key + i_b * s_key + 1, mask=i_b < n_samples, other=0)
    if SLOTS == 4:
        w0, w1, w2, w3 = philox_words(seed, offset, i_number)
        return uniform_from_bits(w0), uniform_from_bits(w1), uniform_from_bits(w2), uniform_from_bits(w3)
    elif SLOTS == 2:
        w0, w1, w2, w3 = philox_words(seed, offset, i_number >> 1)
        m_even = (i_number & 1) == 0
        return uniform_from_bits(tl.where(m_even, w0, w2)), uniform_from_bits(tl.where(m_even, w1, w3))
    else:
        tl.static_assert(SLOTS == 1)
        w0, w1, w2, w3 = philox_words(seed, offset, i_number >> 2)
        m_even = (i_number & 1) == 0
        b_low, b_high = tl.where(m_even, w0, w1), tl.where(m_even, w2, w3)
        return (uniform_from_bits(tl.where((i_number & 2) == 0, b_low, b_high)),)


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _share(p, m):
    b_share, _ = tanh(_load(p, m))
    return b_share


@triton.jit
def _draw(p_log_scale, m, m_valid, b_mean, b_uniform, min_log_scale, heat):
    b_value = logistic_value(b_mean, _load(p_log_scale, m), b_uniform, min_log_scale, heat)
    return tl.where(m_valid, b_value, float("nan"))


@triton.jit
def _store(p, b_value, m, UNIT: tl.constexpr):
    tl.store(p, rounded(b_value * 0.5 + 0.5 if UNIT else b_value, p.dtype.element_ty), mask=m)


@triton.jit
def _sample_kernel(
    p_params,
    p_of_mixture,
    p_of_values,
    p_key,
    p_out,
    strides,
    channels,
    s_key,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    K,
    min_log_scale,
    temperature,
    heat,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
    GUMBEL: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    LEAVES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_params, s_of_mixture, s_of_values, s_number, s_out = strides
    _, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    p_params += offset_of(i_b, i_n, sizes, s_params)  # [BLOCK_B, BLOCK_N], as all blocks
    p_out += offset_of(i_b, i_n, sizes, s_out)
    if p_of_mixture is not None:
        p_of_mixture += offset_of(i_b, i_n, sizes, s_of_mixture)
    if p_key is not None:
        i_number = offset_of(i_b, i_n, sizes, s_number)
        u = _uniforms_of_key(p_key, s_key, n_samples, i_b, i_number, CHANNELS + LOGITS)
        if LOGITS:
            b_of_mixture = u[0]
            u = u[1:]
    else:
        p_of_values += offset_of(i_b, i_n, sizes, s_of_values)
        b_u = tl.load(p_of_values, mask=m, other=0.5)
        u = (b_u,)
        if CHANNELS == 3:
            p_green = p_of_values + channels[2]
            u = (b_u, tl.load(p_green, mask=m, other=0.5), tl.load(p_green + channels[2], mask=m, other=0.5))
        if LOGITS and not GUMBEL:
            b_of_mixture = tl.load(p_of_mixture, mask=m, other=0.5)
    step = (tl.zeros([], tl.int64) + K) * channels[0]
    m_valid = m
    if LOGITS:
        if GUMBEL:
            i_k, m_valid = _choose_largest(
                p_params, channels[0], p_of_mixture, channels[1], K, m, temperature
            )
        else:
            i_k, m_valid = choose(p_params, channels[0], K, m, b_of_mixture, temperature, LEVELS, LEAVES)
        p_params += step + i_k * channels[0]
    b_red = _draw(p_params + step, m, m_valid, _load(p_params, m), u[0], min_log_scale, heat)
    _store(p_out, b_red, m, UNIT)
    if CHANNELS == 3:
        p_green = p_params + 3 * step
        b_mean = _load(p_green, m) + _share(p_params + 2 * step, m) * b_red
        b_green = _draw(p_green + step, m, m_valid, b_mean, u[1], min_log_scale, heat)
        _store(p_out + channels[3], b_green, m, UNIT)
        p_blue = p_green + 3 * step
        b_mean = _load(p_blue, m) + _share(p_green + 2 * step, m) * b_red
        b_mean = b_mean + _share(p_blue + 2 * step, m) * b_green
        b_blue = _draw(p_blue + step, m, m_valid, b_mean, u[2], min_log_scale, heat)
        _store(p_out + 2 * channels[3], b_blue, m, UNIT)


def _positions(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The strides of positions [B, *]."""
    return None if tensor is None else (tensor.stride(0), *tensor.stride()[2:])


def mixture_logistic_sample(
    params: Tensor,
    of_mixture: Tensor | None,
    of_values: Tensor | None,
    key: Tensor | None,
    channels: int,
    mixtures: int,
    logits: bool,
    unit: bool,
    min_log_scale: float,
    temperature: float,
    heat: float,
) -> Tensor:
    """The torch op ``genperf::mixture_logistic_sample``."""
    shape = (len(params), *params.shape[2:])
    out = params.new_empty(len(params), channels, *shape[1:])
    if out.numel() == 0:
        return out
    tensors = (params, of_mixture, of_values, out)
    strides = [_positions(tensor) for tensor in tensors]
    strides.insert(3, None if key is None else numbering(shape, key))
    p = plan(shape, *strides, size=POSITIONS)
    with on_device_of(params):
        _sample_kernel[p.grid](
            params,
            of_mixture,
            of_values,
            None if key is None else key.contiguous(),
            out,
            p.strides,
            tuple(None if tensor is None else tensor.stride(1) for tensor in tensors),
            2 if key is not None and key.dim() == 2 else 0,
            p.sizes,
            *p.counts,
            mixtures,
            min_log_scale,
            temperature,
            heat,
            CHANNELS=channels,
            LOGITS=logits,
            GUMBEL=of_mixture is not None and of_mixture.shape[1] == mixtures > 1,
            UNIT=unit,
            LEVELS=(max(mixtures - 1, 1).bit_length() + 3) // 4,
            LEAVES=min(mixtures, 16),
            **p.constants,
            **(LAUNCH if mixtures <= 16 else LONG),
        )
    return out


def _example(
    mixtures: int = 10, channels: int = 3, shape: tuple[int, ...] = (64, 32, 32),
    dtype: torch.dtype = torch.float32, last: bool = False, logits: bool = True, noise: bool = False,
    gumbel: bool = False, keys: bool = False, unit: bool = False,
) -> None:  # fmt: skip
    """On meta tensors."""

    def tensor(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if last:
            return torch.empty(*shape, n, dtype=dtype, device="meta").movedim(-1, 1)
        return torch.empty(shape[0], n, *shape[1:], dtype=dtype, device="meta")

    params = tensor(mixtures * ((3 if channels == 1 else 10) if logits else 2), dtype)
    key = None if noise else torch.empty((shape[0], 2) if keys else (2,), dtype=torch.int64, device="meta")
    of_mixture = tensor(mixtures if gumbel else 1) if noise and logits else None
    of_values = tensor(channels) if noise else None
    mixture_logistic_sample(
        params, of_mixture, of_values, key, channels, mixtures, logits, unit, -7.0, 0.9, 0.9
    )


_EXAMPLES: dict[str, dict] = {
    "": {},
    "channels last, bfloat16, noise": {"last": True, "dtype": torch.bfloat16, "noise": True},
    "Gumbel, NVAE": {"noise": True, "gumbel": True, "unit": True},
    "grey, keys": {"channels": 1, "keys": True},
    "40 mixtures": {"mixtures": 40},
    "5000 mixtures": {"mixtures": 5000, "channels": 1, "shape": (2, 8, 8)},
    "one logistic, half": {
        "mixtures": 1, "channels": 1, "logits": False, "shape": (32, 3, 64, 64), "dtype": torch.float16
    },
}  # fmt: skip
# Not wide: 32 threads of a warp read 128 bytes, whose 4 (or 2) are of a position each.
AOT = {name or "RGB": Example(partial(_example, **options), wide=False, quick=not name)
       for name, options in _EXAMPLES.items()}  # fmt: skip
