"""Models as their authors write them become graphs, and graphs that look at the future are refused."""

import numpy as np
import pytest
import torch
from genperf_testing import graphs, idioms, models

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._graph import capture
from genperf.sampling._ir import Graph
from genperf.sampling._verify import check_causal, when_known

# In these each colour of a pixel is drawn after the one before it, which needs times by channel.
_BY_CHANNEL = ("pixelcnn_rgb", "gated_pixelcnn_rgb")


def _captured(tiny: models.TinyModel) -> Graph:
    example = models.example(tiny, 2)
    classes = getattr(tiny.model, "classes", None)
    return capture(tiny.model, example, torch.zeros_like(example), classes, (), models.conditioning(tiny, 2))


def _changed(tiny: models.TinyModel, graph: Graph) -> np.ndarray:
    """[pixels, pixels]: whether the output at the first changes when the input at the second does."""
    model = tiny.model.double()
    x = models.example(tiny, 2)
    x = x.double() if x.is_floating_point() else x
    keywords = models.conditioning(tiny, 2)
    cells = graph.input.rows * graph.input.cols

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model(x, **keywords)
        return (out[0] if isinstance(out, tuple) else out).reshape(2, -1, cells)

    before = run(x)
    seen = np.zeros((cells, cells), dtype=bool)
    for pixel in range(cells):
        flat = x.clone().reshape(2, -1, cells)
        now = flat[..., pixel]
        flat[..., pixel] = now - 0.7 if x.is_floating_point() else (now + 1) % tiny.model.classes
        seen[:, pixel] = ((run(flat.view(x.shape)) - before).abs() > 1e-12).any(1).any(0).numpy()
    return seen


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in _BY_CHANNEL])
def test_families_are_causal_and_their_times_are_exact(family: str) -> None:
    tiny = models.tiny_model(family)
    graph = _captured(tiny)
    times = when_known(graph)
    check_causal(graph, times)
    known = times.of(graph.output, graph.input.rows, graph.input.cols).ravel()
    seen = _changed(tiny, graph)
    last = np.array([np.flatnonzero(row).max(initial=-1) for row in seen])
    assert (last <= known).all()
    assert (last == known).mean() > 0.9  # in a few cells all that comes through a tap may vanish


@pytest.mark.parametrize("name", idioms.CAUSAL)
def test_idioms_are_captured(name: str) -> None:
    tiny = idioms.idiom(name)
    graph = _captured(tiny)
    times = when_known(graph)
    check_causal(graph, times)
    last = [np.flatnonzero(row).max(initial=-1) for row in _changed(tiny, graph)]
    assert (np.array(last) <= times.of(graph.output, graph.input.rows, graph.input.cols).ravel()).all()


@pytest.mark.parametrize("name", [*models.FAMILIES, *idioms.CAUSAL])
def test_graphs_compute_what_the_model_does(name: str) -> None:
    tiny = idioms.idiom(name) if name in idioms.CAUSAL else models.tiny_model(name)
    graph = _captured(tiny)
    x = models.example(tiny, 2)
    with torch.no_grad():
        out = tiny.model(x, **models.conditioning(tiny, 2))
    out = out[0] if isinstance(out, tuple) else out
    rows, cols = graph.input.rows, graph.input.cols
    cells = x.reshape(2, -1, rows, cols).permute(0, 2, 3, 1)
    got = graphs.evaluate(graph, cells).permute(0, 3, 1, 2).reshape(out.shape)
    torch.testing.assert_close(got.float(), out, rtol=2e-5, atol=2e-5)


def test_a_tap_on_the_pixel_itself_is_named() -> None:
    graph = _captured(idioms.idiom("future_tap"))
    with pytest.raises(
        CausalityError, match=r"^0 \(aten.convolution\) through its tap \(row \+0, column \+0\)"
    ):
        check_causal(graph, when_known(graph))


def test_attention_with_an_empty_row_is_refused() -> None:
    graph = _captured(idioms.idiom("empty_row_of_the_mask"))
    with pytest.raises(CausalityError, match=r"bmm.*leaves pixel \(0, 0\) no key"):
        check_causal(graph, when_known(graph))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mean_of_the_map", "aten.mean.*reduction"),
        ("path_by_value", "depends on the values of its input"),
    ],
)
def test_what_cannot_run_by_pixel_is_named(name: str, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        _captured(idioms.idiom(name))
