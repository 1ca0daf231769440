"""Sums, scales and gates move into the convolutions before them, also through a window that lies inside."""

import torch
from genperf_testing import graphs, layers, models, plans
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.sampling import _program as p
from genperf.sampling import heads
from genperf.sampling._feedback import Scaled
from genperf.sampling._ir import ConvNode, PointwiseNode, Ref
from genperf.sampling._plan import plan
from genperf.sampling._reference import ReferenceExecutor
from genperf.sampling._simplify import simplify


class _Larger(nn.Module):
    """Convolutions [B, 8, 8, 10] of y, and a part of each that sees nothing of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, (2, 3), padding=(2, 3)) for _ in range(2))

    def part(self, y: Tensor) -> Tensor:
        return y[:, :, 1:6, 1:7]


class _Sum(_Larger):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_parameter("bias", None)

    def forward(self, y: Tensor) -> Tensor:
        return self.part(self.a(y)) + F.elu(y)


class _TwoSums(_Larger):
    """Two biases and two constants, of which one has rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, 8, 10))
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        return self.part(self.a(y) * self.scale + self.position) + self.part(self.b(y))


class _Gate(_Larger):
    def forward(self, y: Tensor) -> Tensor:
        return self.part(torch.tanh(self.a(y))) * self.part(torch.sigmoid(self.b(y)))


class _Outside(_Larger):
    """Where the part reaches beyond the convolution it reads 0, and not the bias."""

    def forward(self, y: Tensor) -> Tensor:
        return F.pad(self.a(y), (0, -4, 1, -4)) + F.elu(y)


def _simplified(body: nn.Module, tolerance: float = 1e-12) -> list[str]:
    """What is left after the first convolution."""
    model = layers.Around(body)
    simple = simplify(layers.captured(model))
    layers.assert_same(simple, model, tolerance=tolerance)
    return [n.op.name if isinstance(n, PointwiseNode) else "CONV" for n in simple.nodes[2:]]


def test_a_sum_moves_into_a_part_of_a_convolution() -> None:
    assert _simplified(_Sum()) == ["ELU", "CONV"]


def test_sums_of_parts_start_one_convolution_from_another() -> None:
    assert _simplified(_TwoSums(), 2e-6) == ["CONV", "CONV"]


def test_gates_read_before_the_part() -> None:
    assert _simplified(_Gate()) == ["CONV", "CONV", "TANH_SIGMOID"]


def test_a_part_that_reaches_outside_stays() -> None:
    assert sorted(_simplified(_Outside())) == ["ADD", "CONV", "ELU"]


def test_only_residuals_are_added_in_a_gated_pixelcnn() -> None:
    """The vertical stack's contribution is what the horizontal convolution starts from."""
    program = plan(*plans.planned(models.tiny_model("gated_pixelcnn"))).program
    sums = [i for i in program.instructions if isinstance(i, p.Pointwise) and i.op == p.Op.ADD]
    assert len(sums) == 3 - 1  # the first of 3 layers has no residual


class _LateInit(nn.Module):
    """A convolution over the rows above and the own one, to which a function of the own row is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.conv(y)[:, :, :5] + F.elu(y)


def test_taps_run_ahead_of_a_late_init() -> None:
    """The rows above are multiplied a row at a time, though the sum starts from the pixel itself."""
    model = layers.Around(_LateInit())
    graph = layers.captured(model)
    (conv,) = (n for n in simplify(graph).nodes[2:] if isinstance(n, ConvNode))
    assert isinstance(conv.init, Ref)
    made = plan(graph, heads.Categorical(8), Scaled())
    taps = {
        role: [made.program.taps[t][0] for t in range(i.tap_begin, i.tap_end)]
        for i, role in zip(made.program.instructions[-4:], made.roles[-4:], strict=True)
        if isinstance(i, p.Conv)
    }
    assert taps == {"ahead": [-2, -1], "pixel": [0]}
    x = torch.randint(8, (2, *layers.SHAPE, 1), generator=torch.Generator().manual_seed(3)).double()
    executor = ReferenceExecutor(made.program, dtype=torch.float64)
    params = torch.stack(plans.teacher_forced(executor, made.program, x.float()), 1)
    torch.testing.assert_close(params, graphs.evaluate(graph, x).flatten(1, 2), rtol=1e-12, atol=1e-12)
