"""In-place writes into parts of tensors, as models write them: every other view of the tensor sees them."""

import pytest
import torch
from genperf_testing import layers
from torch import Tensor
from torch.nn import functional as F

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._verify import check_causal, when_known


def _halves(y: Tensor) -> Tensor:
    v, h = y.chunk(2, 1)
    v += torch.tanh(h)
    h.mul_(v)
    return y


def _first_row_and_column(y: Tensor) -> Tensor:
    y[:, :, 0] = 0
    y[..., 0] = 1.5
    return y


def _shift_by_addition(y: Tensor) -> Tensor:
    before = y.clone()
    y[..., 1:] += before[..., :-1]
    y[:, :, 2:] -= before[:, :, :-2]
    return y


def _zeroed_slices(y: Tensor) -> Tensor:
    y[:, 2:5, 1:3].zero_()
    y[:, :, -1, 2:].fill_(0.25)
    y[:, :0] += 1
    return y


def _filled_buffer(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :, 1:] = y[:, :, :-1]
    out[:, :3, :, 2:] += y[:, 3:6, :, :-2]
    return out


def _empty_buffer(y: Tensor) -> Tensor:
    out = y.new_empty(y.shape[0], 10, *y.shape[2:])
    out[:, :8] = y
    out[:, 8:] = y[:, :1]
    return out[:, 2:]


def _strided_channels(y: Tensor) -> Tensor:
    y[:, ::2] *= 2
    y[:, 1::3] = torch.sin(torch.arange(3.0)).view(3, 1, 1)
    return y


def _one_channel(y: Tensor) -> Tensor:
    y[:, 0] = y[:, 1].clone()
    y[:, -1].neg_()
    return y


def _channels_last(y: Tensor) -> Tensor:
    y.permute(0, 2, 3, 1)[..., 2:4].mul_(0.5)
    y.transpose(2, 3)[:, :, 0] = 3
    return y


def _groups(y: Tensor) -> Tensor:
    y.view(y.shape[0], 2, 4, *y.shape[2:])[:, 1, 1:3] += 1
    a, b, c = y.split([1, 2, 5], 1)
    b.relu_()
    c += a
    first, *_ = y.unbind(1)
    first.sigmoid_()
    return y


