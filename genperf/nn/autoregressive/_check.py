"""Argument checks that the models share."""

from __future__ import annotations

from torch import Tensor


def positive(**arguments: int) -> None:
    """Raises ValueError, naming the argument, where one is not a positive integer."""
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r}; expected a positive integer")


def odd(**arguments: int) -> None:
    """Raises ValueError, naming the argument, where one is not an odd positive integer."""
    positive(**arguments)
    for name, value in arguments.items():
        if value % 2 == 0:
            raise ValueError(f"{name}: {value}; expected an odd number")


def dropout_rate(dropout: float) -> None:
    """Raises ValueError where ``dropout`` is no probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: {dropout!r}; expected 0 <= dropout < 1")


def indices(name: str, x: Tensor, form: str) -> None:
    """Raises unless ``x`` holds integers in the dims of ``form``, for example "[B, H, W]"."""
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{name}: {x.dtype}; expected integers {form}")
    if x.ndim != form.count(",") + 1:
        raise ValueError(f"{name}: shape {tuple(x.shape)}; expected {form}")


def image(x: Tensor, channels: int) -> None:
    """Raises unless ``x`` is a float image batch of ``channels`` channels."""
    if not x.is_floating_point():
        raise TypeError(f"x: {x.dtype}; expected a float image [B, {channels}, H, W]")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected [B, {channels}, H, W]")


def labels(label: Tensor | None, classes: int, batch: int) -> None:
    """Raises unless ``label`` is [B] integers where the model has label classes, None where it has none."""
    if (label is None) != (classes == 0):
        wanted = f"one of {classes} classes for each sample" if classes else "None: the model has no classes"
        raise ValueError(f"label: {'None' if label is None else 'given'}; expected {wanted}")
    if label is not None:
        indices("label", label, "[B]")
        if label.shape[0] != batch:
            raise ValueError(f"label: shape {tuple(label.shape)}; expected [{batch}], the batch of x")
