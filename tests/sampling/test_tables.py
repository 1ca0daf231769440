"""Convolutions over embeddings and one-hot codes become sums of table rows, where that is the same."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from genperf_testing import graphs, plans
from genperf_testing.models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.nn import autoregressive as ar
from genperf.sampling import _simplify, heads
from genperf.sampling._errors import CaptureError
from genperf.sampling._graph import capture
from genperf.sampling._ir import ConvNode, EmbedNode, Graph
from genperf.sampling._native import CPUExecutor
from genperf.sampling._plan import plan
from genperf.sampling._program import Conv, Embed, FeedbackKind
from genperf.sampling._reference import ReferenceExecutor
from genperf.sampling._simplify import simplify
from genperf.sampling._verify import when_known

SHAPE = (5, 6)  # rows, columns
CLASSES = 11


class Model(nn.Module):
    """``before`` turns an embedding [B, 10, 5, 6] into what a convolution to logits reads."""

    def __init__(self, first: nn.Module, before: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 10)
        self.before = before
        self.first = first
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.before(self.embedding(x).permute(0, 3, 1, 2)))


def _masked(channels: int = CLASSES, **options: object) -> nn.Module:
    return ar.MaskedConv2d(10, channels, 5, mask_type="A", **options)


def _captured(model: nn.Module, classes: int = CLASSES, shape: tuple[int, ...] = SHAPE) -> Graph:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(classes, (2, *shape), generator=rng)
    return capture(model, x, (x + 1) % classes, classes)


def _is_the_same(graph: Graph, simple: Graph) -> None:
    x = torch.randint(CLASSES, (3, *SHAPE, 1), generator=torch.Generator().manual_seed(1))
    expected = graphs.evaluate(graph, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(graphs.evaluate(simple, x), expected, rtol=1e-5, atol=1e-5)


class _OneHot(nn.Module):
    def __init__(self, classes: int, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.classes, self.layer, self.how = classes, layer, how
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "one_hot":
            code = F.one_hot(x, self.classes).permute(0, 3, 1, 2).float()
        else:
            code = torch.zeros(len(x), self.classes, *x.shape[1:]).scatter_(1, x[:, None], 1.0)
        return self.layer(code)


_TABLES: dict[str, Callable[[], nn.Module]] = {
    "masked": lambda: Model(_masked()),
    "shifted by padding": lambda: Model(
        nn.Conv2d(10, CLASSES, (2, 3), padding=(0, 1)), lambda y: F.pad(y, (0, 0, 2, -1))
    ),
    "cropped before its padding": lambda: Model(
        nn.Conv2d(10, CLASSES, 1), lambda y: F.pad(y[:, :, :-1], (0, 0, 1, 0))
    ),
    "a part of the channels": lambda: Model(
        nn.Conv2d(8, CLASSES, (2, 1)), lambda y: F.pad(y[:, 1:9], (0, 0, 2, -1))
    ),
    "two convolutions": lambda: Model(
        nn.Sequential(nn.Conv2d(10, 9, 1, bias=False), ar.MaskedConv2d(9, CLASSES, 3, mask_type="A"))
    ),
    "one-hot": lambda: _OneHot(CLASSES, ar.MaskedConv2d(CLASSES, 7, 5, mask_type="A"), "one_hot"),
    "one-hot of 3 classes": lambda: _OneHot(3, ar.MaskedConv2d(3, 3, 3, mask_type="A"), "one_hot"),
    "scattered": lambda: _OneHot(CLASSES, ar.MaskedConv2d(CLASSES, 7, 5, mask_type="A"), "scatter"),
}
_CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "a window that hides a row": lambda: Model(
        nn.Conv2d(10, CLASSES, (2, 1)), lambda y: F.pad(y[:, :, 1:], (0, 0, 3, -1))
    ),
    "a stride": lambda: Model(
        nn.Sequential(
            nn.ZeroPad2d((0, 0, 3, 0)),
            nn.Conv2d(10, 4, 2, stride=2),
            nn.ConvTranspose2d(4, CLASSES, 2, 2),
            nn.ZeroPad2d((0, 0, 0, -3)),
        )
    ),
    "few channels": lambda: Model(nn.Conv2d(7, CLASSES, (2, 1)), lambda y: F.pad(y[:, :7], (0, 0, 2, -1))),
    "a function between": lambda: Model(_masked(), F.elu),
}


@pytest.mark.parametrize("name", _TABLES)
def test_they_become_tables(name: str) -> None:
    graph = _captured(_TABLES[name](), 3 if "3" in name else CLASSES)
    simple = simplify(graph)
    assert not any(isinstance(n, ConvNode) for n in simple.nodes)
    assert sum(isinstance(n, EmbedNode) for n in simple.nodes) == 1
    if "3" not in name:
        _is_the_same(graph, simple)
    assert np.array_equal(*(when_known(g).of(g.output, *SHAPE) for g in (graph, simple)))


@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_others_stay(name: str) -> None:
    graph = _captured(_CONVOLUTIONS[name]())
    simple = simplify(graph)
    assert any(isinstance(n, ConvNode) for n in simple.nodes)
    _is_the_same(graph, simple)


def test_large_tables_stay_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they take no more than the weights of the convolution."""
    graph = _captured(Model(_masked()))
    size = 4 * 12 * CLASSES * CLASSES
    monkeypatch.setattr(_simplify, "_TABLES", size)
    assert not any(isinstance(n, ConvNode) for n in simplify(graph).nodes)
    monkeypatch.setattr(_simplify, "_TABLES", size - 1)
    assert any(isinstance(n, ConvNode) for n in simplify(graph).nodes)
    one_hot = _captured(_TABLES["one-hot"]())
    assert not any(isinstance(n, ConvNode) for n in simplify(one_hot).nodes)