def _cells_of_a_sequence(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    flat[:, :, 0] = 0
    flat[:, 1:4, 3:17] = -2.0
    flat[:, 5, 29:] = 1.0
    return y


def _twice(y: Tensor) -> Tensor:
    part = y[:, :, 1:]
    part += 1
    part *= 2
    return y


def _overlapping(y: Tensor) -> Tensor:
    above, here = y[:, :, :-1], y[:, :, 1:]
    here += 1
    here *= 2
    padded = F.pad(above, (0, 0, 1, 0))
    above.tanh_()
    return padded + y


def _through_data(y: Tensor) -> Tensor:
    y.data[:, :4] *= 3
    y.detach()[:, 4:, :, 0] = 0
    return y


def _other_shape(y: Tensor) -> Tensor:
    part = y[:, 3]
    part.unsqueeze_(1)
    part += y[:, :1].clone()
    z = y.clone()
    z.squeeze_().transpose_(1, 2)
    z[:, :1] -= 1
    return y + z.transpose(1, 2)


def _infinite_before(y: Tensor) -> Tensor:
    y[:, :, 0] = 0
    y[:, :2] = 0
    z = torch.tanh(y) / y  # not a number where y is 0
    z[:, :, 0] = 0.5
    z[:, :2] = y[:, 2:4]
    return z


def _constants_change(y: Tensor) -> Tensor:
    scale = torch.ones(1, 8, 1, 1)
    y = y * scale
    scale[:, :4] = 3
    y = y * scale
    scale.zero_()
    return y


def _overwritten(y: Tensor) -> Tensor:
    out = torch.tanh(y)
    y.zero_()
    y += 1
    return out * y


_CAUSAL: dict[str, layers.Body] = {
    "halves": _halves,
    "first row and column": _first_row_and_column,
    "shift by addition": _shift_by_addition,
    "zeroed slices": _zeroed_slices,
    "filled buffer": _filled_buffer,
    "empty buffer": _empty_buffer,
    "strided channels": _strided_channels,
    "one channel": _one_channel,
    "channels last": _channels_last,
    "groups": _groups,
    "cells of a sequence": _cells_of_a_sequence,
    "twice": _twice,
    "overlapping": _overlapping,
    "through data": _through_data,
    "other shape": _other_shape,
    "infinite before": _infinite_before,
    "constants change": _constants_change,
    "overwritten": _overwritten,
}


@pytest.mark.parametrize("name", _CAUSAL)
def test_writes_reach_every_view(name: str) -> None:
    model = layers.Around(_CAUSAL[name])
    graph = layers.captured(model)
    check_causal(graph, when_known(graph))
    layers.assert_same(graph, model)


def _from_the_row_below(y: Tensor) -> Tensor:
    y[:, :, :-1] += y[:, :, 1:].clone()
    return y


def _from_the_next_pixel(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[..., :-1] = y[..., 1:]
    return out


def _around_the_image(y: Tensor) -> Tensor:
    return F.conv2d(F.pad(y, (1, 1, 1, 1), mode="circular"), torch.ones(1, 8, 3, 3).to(y))


@pytest.mark.parametrize("body", [_from_the_row_below, _from_the_next_pixel, _around_the_image])
def test_writes_that_bring_the_future_are_refused(body: layers.Body) -> None:
    graph = layers.captured(layers.Around(body))
    with pytest.raises(CausalityError, match="looks at the future"):
        check_causal(graph, when_known(graph))


def _where_positive(y: Tensor) -> Tensor:
    y[y > 0] = 0
    return y


def _by_index(y: Tensor) -> Tensor:
    y[:, torch.tensor([0, 3])] = 0
    return y


def _every_second_row(y: Tensor) -> Tensor:
    y[:, :, ::2] = 0
    return y


def _diagonal(y: Tensor) -> Tensor:
    y.diagonal(0, 2, 3).zero_()
    return y


def _expanded(y: Tensor) -> Tensor:
    z = y[:, :1].clone()
    z.expand(-1, 3, -1, -1)[:, :1] += 1
    return z


def _memory_order(y: Tensor) -> Tensor:
    return y.as_strided((2, 8, 5, 5), (240, 30, 6, 1)) + 1


def _of_several_merged(y: Tensor) -> Tensor:
    y.flatten(1)[:, 3:7] = 0
    return y


def _live_cells_of_a_sequence(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    flat[:, :, 1:] += flat[:, :, :-1].clone()
    return y


def _outside_of_torch(y: Tensor) -> Tensor:
    return y + torch.from_numpy(y.numpy() ** 2)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (_where_positive, "aten.gt"),
        (_by_index, "aten.index_put"),
        (_every_second_row, "every second row or column"),
        (_diagonal, "writes in place into a view by diagonal"),
        (_expanded, "writes in place into a view by expand"),
        (_memory_order, "aten.as_strided"),
        (_of_several_merged, "means something else than what is written"),
        (_live_cells_of_a_sequence, "works on 29 of the image's 30 cells"),
        (_outside_of_torch, "depends on the values of its input"),
    ],
)
def test_writes_without_an_incremental_form_are_named(body: layers.Body, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        layers.captured(layers.Around(body))


def test_memory_that_is_not_initialised_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model with a buffer would look as if it depended on its input."""
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        layers.captured(layers.Around(_empty_buffer))
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_part_that_is_written_again_keeps_one_copy() -> None:
    """The public gated models add to the same slice once for each term."""

    def body(y: Tensor) -> Tensor:
        part = y[:, :, 1:]
        for _ in range(5):
            part += 1
        return y

    def once(y: Tensor) -> Tensor:
        y[:, :, 1:] += 5
        return y

    many, one = (layers.captured(layers.Around(b)) for b in (body, once))
    assert len(many.nodes) == len(one.nodes) + 4
