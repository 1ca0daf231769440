"""From an unmodified model to a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genperf.sampling import _arguments as arguments
from genperf.sampling import _probe
from genperf.sampling._conditioning import row_keys
from genperf.sampling._errors import CaptureError
from genperf.sampling._executors import choose
from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._interface import Interface, find_feedback, find_head, first_line
from genperf.sampling._ir import EmbedNode, Graph, Ref
from genperf.sampling._model import check_mode, device_of, fingerprint, first_tensor, preserved, unwrapped
from genperf.sampling._plan import plan
from genperf.sampling._planned import Planned
from genperf.sampling._recorded import Recorded, expanded
from genperf.sampling._sampler import Sampler
from genperf.sampling.heads import Description


def compile(
    model: nn.Module,
    shape: Sequence[int],
    head: Description | None = None,
    *,
    feedback: Feedback | None = None,
    cond: Mapping[str, Tensor] | None = None,
    fixed: Mapping[str, Any] | None = None,
    executor: str = "auto",
    device: torch.device | str | None = None,
    probe: bool = True,
) -> Sampler:
    """Record a model that is causal in raster order, prove that it is, and plan its sampling pixel by pixel.

    The model is run as it is, a few times on two random images; nothing of it is left changed. It must be in
    eval mode where that makes a difference: dropout and BatchNorm in training mode are refused by name.

    Args:
        model: takes an image first, and gives the parameters of the pixels' distributions: [B, channels,
            H, W], or with the channels in two dimensions, or last; of a tuple or dict the first tensor.
        shape: of one sample: (H, W), (C, H, W), or (T,) for a sequence. A model of class indices takes
            int64 [B, *shape], one of floats [B, *shape] too: (1, H, W) where it has a channel dimension.
        head: what the output means, see :mod:`genperf.sampling.heads`. None: ``Categorical(K)`` of a model
            that takes class indices and gives K channels.
        feedback: how a drawn value becomes input: "index" (int64), "one_hot" (floats [B, classes, H, W]) or
            :class:`Scaled` (value * scale + offset). None: as they are, except that a categorical head needs
            a model of class indices, since the scale of floats cannot be seen in a model.
        cond: further arguments of forward by name, tensors of one row an image, or of one row for all:
            class labels, a conditioning map. :meth:`Sampler.sample` takes others.
        fixed: further arguments by name that are passed as they are.
        executor: "cpu" (native kernels), "cuda" (one persistent kernel), "reference" (torch), or "auto":
            the first two where they can run, or what ``GENPERF_BACKEND`` says.
        device: where samples are drawn; by default where the model is.
        probe: also check by numbers, on random images, that no future pixel is looked at, and that the
            program computes what the model does.

    Raises:
        TypeError, ValueError: for an argument that does not fit, or has to be given; the message names it.
        CaptureError: if something in the model has no incremental form; the message names the module, the
            operation, and what to do.
        CausalityError: if an output depends on a pixel that is drawn later; the message names the module and
            its tap.
        RuntimeError: if the executor cannot run on the device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile: model is {type(model).__name__}, expected a torch.nn.Module")
    if head is not None and not isinstance(head, Description):
        raise TypeError(f"compile: head is {head!r}, expected one of genperf.sampling.heads")
    sizes = arguments.check_shape(shape)
    own = arguments.check_cond("compile", cond)
    recorded = Recorded(unwrapped(model), dict(fixed or {}))
    check_mode(recorded.model)
    place = device_of(recorded.model) if device is None else torch.device(device)
    choose(executor, place)
    keys = row_keys(own, range(min(2, arguments.rows_of(own))))
    first = {n: t[: len(set(keys))] for n, t in own.items()}
    interface, parameters = _interface(recorded, sizes, head, feedback, first)
    interface, graph = _graph(recorded, interface, feedback, first)
    made = plan(graph, interface.head, interface.feedback)
    recorded.seen = fingerprint(recorded.model)
    planned = Planned(interface, made, recorded)
    planned.add(list(dict.fromkeys(keys)))
    sampler = Sampler(planned, own, executor, device)
    if probe:
        _check(sampler, recorded, first, parameters)
    return sampler


