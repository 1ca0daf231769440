"""What :mod:`genperf.accelerate._distributions` covers of torch.distributions, and how.

A function here gives what the original gives, or raises :class:`Left` with the reason why the original has
to run. It is asked about objects of exactly the named class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions.kl as kl_module
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Normal, RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.distributions.utils import clamp_probs, probs_to_logits

from genperf._torch_normal import FEWEST, torch_normal
from genperf.accelerate._distribution_target import (
    Attribute,
    Divergence,
    Left,
    Target,
    check_size,
    check_tensors,
)
from genperf.ops.categorical_sample import categorical_sample
from genperf.ops.gaussian_sample import gaussian_sample
from genperf.ops.gumbel_softmax import gumbel_softmax
from genperf.ops.philox_random import draw_key, philox_random

_ONE = torch.Size()
#: Below this many elements the operations of torch are as fast: measured, for one thread.
_FEWEST_KL, _FEWEST_CATEGORICAL = 1 << 18, 1 << 11
#: With torch's noise that is most of the time.
_FEWEST_RELAXED = {"torch": 1 << 18, "philox": 1 << 16}
_FEWEST_GUMBEL = {"torch": 1 << 20, "philox": 1 << 13}


def _normal_rsample(rng: str, dist: Normal, sample_shape: Any = _ONE) -> Tensor:
    loc, scale = dist.loc, dist.scale
    shape = dist._extended_shape(sample_shape)
    check_size(shape, loc, FEWEST)
    check_tensors(loc, scale)
    if rng == "torch":
        return loc + _noise(shape, loc) * scale
    if loc.device.type == "cpu" and torch.is_grad_enabled():
        # To keep the noise is faster here than to make it again: its product is all that backward needs.
        return loc + philox_random(shape, draw_key(loc.device), dtype=loc.dtype) * scale
    return _philox_normal(loc, scale, shape)


def _normal_sample(rng: str, dist: Normal, sample_shape: Any = _ONE) -> Tensor:
    loc, scale = dist.loc, dist.scale
    shape = dist._extended_shape(sample_shape)
    check_size(shape, loc, FEWEST)
    check_tensors(loc, scale)
    with torch.no_grad():
        if not dist._validate_args and not scale.min() >= 0:
            raise Left("a standard deviation below 0")
        if rng == "torch":
            return _noise(shape, loc).mul_(scale).add_(loc)
        return _philox_normal(loc, scale, shape)


def _noise(shape: torch.Size, loc: Tensor) -> Tensor:
    return torch_normal(shape, generator=None, dtype=loc.dtype, device=loc.device)


def _philox_normal(loc: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    z = gaussian_sample(loc.expand(shape), scale.expand(shape), parametrization="std", kl=False).z
    assert z is not None
    return z


def _normal_kl(rng: str, p: Normal, q: Normal) -> Tensor:
    tensors = (p.loc, p.scale, q.loc, q.scale)
    shape = torch.broadcast_shapes(p.loc.shape, q.loc.shape)
    check_size(shape, p.loc, _FEWEST_KL)
    check_tensors(*tensors)
    mean, scale, prior_mean, prior_scale = (t.expand(shape) for t in tensors)
    divergence = gaussian_sample(
        mean, scale, parametrization="std", prior=(prior_mean, prior_scale), sample=False, reduction="none"
    ).kl
    assert divergence is not None
    return divergence.to(p.loc.dtype)


def _categorical_sample(rng: str, dist: Categorical, sample_shape: Any = _ONE) -> Tensor:
    if rng == "torch":
        raise Left("the draws of torch.multinomial")
    by_logits = "logits" in vars(dist)
    given = vars(dist)["logits" if by_logits else "probs"]
    check_size(given.shape, given, _FEWEST_CATEGORICAL)
    check_tensors(given)
    size = torch.Size(sample_shape)
    if size.numel() != 1 or given.numel() == 0:
        raise Left("other than one draw a row")
    logits = given.detach() if by_logits else given.detach().log()
    check = logits.device.type == "cpu" and not dist._validate_args
    try:
        index = categorical_sample(logits, rng="philox", check=check)
    except ValueError as error:
        raise Left("a row with nothing to choose from") from error
    assert isinstance(index, Tensor)
    return index.reshape(dist._extended_shape(size))


def _categorical_log_prob(rng: str, dist: Categorical, value: Tensor) -> Tensor:
    if "logits" in vars(dist):
        raise Left("the constructor has normalized the logits already")
    probs = vars(dist)["probs"]
    check_size(probs.shape, probs, _FEWEST_CATEGORICAL)
    check_tensors(probs)
    if dist._validate_args:
        dist._validate_sample(value)
    index, probs = torch.broadcast_tensors(value.long().unsqueeze(-1), probs)
    return probs_to_logits(probs.gather(-1, index[..., :1]).squeeze(-1))


def _relaxed_rsample(rng: str, dist: RelaxedOneHotCategorical, sample_shape: Any = _ONE) -> Tensor:
    if type(dist.base_dist) is not ExpRelaxedCategorical or len(dist.transforms) != 1:
        raise Left("other transforms")
    logits, tau = dist.logits, _temperature(dist.temperature)
    shape = dist._extended_shape(sample_shape)
    check_size(shape, logits, _FEWEST_RELAXED[rng])
    check_tensors(logits)
    if rng == "philox":
        return gumbel_softmax(logits.expand(shape), tau, rng="philox")
    uniforms = clamp_probs(torch.rand(shape, dtype=logits.dtype, device=logits.device))
    noise = uniforms.log_().neg_().log_().neg_()
    return gumbel_softmax(logits.expand(shape), tau, noise=noise)


def _relaxed_sample(rng: str, dist: RelaxedOneHotCategorical, sample_shape: Any = _ONE) -> Tensor:
    with torch.no_grad():
        return _relaxed_rsample(rng, dist, sample_shape)


def softmax_by_kernel(
    rng: str, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    if isinstance(logits, Tensor):
        check_size(logits.shape, logits, _FEWEST_GUMBEL[rng])
    check_tensors(logits)
    odd = eps != 1e-10 or type(hard) is not bool or type(dim) is not int
    if odd or not -logits.dim() <= dim < logits.dim():
        raise Left("unusual arguments")
    return gumbel_softmax(logits, _temperature(tau), hard, dim, rng=rng)


def _temperature(tau: Any) -> float:
    """As a number. A tensor on a GPU is not read, which would wait for it."""
    if isinstance(tau, Tensor):
        if tau.numel() != 1 or tau.device.type != "cpu" or (tau.requires_grad and torch.is_grad_enabled()):
            raise Left("the temperature is a tensor")
        tau = tau.item()
    if type(tau) not in (int, float) or not 1e-6 <= tau < float("inf"):
        raise Left("a temperature that is no positive number")
    return float(tau)


def _method(cls: type, name: str, run: Any, torch_kernel: str, philox_kernel: str) -> Target:
    return Target(
        f"{cls.__name__}.{name}",
        (Attribute(cls, name),),
        lambda: getattr(cls, name),
        lambda dist, *_, **__: type(dist) is cls,
        run,
        {"torch": torch_kernel, "philox": philox_kernel},
    )


TARGETS = (
    _method(Normal, "rsample", _normal_rsample, "torch's noise, faster", "gaussian_sample"),
    _method(Normal, "sample", _normal_sample, "torch's noise, faster", "gaussian_sample"),
    Target(
        "kl_divergence(Normal, Normal)",
        (Divergence((Normal, Normal)), Attribute(kl_module, "_kl_normal_normal")),
        lambda: kl_module._KL_REGISTRY[Normal, Normal],
        lambda p, q: type(p) is Normal and type(q) is Normal,
        _normal_kl,
        {"torch": "gaussian_sample", "philox": "gaussian_sample"},
    ),
    _method(Categorical, "sample", _categorical_sample, "-", "categorical_sample"),
    _method(Categorical, "log_prob", _categorical_log_prob, "the chosen alone", "the chosen alone"),
    _method(RelaxedOneHotCategorical, "rsample", _relaxed_rsample, "gumbel_softmax", "gumbel_softmax"),
    _method(RelaxedOneHotCategorical, "sample", _relaxed_sample, "gumbel_softmax", "gumbel_softmax"),
    Target(
        "gumbel_softmax",
        (Attribute(F, "gumbel_softmax"),),
        lambda: F.gumbel_softmax,
        lambda *args, **kwargs: True,
        softmax_by_kernel,
        {"torch": "gumbel_softmax", "philox": "gumbel_softmax"},
    ),
)
