"""The contract of every op on every backend. The cases are the tables ``CASES`` of tests/ops/test_<op>.py."""

from __future__ import annotations

import pkgutil

import pytest
import torch
from genperf_testing import contract
from genperf_testing.cases import EMPTY, all_cases

import genperf

CASES = [(op, case) for op, cases in all_cases().items() for case in cases]
any_case = pytest.mark.parametrize("case", [pytest.param(c, id=f"{op}-{c.name}") for op, c in CASES])
differentiable_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{op}-{c.name}") for op, c in CASES if c.inputs(c.shapes[0])]
)
per_sample_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{op}-{c.name}") for op, c in CASES if c.per_sample]
)

#: Longer than a chunk, a tile and a block, and more than one thread's work.
LONG = (3, 9001)

#: For Triton these stand for all shapes and layouts; where it is interpreted, the slow tests take them all.
FEW_SHAPES = ((5, 24), (2, 1100), (0, 4), (3, 0))
FEW_LAYOUTS = ("middle of channels last", "expanded last dimension")

#: Where each shape and layout is compiled anew, two cases of each op stand for all but in the smallest shape.
MAIN_CASES = [case for cases in all_cases().values() for case in cases[:2]]


def skip_if_compiling(case, backend):
    if backend.compiling and case not in MAIN_CASES:
        pytest.skip("other cases stand for this one, since each shape and layout is compiled")


@pytest.fixture(autouse=True)
def skip_without_backend(request):
    """Skips the backends that an op does not have; on the others a case has to run."""
    if "case" in request.fixturenames:
        case = request.getfixturevalue("case")
        for name in {"backend", "kernel"} & set(request.fixturenames):
            if request.getfixturevalue(name).backend not in case.backends:
                pytest.skip("the op has no such backend")


def test_every_op_has_cases():
    names = {module.name for module in pkgutil.iter_modules(genperf.ops.__path__)}
    ops = {name for name in names if not name.startswith("_")}
    assert set(all_cases()) == ops
    for op, cases in all_cases().items():
        assert len({case.name for case in cases}) == len(cases) > 0, op


@any_case
def test_accuracy(case, backend):
    shapes = case.shapes
    if backend.costly:
        few = FEW_SHAPES if case in MAIN_CASES else FEW_SHAPES[: 1 if backend.compiling else 2]
        shapes = [shape for shape in few if shape in case.shapes]
    for shape in shapes:
        contract.check_accuracy(case, shape, torch.float32, backend.device)


@any_case
def test_accuracy_of_long_samples(case, backend):
    if backend.costly:
        pytest.skip("of five tiles, where the other tests have two; the slow tests interpret it")
    contract.check_accuracy(case, (2, 5003), torch.float32, backend.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@any_case
def test_accuracy_in_half_precision(case, backend, dtype):
    skip_if_compiling(case, backend)
    if dtype not in case.dtypes:
        pytest.skip(f"does not take {dtype}")
    if backend.costly and dtype == torch.float16:
        pytest.skip("the slow tests do it")
    for shape in ((5, 24),) if backend.costly else ((5, 24), (2, 1100)):
        contract.check_accuracy(case, shape, dtype, backend.device)


@any_case
def test_layouts(case, kernel):
    skip_if_compiling(case, kernel)
    few = FEW_LAYOUTS if case in MAIN_CASES else FEW_LAYOUTS[:1]
    for layout in few if kernel.costly else contract.LAYOUTS:
        contract.check_layout(case, (2, 3, 4, 5), layout, torch.float32, kernel.device)
    if not kernel.costly:
        contract.check_layout(case, (2, 2, 3, 2, 3), "reversed dimensions", torch.bfloat16, kernel.device)
        contract.check_layout(case, (2, 620), "every third element", torch.float16, kernel.device)


@pytest.mark.slow
@any_case
def test_all_shapes_and_layouts_interpreted(case, kernel):
    if not kernel.costly or kernel.compiling:
        pytest.skip("the other tests do it")
    for shape in (*case.shapes, (2, 5003)):
        contract.check_accuracy(case, shape, torch.float32)
        contract.check_accuracy(case, shape, torch.bfloat16)
        contract.check_accuracy(case, shape, torch.float16)
    for layout in contract.LAYOUTS:
        contract.check_layout(case, (2, 3, 4, 5), layout, torch.float32)


@any_case
def test_nan_stays_at_its_place(case, kernel):
    if not case.nan_as_reference:
        pytest.skip("products with zero are left out")
    contract.check_nan_locality(case, kernel.device)


@any_case
def test_repeatable(case, kernel):
    skip_if_compiling(case, kernel)
    if kernel.costly and (case.per_sample or case not in MAIN_CASES):
        pytest.skip("test_batch_composition or other cases show it, and calls are slow")
    if kernel.costly:
        contract.check_repeatable(case, (2, 1100), kernel.device, thread_counts=(2,))
    else:
        contract.check_repeatable(case, LONG, kernel.device)


@per_sample_case
def test_batch_composition(case, kernel):
    skip_if_compiling(case, kernel)
    for shape in ((2, 1100),) if kernel.costly else ((5, 24), (3, 7), (2, 1100), LONG):
        contract.check_batch_composition(case, shape, kernel.device)


@differentiable_case
def test_backward_again(case, kernel):
    contract.check_retained_graph(case, kernel.device)


@differentiable_case
def test_double_backward(case, kernel):
    if kernel.costly:
        pytest.skip("the formulas are torch's, and calls are slow")
    contract.check_double_backward(case, kernel.device)


@differentiable_case
def test_saves_only_inputs(case, backend):
    contract.check_saves_only_inputs(case, (5, 24), backend.device)


@any_case
def test_compile(case, device):
    contract.check_compile(case, (5, 24), device)


@pytest.mark.slow
@any_case
def test_compile_with_inductor(case):
    contract.check_compile(case, (5, 24), compiler="inductor")


@differentiable_case
def test_gradients_by_finite_differences(case):
    if not case.smooth:
        pytest.skip("not differentiable where it is evaluated")
    inputs, constants = case.tensors((2, 3), torch.float64)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*xs):
        return tuple(y for y in case.function(*xs, *constants) if y is not None)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@any_case
def test_opcheck(case, backend):
    """torch's own checks of the schema and the fake kernels."""
    for overload, args in contract.recorded_calls(case, (3, 7), backend.device):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@any_case
def test_opcheck_with_dynamic_shapes(case, device):
    for overload, args in contract.recorded_calls(case, (3, 7), device):
        torch.library.opcheck(overload, args)


@any_case
def test_opcheck_of_empty_tensors(case, device):
    for shape in set(EMPTY) & set(case.shapes):
        for overload, args in contract.recorded_calls(case, shape, device):
            torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@any_case
def test_cuda_graph(case, kernel):
    if kernel.device != "cuda":
        pytest.skip("only a GPU captures graphs")
    for shape in ((5, 24),) if kernel.compiling else ((5, 24), LONG):
        contract.check_cuda_graph(case, shape)
