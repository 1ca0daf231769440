"""The numerical probe of a quantizer: its own forward and the one that replaces it, on a small codebook.

Copies of the module are made that share nothing that is written to. Networks around the codebook are left
out, as they are called by both, and so is what needs other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._swap import original_class

_CODEWORDS = 16
_PLAIN = (bool, int, float, str, type(None))
_passed: set[Any] = set()


def probe(
    module: nn.Module,
    cls: type,
    method: FunctionType,
    small: Callable[[Any], Any],
    skip_training: bool = False,
) -> str:
    """Why ``method`` does not give what ``cls.forward`` gives; "" if it does.

    ``small`` makes the copy. A module with the same settings is not probed again.
    """
    key = (method.__code__, cls, skip_training, _settings(module))
    if key in _passed:
        return ""
    modes = (False,) if skip_training else (True, False)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            theirs, ours = small(module), small(module)
            for training in modes:
                for one in (theirs, ours):
                    one.train(training)
                expected = _run(cls.forward, theirs)  # type: ignore[attr-defined]
                if not _alike(expected, _run(method, ours)):
                    return f"its forward in {'training' if training else 'evaluation'} gives something else"
    except Exception as error:
        return f"the probe failed with {type(error).__name__}: {error}"
    _passed.add(key)
    return ""


def _settings(module: nn.Module) -> Any:
    """All plain attributes of the module and of those in it, but the sizes of codebooks."""
    return tuple(
        (type(one), tuple((n, v) for n, v in vars(one).items() if type(v) in _PLAIN and n != "codebook_size"))
        for one in module.modules()
    )


def _run(forward: Callable[..., Any], module: Any) -> list[Any]:
    """What forward returns, the gradients, and the state afterwards."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(module.probe_shape, generator=generator).requires_grad_()
    torch.manual_seed(7)
    results = list(forward(module, x))
    floating = [y for y in results if y.is_floating_point() and y.requires_grad]
    leaves = [x, *module.parameters()]
    gradients: list[Any] = [None for _ in leaves]
    if floating:
        weights = [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in floating]
        gradients = list(torch.autograd.grad(floating, leaves, weights, allow_unused=True))
    return results + gradients + [b.detach().clone() for b in module.buffers()]


def _alike(theirs: list[Any], ours: list[Any]) -> bool:
    return len(theirs) == len(ours) and all(map(_same, theirs, ours))


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if a.is_floating_point() else torch.equal(a, b)


def _copied(module: Any, cls: Any, **modules: Any) -> Any:
    """A shallow copy of the original class, with parameters and buffers of its own, on the CPU."""
    made = cls.__new__(cls)
    made.__dict__.update(module.__dict__)
    made.__dict__["_modules"] = {**module._modules, **modules}
    made.__dict__["_buffers"] = {
        name: value if value is None else torch.ones_like(value, device="cpu", dtype=_dtype(value))
        for name, value in module._buffers.items()
    }
    made.__dict__["_parameters"] = {}
    return made


def _dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


def small_quantizer(vq: Any) -> Any:
    """A ``VectorQuantize`` with few codewords."""
    identity = nn.Identity()
    codebook = _small_codebook(vq._codebook, original_class(type(vq._codebook)))
    made = _copied(
        vq, original_class(type(vq)), _codebook=codebook, project_in=identity, project_out=identity
    )
    made.__dict__.update(codebook_size=_CODEWORDS, in_place_codebook_optimizer=None, has_projections=False)
    made._buffers["zero"] = torch.tensor(0.0)
    dim = codebook.embed.shape[-1] * vq.heads
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        made.__dict__["probe_shape"] = (2, dim, 2, 6) if vq.accept_image_fmap else (2, dim, 2, 2, 3)
    else:
        made.__dict__["probe_shape"] = (2, 12, dim) if vq.channel_last else (2, dim, 12)
    return made


def _small_codebook(codebook: Any, cls: type) -> Any:
    made = _copied(codebook, cls, vq_bridge=None)
    made.__dict__["vq_bridge"] = None
    made._modules.pop("vq_bridge", None)
    made.__dict__.update(
        codebook_size=_CODEWORDS, has_dead_code_replacement=False, all_reduce_fn=_nothing, use_ddp=False
    )
    books, _, dim = codebook.embed.shape
    generator = torch.Generator().manual_seed(5)
    embed = torch.randn(books, _CODEWORDS, dim, generator=generator)
    if codebook.use_cosine_sim:
        embed = nn.functional.normalize(embed, dim=-1)
    made._buffers.update(
        initted=torch.tensor(True), cluster_size=torch.full((books, _CODEWORDS), 3.0), embed_avg=3 * embed
    )
    if isinstance(codebook.embed, nn.Parameter):
        made._parameters["embed"] = nn.Parameter(embed)
    else:
        made._buffers["embed"] = embed.clone()
    if codebook.affine_param:
        made._buffers.update(batch_mean=None, batch_variance=None)
    return made


def small_residual(rvq: Any) -> Any:
    """A ``ResidualVQ`` of small quantizers."""
    layers = [small_quantizer(vq) for vq in rvq.layers]
    if rvq.shared_codebook:
        for layer in layers[1:]:
            layer._modules["_codebook"] = layers[0]._codebook
    identity = nn.Identity()
    made = _copied(
        rvq,
        original_class(type(rvq)),
        layers=nn.ModuleList(layers),
        project_in=identity,
        project_out=identity,
    )
    made.__dict__.update(probe_shape=layers[0].probe_shape, has_projections=False)
    return made


def small_grouped(grouped: Any) -> Any:
    """A ``GroupedResidualVQ`` of small ones."""
    rvqs = [small_residual(rvq) for rvq in grouped.rvqs]
    made = _copied(grouped, original_class(type(grouped)), rvqs=nn.ModuleList(rvqs))
    *leading, dim = rvqs[0].probe_shape
    made.__dict__.update(probe_shape=(*leading, dim * len(rvqs)), dim=dim * len(rvqs))
    return made


def small_sim(sim: Any) -> Any:
    """A ``SimVQ`` with few codewords, which are its parameter."""
    dim = 8
    made = _copied(sim, original_class(type(sim)), code_transform=nn.Linear(dim, dim, bias=False))
    generator = torch.Generator().manual_seed(5)
    nn.init.eye_(made.code_transform.weight)
    made._buffers["frozen_codebook"] = torch.randn(_CODEWORDS, dim, generator=generator)
    made.__dict__["probe_shape"] = (2, dim, 12) if sim.channel_first else (2, 12, dim)
    return made


def _nothing(*_: Any) -> None:
    pass
