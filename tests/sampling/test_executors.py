"""Executors of a sampler's program: the reference against an interpreter, the native one against both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from genperf_testing.interpreter import Interpreter, pointwise
from genperf_testing.programs import BINARY, HEADS, random_program

import genperf
from genperf import _backend
from genperf.sampling._native import CPUExecutor
from genperf.sampling._program import (
    Attention,
    Buffer,
    Const,
    Conv,
    Embed,
    FeedbackKind,
    Head,
    HeadKind,
    Op,
    Operand,
    Pointwise,
    Program,
)
from genperf.sampling._reference import ReferenceExecutor
from genperf.sampling.heads import draw, margin

SEEDS = range(4)
NATIVE = pytest.mark.skipif(_backend.native is None, reason="the extension module is not built")


def noise_for(head, batch, seed=0):
    shape = (batch, head.rows, head.cols, head.noises)
    generator = torch.Generator().manual_seed(seed)
    if head.kind == HeadKind.GAUSSIAN:
        return torch.randn(shape, generator=generator)
    return (torch.randint(1 << 24, shape, generator=generator).float() + 0.5) * 2.0**-24


def start(executor, batch):
    state = executor.start(batch)
    state.workspace.fill_(float("nan"))
    state.values.fill_(float("nan"))
    return state


def random_values(head, batch, seed=1):
    """Values [B, rows, cols, values] as the head could have drawn."""
    shape = (batch, head.rows, head.cols, head.values)
    generator = torch.Generator().manual_seed(seed)
    if head.kind in (HeadKind.CATEGORICAL, HeadKind.BERNOULLI):
        return torch.randint(head.classes, shape, generator=generator).float()
    return torch.rand(shape, generator=generator) * 2 - 1


def teacher_forced(executor, values):
    """The parameters of all slots [slots, B, C], given the values."""
    head = executor.program.head
    state = start(executor, len(values))
    noise, known = noise_for(head, len(values)), (values, torch.ones_like(values, dtype=torch.bool))
    params = []
    for slot in range(executor.program.slots):
        if head.kind == HeadKind.CALLBACK:
            executor.run(state, slot, slot + 1, None)
            params.append(executor.params(state, slot).clone())
            y, x = divmod(slot // head.draws, head.cols)
            executor.feed(state, slot, values[:, y, x, slot % head.draws])
        else:
            executor.run(state, slot, slot + 1, noise, known=known)
            params.append(executor.params(state, slot).clone())
    assert torch.equal(state.values, values)
    return torch.stack(params)


def sampled(executor, noise, **options):
    state = start(executor, len(noise))
    executor.run(state, 0, executor.program.slots, noise, **options)
    return state.values


@pytest.fixture(autouse=True)
def threads():
    """Sets the number of threads; one until then, since small operations of torch only wait for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in genperf.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _backend.native.isa()
    _backend.native.set_isa(request.param)
    yield request.param
    _backend.native.set_isa(before)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", SEEDS)
def test_reference_does_what_the_program_says(seed, head):
    program = random_program(seed, head)
    values = random_values(program.head, 2)
    expected = Interpreter(program, 2)
    actual = teacher_forced(ReferenceExecutor(program, dtype=torch.float64), values)
    for slot in range(program.slots):
        expected.segments(slot)
        np.testing.assert_allclose(actual[slot].numpy(), expected.params(slot), rtol=1e-10, atol=1e-10)
        pixel, draw = divmod(slot, program.head.draws)
        y, x = divmod(pixel, program.head.cols)
        count = program.head.values // program.head.draws
        expected.feed(slot, values[:, y, x, draw : draw + count].numpy())


