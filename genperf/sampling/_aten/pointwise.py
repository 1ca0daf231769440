"""Functions of one or two tensors, element by element."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from genperf.sampling import _layout
from genperf.sampling._aten.layout import dim_of
from genperf.sampling._aten.registry import handles
from genperf.sampling._layout import Sym
from genperf.sampling._lower import Lowering, is_number
from genperf.sampling._program import Op

_UNARY = {
    "relu": Op.RELU, "tanh": Op.TANH, "sigmoid": Op.SIGMOID, "silu": Op.SILU, "exp": Op.EXP, "log": Op.LOG,
    "sqrt": Op.SQRT, "reciprocal": Op.RECIPROCAL, "square": Op.SQUARE, "abs": Op.ABS, "erf": Op.ERF,
}  # fmt: skip


@handles(*_UNARY)
def unary(state: Lowering, x: Sym) -> Sym:
    return state.unary(x, _UNARY[state.operation])


@handles("neg")
def neg(state: Lowering, x: Sym) -> Sym:
    return state.unary(x, Op.AFFINE, -1.0, 0.0)


@handles("rsqrt")
def rsqrt(state: Lowering, x: Sym) -> Sym:
    return state.unary(state.unary(x, Op.SQRT), Op.RECIPROCAL)


@handles("gelu")
def gelu(state: Lowering, x: Sym, *, approximate: str = "none") -> Sym:
    return state.unary(x, Op.GELU if approximate == "none" else Op.GELU_TANH)


@handles("leaky_relu")
def leaky_relu(state: Lowering, x: Sym, slope: float = 0.01) -> Sym:
    return state.unary(x, Op.LEAKY_RELU, slope)


@handles("_prelu_kernel")
def prelu(state: Lowering, x: Sym, slope: Any) -> Sym:
    if not isinstance(slope, Tensor):
        raise state.fail("a slope that depends on the sampled pixels is not supported")
    if slope.numel() == 1:
        return state.unary(x, Op.LEAKY_RELU, float(slope))
    below = state.binary(state.unary(x, Op.CLAMP, -math.inf, 0.0), slope, Op.MUL)
    return state.binary(state.unary(x, Op.RELU), below, Op.ADD)


@handles("elu", "celu")
def elu(state: Lowering, x: Sym, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Sym:
    if input_scale != 1 or (state.operation == "celu" and alpha != 1):
        raise state.fail("elu with a scale of its input is not supported")
    y = state.unary(x, Op.ELU, alpha)
    return y if scale == 1 else state.unary(y, Op.AFFINE, scale, 0.0)


@handles("softplus")
def softplus(state: Lowering, x: Sym, beta: float = 1.0, threshold: float = 20.0) -> Sym:
    return state.unary(x, Op.SOFTPLUS, beta, threshold)


@handles("log_sigmoid_forward")
def log_sigmoid(state: Lowering, x: Sym) -> list[Sym | None]:
    y = state.unary(neg(state, x), Op.SOFTPLUS, 1.0, 20.0)
    return [neg(state, y), None]


@handles("mish")
def mish(state: Lowering, x: Sym) -> Sym:
    return state.binary(x, state.unary(state.unary(x, Op.SOFTPLUS, 1.0, 20.0), Op.TANH), Op.MUL)


@handles("hardtanh", "clamp", "clamp_min", "clamp_max", "clip")
def clamp(
    state: Lowering, x: Sym, low: Any = None, high: Any = None, *, min: Any = None, max: Any = None
) -> Sym:
    low, high = low if low is not None else min, high if high is not None else max
    if state.operation == "hardtanh":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    elif state.operation == "clamp_max":
        low, high = None, low
    if all(bound is None or is_number(bound) for bound in (low, high)):
        bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        return state.unary(x, Op.CLAMP, *bounds)
    y = x if low is None else state.binary(x, low, Op.MAXIMUM)
    return y if high is None else state.binary(y, high, Op.MINIMUM)


@handles("hardsigmoid", "hardswish")
def hard(state: Lowering, x: Sym) -> Sym:
    gate = state.unary(state.unary(state.unary(x, Op.AFFINE, 1.0, 3.0), Op.CLAMP, 0.0, 6.0), Op.AFFINE, 1 / 6)
    return gate if state.operation == "hardsigmoid" else state.binary(x, gate, Op.MUL)


@handles("glu")
def glu(state: Lowering, x: Sym, dim: int = -1) -> Sym:
    dim = dim_of(x, dim)
    half = x.shape[dim] // 2
    a, b = _layout.narrow(x, dim, 0, half), _layout.narrow(x, dim, half, half)
    return state.binary(a, b, Op.MUL_SIGMOID)


@handles("pow", "float_power")
def power(state: Lowering, x: Any, exponent: Any) -> Sym:
    if isinstance(exponent, Sym):
        if not is_number(x) or float(x) <= 0:
            raise state.fail("a power of something else than a positive number is not supported")
        return state.unary(state.unary(exponent, Op.AFFINE, math.log(float(x))), Op.EXP)
    n = float(exponent) if is_number(exponent) else math.nan
    if n == 0.5:
        return state.unary(x, Op.SQRT)
    if n not in (1, 2, 3, 4, -0.5, -1, -2):
        raise state.fail(f"the power {exponent} is not supported")
    y = {0.5: lambda: state.unary(x, Op.SQRT), 1.0: lambda: x}.get(
        abs(n), lambda: state.unary(x, Op.SQUARE)
    )()
    if n == 3:
        y = state.binary(y, x, Op.MUL)
    if n == 4:
        y = state.unary(y, Op.SQUARE)
    return y if n > 0 else state.unary(y, Op.RECIPROCAL)


# two operands


def combined(state: Lowering, a: Any, b: Any, op: Op) -> Any:
    for x in (a, b):
        if isinstance(x, Sym) and x.deferred:
            result = x.combined(state, a, b, op)
            if result is not None:
                return result
    return state.binary(state.settled(a), state.settled(b), op)


def _scaled(state: Lowering, x: Any, alpha: float) -> Any:
    if alpha == 1:
        return x
    return state.unary(state.settled(x), Op.AFFINE, alpha, 0.0) if isinstance(x, Sym) else x * alpha


@handles("add", deferred=True)
def add(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return combined(state, a, _scaled(state, b, alpha), Op.ADD)


@handles("sub", deferred=True)
def sub(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return combined(state, a, _scaled(state, b, alpha), Op.SUB)


@handles("rsub", deferred=True)
def rsub(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return combined(state, b, _scaled(state, a, alpha), Op.SUB)


@handles("mul", deferred=True)
def mul(state: Lowering, a: Any, b: Any) -> Any:
    return combined(state, a, b, Op.MUL)


@handles("div", deferred=True)
def div(state: Lowering, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise state.fail("rounds an input-dependent tensor")
    return combined(state, a, b, Op.DIV)


@handles("addcmul")
def addcmul(state: Lowering, x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    product = _scaled(
        state, state.binary(a, b, Op.MUL) if isinstance(a, Sym) or isinstance(b, Sym) else a * b, value
    )
    return state.binary(x, product, Op.ADD)


@handles("maximum", "minimum")
def extremum(state: Lowering, a: Any, b: Any) -> Any:
    return state.binary(a, b, Op.MAXIMUM if state.operation == "maximum" else Op.MINIMUM)
