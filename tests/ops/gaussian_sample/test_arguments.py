"""Bad input to genperf.ops.gaussian_sample is named."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.gaussian import KEY

from genperf.ops import gaussian_sample

T = torch.zeros(2, 3)

BAD: dict[str, tuple[type[Exception], str, tuple, dict]] = {
    "mean no tensor": (TypeError, r"mean is list, expected a tensor", ([1.0], T), {}),
    "scale no tensor": (TypeError, r"scale is float, expected a tensor", (T, 1.0), {}),
    "mean of integers": (TypeError, r"mean is torch.int64, expected one of", (T.long(), T), {}),
    "scale of another dtype": (
        TypeError, r"scale is torch.float16, expected torch.float32",
        (T, T.half()), {},
    ),
    "complex": (TypeError, r"mean is torch.complex64", (T.cfloat(), T.cfloat()), {}),
    "device": (ValueError, r"scale is on meta, expected cpu", (T, T.to("meta")), {}),
    "nothing to halve": (TypeError, r"mean is int, expected a tensor", (3,), {}),
    "odd halves": (ValueError, r"mean has shape \(2, 3\), expected an even size in dimension 1", (T,), {}),
    "no such dimension": (ValueError, r"mean has shape \(2, 3\), .* in dimension 2", (T,), {"dim": 2}),
    "shapes": (ValueError, r"scale has shape \(4, 3\), .* mean, \(2, 3\)", (T, torch.zeros(4, 3)), {}),
    "no batch": (ValueError, r"mean has shape \(\), .* reduction 'sample'", (T[0, 0], T[0, 0]), {}),
    "parametrization": (
        ValueError, r"parametrization is 'var', expected one of logvar",
        (T, T), {"parametrization": "var"},
    ),
    "reduction": (ValueError, r"reduction is 'sum', expected one of none", (T, T), {"reduction": "sum"}),
    "clamp upside down": (
        ValueError, r"clamp is \(2, 1\), expected .* low <= high",
        (T, T), {"clamp": (2, 1)},
    ),
    "clamp of NaN": (ValueError, r"clamp is \(nan, 1\)", (T, T), {"clamp": (math.nan, 1)}),
    "clamp of one": (ValueError, r"clamp is \(1,\)", (T, T), {"clamp": (1,)}),
    "clamp a number": (ValueError, r"clamp is 3", (T, T), {"clamp": 3}),
    "clamp of a std": (
        ValueError, r"clamp is \(0, 1\) for parametrization 'std'",
        (T, T), {"clamp": (0, 1), "parametrization": "std"},
    ),
    "offset of a logvar": (
        ValueError, r"offset is 0.1 for parametrization 'logvar'",
        (T, T), {"offset": 0.1},
    ),
    "negative offset": (
        ValueError, r"offset is -1 .* >= 0",
        (T, T), {"offset": -1, "parametrization": "softplus"},
    ),
    "infinite offset": (
        ValueError, r"offset is inf",
        (T, T), {"offset": math.inf, "parametrization": "softplus"},
    ),
    "temperature 0": (
        ValueError, r"temperature is 0, expected a finite number > 0",
        (T, T), {"temperature": 0},
    ),
    "temperature NaN": (ValueError, r"temperature is nan", (T, T), {"temperature": math.nan}),
    "prior no pair": (TypeError, r"prior is Tensor, expected a pair", (T, T), {"prior": T}),
    "prior of one": (TypeError, r"prior is tuple, expected a pair", (T, T), {"prior": (T,)}),
    "prior no tensor": (TypeError, r"prior\[1\] is int, expected a tensor", (T, T), {"prior": (T, 0)}),
    "prior of another dtype": (
        TypeError, r"prior is torch.float64, expected torch.float32",
        (T, T), {"prior": (T.double(), T.double())},
    ),
    "prior elsewhere": (
        ValueError, r"prior is on meta, expected cpu",
        (T, T), {"prior": (T.to("meta"),) * 2},
    ),
    "prior too large": (
        ValueError, r"prior has shape \(5, 2, 3\), expected .* \(2, 3\)",
        (T, T), {"prior": (T.expand(5, 2, 3),) * 2},
    ),
    "rng": (ValueError, r"rng is 'numpy', expected 'philox' or 'torch'", (T, T), {"rng": "numpy"}),
    "noise no tensor": (TypeError, r"noise is str, expected", (T, T), {"noise": "gaussian"}),
    "noise of another dtype": (TypeError, r"noise is torch.float16, expected", (T, T), {"noise": T.half()}),
    "noise of another shape": (
        ValueError, r"noise has shape \(3,\) on cpu, expected \(2, 3\)",
        (T, T), {"noise": T[0]},
    ),
    "noise elsewhere": (
        ValueError, r"noise has shape \(2, 3\) on meta, expected",
        (T, T), {"noise": T.to("meta")},
    ),
    "noise with gradient": (
        ValueError, r"noise requires a gradient",
        (T, T), {"noise": T.clone().requires_grad_()},
    ),
    "noise and key": (
        ValueError, r"more than one of noise, key and generator",
        (T, T), {"noise": T, "key": KEY},
    ),
    "key no tensor": (TypeError, r"key is int, expected an int64 tensor", (T, T), {"key": 7}),
    "key of floats": (TypeError, r"key is torch.float32, expected an int64", (T, T), {"key": T[0, :2]}),
    "key of another shape": (
        ValueError, r"key has shape \(3,\), expected \(2,\) or \(2, 2\)",
        (T, T), {"key": torch.zeros(3, dtype=torch.int64)},
    ),
    "keys of other samples": (
        ValueError, r"key has shape \(3, 2\), expected \(2,\) or \(2, 2\)",
        (T, T), {"key": torch.zeros(3, 2, dtype=torch.int64)},
    ),
    "key elsewhere": (ValueError, r"key is on meta, expected cpu", (T, T), {"key": KEY.to("meta")}),
    "generator": (TypeError, r"generator is int, expected", (T, T), {"generator": 3}),
    "generators of other samples": (
        ValueError, r"generator has 3 entries",
        (T, T), {"generator": [torch.Generator()] * 3},
    ),
    "generator of torch": (
        TypeError, r"generator is int, expected",
        (T, T), {"generator": 3, "rng": "torch"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args, options = BAD[name]
    with pytest.raises(error, match=f"(gaussian_sample|draw_key): .*{message}"):
        gaussian_sample(*args, **options)