@NATIVE
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", SEEDS)
def test_native_is_as_exact_as_torch(seed, head, batch):
    program = random_program(seed, head)
    values = random_values(program.head, batch)
    exact = teacher_forced(ReferenceExecutor(program, dtype=torch.float64), values)
    plain = teacher_forced(ReferenceExecutor(program), values)
    native = teacher_forced(CPUExecutor(program), values)
    floor = 2e-6 * max(1.0, exact.abs().max().item())
    assert (native - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@NATIVE
@pytest.mark.parametrize("head", [h for h in HEADS if h != "callback"])
@pytest.mark.parametrize("seed", SEEDS)
def test_native_draws_what_the_reference_draws(seed, head):
    program = random_program(seed, head)
    noise = noise_for(program.head, 3, seed)
    reference = ReferenceExecutor(program, dtype=torch.float64)
    drawn = sampled(CPUExecutor(program), noise)
    # The reference is given what was drawn before each slot, so that a rounding error cannot grow.
    state = start(reference, 3)
    everything = torch.ones_like(drawn, dtype=torch.bool)
    for slot in range(program.slots):
        reference.run(state, slot, slot + 1, noise, known=(drawn, everything))
        pixel, d = divmod(slot, program.head.draws)
        y, x = divmod(pixel, program.head.cols)
        params = reference.params(state, slot)
        certain = margin(program.head, params, noise[:, y, x], index=d) > 1e-5
        own = draw(program.head, params, noise[:, y, x], index=d)
        actual = drawn[:, y, x, d : d + own.shape[1]]
        torch.testing.assert_close(actual[certain], own[certain].float(), rtol=1e-4, atol=1e-4)


@NATIVE
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", SEEDS)
def test_bits_depend_on_neither_batch_nor_threads(seed, head, threads):
    program = random_program(seed, head, wide=150)
    executor = CPUExecutor(program)
    values = random_values(program.head, 16)
    threads(1)
    expected = teacher_forced(executor, values)
    for count, batches in ((1, (1, 3)), (2, (1, 5, 16)), (3, (2, 16)), (5, (3,))):
        threads(count)
        for batch in batches:
            # Constants may differ by image: always the first images.
            actual = teacher_forced(executor, values[:batch])
            assert torch.equal(actual, expected[:, :batch]), (count, batch)
    if program.head.kind != HeadKind.CALLBACK:
        noise = noise_for(program.head, 16)
        threads(1)
        drawn = sampled(executor, noise)
        threads(2)
        assert torch.equal(sampled(executor, noise), drawn)
        assert torch.equal(sampled(executor, noise[:1]), drawn[:1])
        assert torch.equal(sampled(executor, noise[:3]), drawn[:3])


@NATIVE
@pytest.mark.parametrize("head", ["categorical", "categorical_rgb", "mixture", "gaussian"])
def test_known_values_are_taken_and_seen(head):
    program = random_program(5, head)
    noise = noise_for(program.head, 4)
    values = random_values(program.head, 4)
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    executor = CPUExecutor(program)
    drawn = sampled(executor, noise, known=(values, mask))
    assert torch.equal(drawn[mask], values[mask])
    everything = torch.ones_like(mask)
    assert torch.equal(sampled(executor, noise, known=(drawn, everything)), drawn)
    params, free = teacher_forced(executor, drawn), ~mask
    for slot in range(program.slots):
        pixel, d = divmod(slot, program.head.draws)
        y, x = divmod(pixel, program.head.cols)
        own = draw(program.head, params[slot], noise[:, y, x], index=d, known=(drawn[:, y, x], mask[:, y, x]))
        rows = free[:, y, x, d]
        if head.startswith("categorical"):
            rows &= margin(program.head, params[slot], noise[:, y, x], index=d) > 1e-5
        torch.testing.assert_close(drawn[rows, y, x, d], own[rows, 0], rtol=1e-5, atol=1e-5)


def one_operation(op, channels, p=0.0, q=0.0):
    """A program whose only slot computes ``op`` of two constants, one image at a time."""
    program = Program(Head(HeadKind.CALLBACK, 2, 1, 1, 1, 1, 1, 1, 1, 0, FeedbackKind.NONE, -1, 1.0, 0.0))
    program.buffers = [Buffer(0, 1, 1, channels)]
    program.workspace = channels
    program.consts = [Const(0, channels, 0, 0, 1), Const(1, channels, 0, 0, 1)]
    program.operands = [Operand(True, 0), Operand(True, 1), Operand(False, 0)]
    program.instructions = [Pointwise(0, 0, channels, op, 0, 1 if op in BINARY else -1, p, q)]
    program.segments = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    program.slot_begin = torch.tensor([0, 1])
    return program


@NATIVE
@pytest.mark.parametrize("channels", [1, 7, 16, 37, 1024])
@pytest.mark.parametrize("op", Op)
def test_every_operation(op, channels):
    generator = torch.Generator().manual_seed(channels)
    a, b = (torch.randn(2, 3, channels, generator=generator) * 3).unbind()
    if op in (Op.LOG, Op.SQRT):
        a = a.abs() + 1e-6
    p, q = {Op.SOFTPLUS: (0.7, 15.0), Op.CLAMP: (-1.0, 2.0)}.get(op, (0.3, -0.2))
    program = one_operation(op, channels, p, q)
    program.tensors = [a.reshape(-1), b.reshape(-1)]
    exact = torch.from_numpy(pointwise(op, a.double().numpy(), b.double().numpy(), p, q))
    results = []
    for executor in (ReferenceExecutor(program), CPUExecutor(program)):
        state = start(executor, 3)
        executor.run(state, 0, 1, None)
        results.append((executor.params(state, 0) - exact).abs())
    plain, native = results
    allowed = 2 * plain.max() + 3e-7 * exact.abs()
    assert (native <= allowed).all(), (native - allowed).max()


@NATIVE
@pytest.mark.parametrize("op", [o for o in Op if o not in (Op.MUL_SIGMOID, Op.TANH_SIGMOID)])
def test_operations_at_the_extremes(op):
    special = [0.0, -0.0, 1e-40, 1e-20, 88.0, -88.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    a, b = torch.cartesian_prod(torch.tensor(special), torch.tensor(special)).unbind(1)
    program = one_operation(op, len(a), 0.5, 20.0)
    program.tensors = [a.contiguous(), b.contiguous()]
    results = []
    for executor in (ReferenceExecutor(program), CPUExecutor(program)):
        state = start(executor, 1)
        executor.run(state, 0, 1, None)
        results.append(executor.params(state, 0))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-30, equal_nan=True)


@NATIVE
@pytest.mark.parametrize("channels_in", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 80, 200])
def test_sums_are_chains_of_a_block(channels, channels_in):
    """The bits of a convolution, from float64 arithmetic that rounds after each multiply-add."""
    if _backend.native.isa() == "baseline":
        pytest.skip("no fused multiply-add")
    program = one_operation(Op.COPY, channels)
    generator = torch.Generator().manual_seed(channels)
    source = torch.randn(3, channels_in, generator=generator)
    init = torch.randn(channels, generator=generator)
    weight = torch.randn(2, channels_in, channels, generator=generator)
    program.tensors = [source.reshape(-1), init]
    program.consts = [Const(0, channels_in, 0, 0, 1), Const(1, 0, 0, 0, 1)]
    program.taps = [(0, 0), (0, 0)]
    program.weights = [weight]
    program.instructions = [Conv(0, 0, channels, 0, channels_in, 0, 2, 1, 1, 0, 1)]
    executor = CPUExecutor(program)
    state = start(executor, 3)
    executor.run(state, 0, 1, None)
    expected = init.expand(3, channels).clone()
    chain = torch.zeros(3, channels)
    for k in range(2 * channels_in):
        tap, c = divmod(k, channels_in)
        # A product of two float32 is exact in float64; the sum is rounded to float64 first, which changes
        # the result only where that lies half-way between two float32.
        chain = (chain.double() + source[:, c, None].double() * weight[tap, c].double()).float()
        if k % 128 == 127 or k == 2 * channels_in - 1:
            expected, chain = expected + chain, torch.zeros(3, channels)
    assert (executor.params(state, 0) == expected).float().mean() > 0.999
    torch.testing.assert_close(executor.params(state, 0), expected, rtol=1e-6, atol=1e-6)