def _interface(
    recorded: Recorded,
    shape: tuple[int, ...],
    head: Description | None,
    feedback: Feedback | None,
    cond: dict[str, Tensor],
) -> tuple[Interface, int]:
    """How the model is used, and how many parameters a pixel it gives."""
    device = device_of(recorded.model)
    one = {n: t[:1] for n, t in cond.items()}
    keywords = {**recorded.fixed, **expanded(one, 1, device)}
    outputs = []

    def call() -> None:
        with preserved(recorded.model):
            zeros = torch.zeros(1, *shape, dtype=torch.int64, device=device)
            outputs.append(recorded.model(zeros, **keywords))

    found = find_feedback(call, shape, head, feedback)
    if head is None:
        if found != "index":
            raise ValueError(
                "compile: head is None, expected one of genperf.sampling.heads for a model of floats: "
                "Categorical(256), Categorical(256, channels=3), LogisticMixture(10), Bernoulli(), Gaussian()"
            )
        if not outputs:
            call()
        head = find_head(first_tensor(outputs[0]), shape)
    interface = Interface(shape, head, found)
    interface.check()
    # torch would take a single image without channels for channels without a batch.
    images = 2 if len(shape) < 3 and found != "index" else 1
    if not outputs:
        values = interface.random_values(images, seed=0)
        try:
            with preserved(recorded.model):
                outputs.append(recorded.call(interface, values, one))
        except Exception as error:
            taken = interface.to_model(interface.encoded(values, torch.float32))
            raise ValueError(
                f"compile: the model cannot be called with {taken.dtype} {list(taken.shape)} for shape "
                f"{shape} and feedback {found!r} ({first_line(error)}). shape is (1, H, W) where a model of "
                "grey images has a channel dimension; further arguments are given by cond and fixed"
            ) from error
    (output,) = outputs
    (params, *_) = interface.parameters(output, images).values()
    if head.parameters not in (None, params.shape[1]):
        raise ValueError(
            f"compile: the model's output has shape {tuple(first_tensor(output).shape)}, with "
            f"{params.shape[1]} parameters a pixel, but head {head} reads {head.parameters}"
        )
    return interface, params.shape[1]


def _graph(
    recorded: Recorded, interface: Interface, feedback: Feedback | None, cond: dict[str, Tensor]
) -> tuple[Interface, Graph]:
    """The graph; of a model that takes class indices but computes with them, as one of floats."""
    try:
        graph = recorded.graph(interface, cond)
    except CaptureError:
        if feedback is not None or interface.feedback != "index":
            raise
        graph = None
    if graph is not None and (interface.feedback != "index" or _looks_up(graph)):
        return interface, graph
    as_floats = replace(interface, feedback=Scaled())
    if feedback is not None:
        raise CaptureError("feedback is 'index', but the model computes with the indices; give Scaled(1, 0)")
    try:
        return as_floats, recorded.graph(as_floats, cond)
    except Exception:
        return interface, recorded.graph(interface, cond)


def _looks_up(graph: Graph) -> bool:
    """Whether the input is used in no other way than to look up rows of tables."""
    return all(
        isinstance(n, EmbedNode) or not any(isinstance(s, Ref) and s.node is graph.input for s in n.sources)
        for n in graph.nodes
    )


def _check(sampler: Sampler, recorded: Recorded, cond: dict[str, Tensor], parameters: int) -> None:
    interface = sampler._interface
    one = {n: t[:1] for n, t in cond.items()}
    values, slots = _probe.probes(interface)
    with preserved(recorded.model):
        output = recorded.call(interface, values, one)
    _probe.check_future(interface, output, slots, parameters)
    executor = sampler._prepared(one, range(1))
    sampler.probe_error, sampler._channels_last = _probe.compare(
        interface, executor, values[:1], output, parameters
    )
