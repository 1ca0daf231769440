"""The models of ``genperf_testing.idioms`` are what they say: causal or not, and as awkward as stated."""

import pytest
import torch
from genperf_testing.causality import DEAD, LIVE, past, response
from genperf_testing.idioms import CAUSAL, NOT_CAUSAL, NOT_RECORDABLE, idiom
from genperf_testing.models import example


@pytest.mark.parametrize("name", [*CAUSAL, *NOT_RECORDABLE])
def test_causal(name):
    tiny = idiom(name)
    seen, may_see = response(tiny), past(tiny)
    assert seen.shape == may_see.shape
    assert seen[~may_see].max() < DEAD
    assert seen[may_see].max() > LIVE
    assert (seen.diagonal(-1)[1::2] > LIVE).any()


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name):
    tiny = idiom(name)
    assert response(tiny)[~past(tiny)].max() > LIVE


@torch.no_grad()
def test_the_addition_reaches_the_overlapping_view():
    tiny = idiom("overlapping_views")
    x = example(tiny)
    before = tiny.model(x)
    tiny.model.v_fc.bias += 1
    change = (tiny.model(x) - before).abs().amax(dim=(0, 1, 3))
    assert change[0] == 0
    assert (change[1:] > LIVE).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "masked"), [("masked_in_place", "0.weight"), ("zeroed_taps", "conv.weight_v")]
)
def test_masked_weights_are_overwritten(name, masked):
    tiny = idiom(name)
    weight = tiny.model.get_parameter(masked)
    before = weight.clone()
    assert (before != 0).all()
    tiny.model(example(tiny))
    changed = weight != before
    assert changed.any()
    assert (weight[changed] == 0).all()


@torch.no_grad()
def test_the_path_depends_on_the_values():
    tiny = idiom("path_by_value")
    low, high = torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 5, 6)
    high[..., -1, -1] = 3.0
    assert not torch.equal(tiny.model(low)[..., :-1, :], tiny.model(high)[..., :-1, :])