@NATIVE
@pytest.mark.parametrize("weight", [None, float("inf")])
@pytest.mark.parametrize("zeros", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("channels", [64, 256, 1088])
def test_zeros_from_a_relu_change_no_bit(channels, zeros, weight, isa):
    """One image's products with zeros are left out, several images' are not."""
    channels_in = 200
    program = one_operation(Op.COPY, channels)
    generator = torch.Generator().manual_seed(channels)
    source = torch.rand(channels_in, generator=generator) + 0.1
    source[torch.randperm(channels_in, generator=generator)[: int(zeros * channels_in)]] *= -1
    init = torch.randn(channels, generator=generator)
    weights = torch.randn(1, channels_in, channels, generator=generator)
    if weight is not None:
        weights[0, 7, 3] = weight
    program.buffers.append(Buffer(channels, 1, 1, channels_in))
    program.workspace += channels_in
    program.tensors = [source, init]
    program.consts = [Const(0, 0, 0, 0, 1), Const(1, 0, 0, 0, 1)]
    program.operands.append(replace(program.operands[0], is_const=False, index=1))
    program.taps = [(0, 0)]
    program.weights = [weights]
    program.instructions = [
        Pointwise(1, 0, channels_in, Op.RELU, 0, -1),
        Conv(0, 0, channels, len(program.operands) - 1, channels_in, 0, 1, 1, 1, 0, 1),
    ]
    program.segments = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1]], dtype=torch.int32)
    program.slot_begin = torch.tensor([0, 2])
    executor = CPUExecutor(program)
    drawn = []
    for batch in (1, 2):
        state = start(executor, batch)
        executor.run(state, 0, 1, None)
        drawn.append(executor.params(state, 0))
    rectified = source.clamp(min=0).double()
    exact = init.double() + rectified @ weights[0].double()
    torch.testing.assert_close(drawn[0][0].double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(drawn[0][0].view(torch.int32), drawn[1][0].view(torch.int32))


@NATIVE
@pytest.mark.parametrize("with_init", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 16, 64, 100, 300])
def test_embeddings_add_rows_in_order(channels, with_init, isa):
    """The bits of a sum of table rows; outside of the grid, and for what is no class, as defined."""
    program = one_operation(Op.COPY, channels)
    generator = torch.Generator().manual_seed(channels)
    program.head = replace(program.head, input=-1, rows=3, cols=4)
    program.buffers = [Buffer(0, 1, 4, channels)]
    program.workspace = 4 * channels
    init = torch.randn(4, channels, generator=generator)
    table = torch.randn(5, 6, channels, generator=generator)
    program.tensors = [init, table]
    program.consts = [Const(0, 0, 0, channels, 1)]
    program.operands = [Operand(True, 0), Operand(True, 0), Operand(False, 0)]
    program.taps = [(-1, 1), (0, 0), (-1, -2), (-2, 0), (1, 3)]
    program.instructions = [Embed(0, 0, channels, 1, 0, 0, 5, 0 if with_init else -1)]
    program.segments = torch.tensor([[0, 1, 0, 4]], dtype=torch.int32)
    program.slot_begin = torch.tensor([0] + [1] * 12)
    values = torch.randint(6, (2, 3, 4, 1), generator=generator).float()
    values[0, 1, 2], values[1, 1, 1], values[0, 0, 3] = torch.nan, 6.0, -1.0
    expected = init.expand(2, 4, channels).clone() if with_init else torch.zeros(2, 4, channels)
    classes = torch.where((values >= 0) & (values < 6), values, 0.0).long()
    classes[:, 0, 0] = 0  # cleared before the first slot
    for b in range(2):
        for x in range(4):
            for t, (dy, dx) in enumerate(program.taps):
                if 0 <= 1 + dy < 3 and 0 <= x + dx < 4:
                    expected[b, x] += table[t, classes[b, 1 + dy, x + dx, 0]]
    for executor in (ReferenceExecutor(program), CPUExecutor(program)):
        state = start(executor, 2)
        state.values.copy_(values)
        executor.run(state, 0, 1, None)
        assert torch.equal(state.workspace.view(4, 2, channels).transpose(0, 1), expected)