def test_a_sum_starts_a_row_of_tables() -> None:
    """A bias, another branch and an embedding that is added to: all in one instruction."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Model(_masked()), Model(_masked(bias=False))
            self.position = nn.Parameter(torch.zeros(1, CLASSES, *SHAPE))
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.position + self.b(x)

    graph = _captured(Two())
    program = plan(graph, heads.Categorical(CLASSES), "index").program
    assert [type(i) for i in program.instructions] == [Embed, Embed]
    assert [i.init >= 0 for i in program.instructions] == [True, True]
    _is_the_same(graph, simplify(graph))


def test_what_a_masked_table_is_known_by() -> None:
    """Channels that read nothing of a tap are known before it: rows of zeros count for nothing."""
    model = Model(nn.Conv2d(10, CLASSES, (2, 1)), lambda y: F.pad(y, (0, 0, 1, 0)))
    with torch.no_grad():
        model.first.weight[:4, :, 1] = 0.0
    graph = _captured(model)
    simple = simplify(graph)
    assert any(isinstance(n, EmbedNode) and len(n.taps) == 2 for n in simple.nodes)
    for g in (graph, simple):
        known = when_known(g).parts(g.output, *SHAPE, CLASSES)
        cells = known.cells[known.label][:, 2, 3]
        assert cells.tolist() == [6 * 1 + 3] * 4 + [6 * 2 + 3] * (CLASSES - 4)


def test_65536_classes_take_no_identity() -> None:
    """A one-hot model of so many classes is planned and run; the identity alone would take 17 GB."""
    classes = 1 << 16
    layer = nn.Sequential(ar.MaskedConv2d(classes, 8, 3, mask_type="A"), nn.ReLU(), nn.Conv2d(8, classes, 1))
    model = _OneHot(classes, layer, "one_hot")
    graph = _captured(model, classes, (2, 3))
    program = plan(graph, heads.Categorical(classes), "index").program
    assert sum(isinstance(i, Embed) for i in program.instructions) == 1
    assert sum(t.numel() for t in [*program.tensors, *program.weights]) < (4 * 8 + 8 + 8 + 1) * classes + 100
    executor = CPUExecutor(program)
    state = executor.start(1)
    executor.run(state, 0, program.slots, torch.full((1, 2, 3, program.head.noises), 0.5))
    with torch.no_grad():
        logits = model(state.values[..., 0].long())
    torch.testing.assert_close(executor.params(state, 5)[0], logits[0, :, 1, 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("otherwise", [False, True])
def test_a_one_hot_input_is_drawn_classes(otherwise: bool) -> None:
    """Floats that are one-hot codes are not written down, unless more than convolutions read them."""
    layer = ar.MaskedConv2d(CLASSES, CLASSES, 5, mask_type="A")
    model = randomise(nn.Sequential(nn.Sigmoid(), layer) if otherwise else nn.Sequential(layer, nn.ELU()))
    drawn = torch.randint(CLASSES, (2, *SHAPE), generator=torch.Generator().manual_seed(2))
    codes = F.one_hot(drawn, CLASSES)
    x = codes.permute(0, 3, 1, 2).float()
    graph = capture(model, x, x.flip(0))
    program = plan(graph, heads.Categorical(CLASSES), "one_hot").program
    assert program.head.feedback == (FeedbackKind.ONE_HOT if otherwise else FeedbackKind.NONE)
    assert any(isinstance(i, Embed) for i in program.instructions) != otherwise
    executor = ReferenceExecutor(program, dtype=torch.float64)
    params = plans.teacher_forced(executor, program, drawn[..., None].float())
    expected = graphs.evaluate(graph, codes)
    torch.testing.assert_close(torch.stack(params, 1), expected.flatten(1, 2), rtol=1e-6, atol=1e-6)


class _Scaled(nn.Module):
    """A one-hot code that is scaled, which takes the code itself."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.first = ar.MaskedConv2d(classes, classes, 3, mask_type="A")
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.sigmoid(F.one_hot(x, self.classes).permute(0, 3, 1, 2).float()))


def test_one_hot_codes_that_are_read_otherwise() -> None:
    graph = _captured(_Scaled(CLASSES))
    program = plan(graph, heads.Categorical(CLASSES), "index").program
    (embed,) = (i for i in program.instructions if isinstance(i, Embed))
    assert torch.equal(program.tensors[embed.table], torch.eye(CLASSES)[None])
    assert any(isinstance(i, Conv) for i in program.instructions)
    _is_the_same(graph, simplify(graph))


def test_large_one_hot_codes_that_are_read_otherwise_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genperf.sampling._plan._IDENTITY", 4 * CLASSES**2 - 1)
    with pytest.raises(CaptureError, match="one-hot codes of 11 classes are read by more than convolutions"):
        plan(_captured(_Scaled(CLASSES)), heads.Categorical(CLASSES), "index")