@NATIVE
def test_constructor_names_what_it_cannot_do():
    program = one_operation(Op.COPY, 1)
    program.tensors = [torch.zeros(1), torch.zeros(1)]
    with pytest.raises(ValueError, match="device: meta"):
        CPUExecutor(program, "meta")
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        CPUExecutor(program, dtype=torch.float64)


@NATIVE
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("head", ["categorical", "mixture"])
@pytest.mark.parametrize("seed", [20, 21, 22])
def test_every_instruction_set(seed, head, batch, isa):
    program = random_program(seed, head, wide=100)
    values = random_values(program.head, 7)
    exact = teacher_forced(ReferenceExecutor(program, dtype=torch.float64), values)
    executor = CPUExecutor(program)
    native = teacher_forced(executor, values)
    assert (native - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max().item())
    assert torch.equal(teacher_forced(executor, values[:batch]), native[:, :batch])


def attention_program(rows, cols, heads, dim_k, dim_v):
    """Slot 0: attention of every cell over all cells before it, from three buffers that the test fills."""
    program = Program(
        Head(HeadKind.CALLBACK, 3, rows, cols, 1, 1, 1, 1, 1, 0, FeedbackKind.NONE, -1, 1.0, 0.0)
    )
    channels = (heads * dim_k, heads * dim_k, heads * dim_v, heads * dim_v)
    for c in channels:
        program.buffers.append(Buffer(program.workspace, rows, cols, c))
        program.operands.append(Operand(False, len(program.operands)))
        program.workspace += rows * cols * c
    program.tensors = [torch.arange(rows * cols)]
    program.instructions = [Attention(3, 0, 0, 1, 2, heads, dim_k, dim_v, dim_k**-0.5, 0, cols)]
    program.segments = torch.tensor([[0, y, 0, cols] for y in range(rows)], dtype=torch.int32)
    program.slot_begin = torch.tensor([0] + [rows] * (rows * cols))
    return program


@NATIVE
@pytest.mark.parametrize(
    ("rows", "cols", "heads", "dim_k", "dim_v"),
    [(25, 27, 8, 16, 16), (26, 25, 3, 5, 20), (3, 60, 2, 150, 7), (40, 16, 1, 33, 130)],
)
def test_attention_over_many_keys(rows, cols, heads, dim_k, dim_v, isa, threads):
    """More keys and products than one block holds."""
    program = attention_program(rows, cols, heads, dim_k, dim_v)
    filled = torch.randn(program.workspace * 3, generator=torch.Generator().manual_seed(0)) * 2
    results = []
    for count, executor in (
        (1, ReferenceExecutor(program, dtype=torch.float64)),
        (1, ReferenceExecutor(program)),
        (1, CPUExecutor(program)),
        (2, CPUExecutor(program)),
        (5, CPUExecutor(program)),
    ):
        threads(count)
        state = start(executor, 3)
        out = program.buffers[3].offset * 3
        state.workspace[:out] = filled[:out]
        executor.run(state, 0, 1, None)
        results.append(state.workspace[out:].clone())
    exact, plain, native, *others = results
    assert (native - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2e-6
    assert all(torch.equal(other, native) for other in others)
