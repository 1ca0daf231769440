"""The benchmark harness: what it reports, what it withholds, and its exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from genperf.bench import Benchmark, Case, CheckError, cli, measure, report, run, table
from genperf.bench.noise import plausible_normal
from genperf.bench.providers import Problem, Provider, check, errors
from genperf.bench.results import FIELDS, Results, Row, speedup

BEGIN, END = report.markers()
SCHEMA_OF_ISSUE = [
    *("op", "shape", "dtype", "mode", "provider", "device", "threads"),
    *("median_s", "p20_s", "p80_s", "cpu_s", "bytes", "flops", "ceiling_fraction"),
    *("peak_bytes", "max_error", "check", "versions", "commit"),
]


def _inputs(shape, dtype, device):
    return {"x": torch.randn(shape).to(device, dtype).requires_grad_()}


def _squares(x):
    return x * x, (x * x).sum(1)


def _wrong_value(x):
    return x * x * 1.001, (x * x).sum(1)


def _wrong_gradient(x):
    return x * x.detach() + x * x - (x * x).detach(), (x * x).sum(1)


def _shifted(x):
    return x * x + 1, (x * x).sum(1)


def _nan(x):
    return torch.where(x == x.max(), torch.nan, x * x), (x * x).sum(1)


def _raises(x):
    raise RuntimeError("illegal memory access\nmore")


def _declines(x):
    raise NotImplementedError("two dimensions only")


def _toy(**baselines) -> Benchmark:
    return Benchmark(
        op="squares",
        cases=(Case((8, 16)), Case((4, 4), torch.bfloat16, modes=("fwd",))),
        inputs=_inputs,
        reference=_squares,
        bytes=lambda shape, dtype, mode: 2 * shape[0] * shape[1] * dtype.itemsize,
        flops=lambda shape, dtype, mode: 2 * shape[0] * shape[1],
        baselines={"eager": _squares, **baselines},
        compile=False,
    )


def _run(benchmark: Benchmark, **options) -> Results:
    return run.run([benchmark], run.Options(device="cpu", threads=1, quick=True, **options))


def _rows(results: Results, provider: str) -> dict[str, Row]:
    return {row.mode: row for row in results.rows if row.provider == provider and row.dtype == "float32"}


@pytest.fixture(scope="module")
def measured() -> Results:
    return _run(_toy(**{"peer/same": _squares}))


def test_rows_have_the_fields_of_the_schema(measured, tmp_path):
    measured.save(tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert list(FIELDS) == SCHEMA_OF_ISSUE
    assert all(list(row) == SCHEMA_OF_ISSUE for row in document["rows"])
    assert {row["mode"] for row in document["rows"]} == {"fwd", "bwd", "fwd+bwd"}
    header = document["header"]
    assert header["ceilings"]["copy_bytes_per_s"] > 1e8
    assert header["ceilings"]["matmul_flops_per_s"] > 1e8
    assert set(header["load_average"]) == {"before", "after"}
    assert header["schema"] == 1
    assert header["cpu"]["isa"]
    assert header["date"]


def test_rows_are_plausible(measured):
    assert len(measured.rows) == 2 * (3 + 1)
    for row in measured.rows:
        assert row.check == "ok"
        assert 0 < row.p20_s <= row.median_s <= row.p80_s < 0.1
        assert 0 < row.cpu_s < 0.1
        assert row.threads == 1
        expected = row.bytes / measured.header["ceilings"]["copy_bytes_per_s"]
        arithmetic = row.flops / measured.header["ceilings"]["matmul_flops_per_s"]
        assert row.ceiling_fraction == pytest.approx(max(expected, arithmetic) / row.cpu_s)
        assert row.max_error < (1e-6 if row.dtype == "float32" else 1e-2)
    assert {row.shape for row in measured.rows} == {"8x16", "4x4"}


def test_files_of_another_schema_are_refused(measured, tmp_path):
    path = tmp_path / "out.json"
    measured.save(path)
    document = json.loads(path.read_text())
    document["rows"][0]["extra"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="extra"):
        Results.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        Results.load(path)


@pytest.mark.parametrize(
    ("function", "failing_modes", "text"),
    [
        (_wrong_value, {"fwd", "bwd", "fwd+bwd"}, "error"),
        (_wrong_gradient, {"bwd", "fwd+bwd"}, "gradient of x"),
        (_shifted, {"fwd", "fwd+bwd"}, "output 0"),
        (_nan, {"fwd", "bwd", "fwd+bwd"}, ": "),
        (_raises, {"fwd", "bwd", "fwd+bwd"}, "RuntimeError: illegal memory access"),
    ],
)
def test_speedup_of_a_wrong_result_is_withheld(function, failing_modes, text):
    results = _run(_toy(**{"peer/wrong": function, "peer/same": _squares}))
    for mode, row in _rows(results, "peer/wrong").items():
        case = results.cases()[row.case]
        if mode in failing_modes:
            assert row.check.startswith("fail: ")
            assert text in row.check
            assert speedup(row, case) is None
        else:
            assert row.check == "ok"
        assert speedup(_rows(results, "peer/same")[mode], case) > 0
    shown = table.markdown(results)
    line = next(line for line in shown.splitlines() if "| fwd+bwd |" in line)
    assert "check failed" in line
    assert line.count("x)") == 1  # the right peer's speed-up alone


def test_a_nan_in_an_output_is_named():
    row = _rows(_run(_toy(**{"peer/nan": _nan}), mode="fwd"), "peer/nan")["fwd"]
    assert row.check == "fail: output 0: not finite where the truth is"
    assert row.max_error is None


def test_no_speedup_over_a_wrong_eager():
    results = _run(dataclasses.replace(_toy(**{"peer/same": _squares}), reference=_wrong_value), mode="fwd")
    row = _rows(results, "peer/same")["fwd"]
    assert speedup(row, results.cases()[row.case]) is None


def test_a_provider_that_declines_is_left_out_with_its_reason():
    results = _run(_toy(**{"peer/images": _declines}), dtype="float32")
    assert not _rows(results, "peer/images")
    reason = {"op": "squares", "provider": "peer/images", "reason": "two dimensions only"}
    assert results.header["skipped"] == [reason]
    assert "two dimensions only" in table.terminal(results)


def test_check_allows_twice_eagers_error_and_no_more():
    problem = Problem(_toy(), Case((8, 16)), torch.device("cpu"))
    floor = 8 * torch.finfo(torch.float32).eps
    assert check(problem, {"output 0": 2e-5 + 0.9 * floor}, {"output 0": 1e-5}) == "ok"
    assert check(problem, {"output 0": 2e-5 + 1.1 * floor}, {"output 0": 1e-5}).startswith("fail")
    assert check(problem, {"output 0": 2e-4}, {"output 0": 1.0}).startswith("fail")
    assert check(problem, {"output 0": float("nan")}, {"output 0": 1e-5}).startswith("fail")


def test_errors_are_relative_to_the_largest_magnitude():
    problem = Problem(_toy(), Case((8, 16)), torch.device("cpu"))
    problem.inputs["x"].data.clamp_(-2, 2)[0, 0] = 2.0

    def off_by_a_hundredth(x):
        return x * x + 0.01, (x * x).sum(1)

    found = errors(problem, Provider("peer/off", off_by_a_hundredth), "fwd")
    assert found["output 0"] == pytest.approx(0.0025, rel=1e-3)
    assert found["output 1"] < 1e-6


def test_plausible_normal():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100_000, generator=generator)
    assert torch.equal(plausible_normal(noise), noise.double())
    uniform = (torch.rand(100_000, generator=generator) - 0.5) * 12**0.5
    repeated = noise.repeat_interleave(2)
    for wrong in (noise * 1.05, noise + 0.05, uniform, repeated, noise * torch.nan):
        with pytest.raises(CheckError):
            plausible_normal(wrong)


def test_peak_bytes_is_what_a_call_holds_beyond_its_results():
    x = torch.zeros(1 << 18)  # 1 MiB
    device = torch.device("cpu")
    a_few_scalars = 64
    assert measure.peak_bytes(lambda: None, lambda _: (x + 1,), device) <= a_few_scalars
    assert measure.peak_bytes(lambda: None, lambda _: (((x + 1) * 2 + 3).sum(),), device) >= 2 << 20
    assert measure.peak_bytes(lambda: x + 1, lambda state: (state * 2,), device) <= a_few_scalars


def test_race_ranks_providers_and_stays_fair():
    calls = []

    def contender(name: str, duration: float) -> measure.Contender:
        def work(_):
            calls.append(name)
            time.sleep(duration)

        return measure.Contender(lambda: None, work, contextlib.nullcontext)

    slow, fast = contender("slow", 4e-3), contender("fast", 1e-3)
    measure.race([slow, fast], measure.CpuClock(), measure.QUICK)
    medians = [measure.quantiles(each.samples.wall)[1] for each in (slow, fast)]
    assert 2 < medians[0] / medians[1] < 6
    assert len(slow.samples.wall) == len(fast.samples.wall) >= measure.QUICK.rounds
    assert calls[-2:] == ["slow", "fast"]


def _scaled(results: Results, factor: float, **changes) -> Results:
    rows = [
        dataclasses.replace(row, cpu_s=row.cpu_s * factor, **changes) if row.provider == "peer/same" else row
        for row in results.rows
    ]
    return Results(results.header, rows)


@pytest.mark.parametrize(
    ("factor", "limit", "code"),
    [(1.0, "5%", 0), (1.03, "5%", 0), (1.2, "5%", 1), (1.03, "2%", 1), (1.2, "25%", 0), (0.5, "5%", 0)],
)
def test_compare_fails_over_the_limit_only(measured, tmp_path, factor, limit, code):
    measured.save(tmp_path / "a.json")
    _scaled(measured, factor).save(tmp_path / "b.json")
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["compare", *paths, "--fail-over", limit]) == code


def test_compare_fails_where_a_check_now_fails(measured, tmp_path, capsys):
    measured.save(tmp_path / "a.json")
    _scaled(measured, 0.5, check="fail: output 0").save(tmp_path / "b.json")
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "check failed" in capsys.readouterr().out


def test_compare_needs_something_in_common(measured, tmp_path, capsys):
    measured.save(tmp_path / "a.json")
    other = [dataclasses.replace(row, op="cubes") for row in measured.rows]
    Results(measured.header, other).save(tmp_path / "b.json")
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "in common" in capsys.readouterr().err


def test_compare_uses_cpu_time_of_one_thread_and_the_median_otherwise(measured):
    row = dataclasses.replace(measured.rows[0], cpu_s=1.0, median_s=2.0)
    assert row.seconds == 1.0
    assert dataclasses.replace(row, threads=2).seconds == 2.0
    assert dataclasses.replace(row, device="cuda").seconds == 2.0


@pytest.mark.parametrize("percentage", ["5", "five", "-5%"])
def test_compare_refuses_a_limit_that_is_no_percentage(percentage, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", "a.json", "b.json", f"--fail-over={percentage}"])
    assert caught.value.code == 2
    assert "expected a percentage such as 5%" in capsys.readouterr().err


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "discover", lambda: [_toy(**{"peer/same": _squares})])
    path = tmp_path / "new" / "out.json"
    arguments = ["squares", "--device", "cpu", "--threads", "1", "--quick", "--json", str(path)]
    assert cli.main([*arguments, "--shape", "8x*", "--mode", "fwd"]) == 0
    shown = capsys.readouterr().out
    assert "peer/same" in shown
    assert [(row.shape, row.mode, row.provider) for row in Results.load(path).rows] == [
        ("8x16", "fwd", "eager"),
        ("8x16", "fwd", "peer/same"),
    ]
    assert cli.main([*arguments, "--skip", "peer/*", "--commit", "abc"]) == 0
    again = Results.load(path)
    assert {(row.provider, row.commit) for row in again.rows} == {("eager", "abc")}


def test_several_numbers_of_threads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "discover", lambda: [_toy()])
    before = torch.get_num_threads()
    arguments = ["--device", "cpu", "--threads", "1,2,1", "--quick", "--mode", "fwd"]
    assert cli.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert torch.get_num_threads() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out_2_threads.json"}
    for threads, name in ((1, "out.json"), (2, "out_2_threads.json")):
        assert {row.threads for row in Results.load(tmp_path / name).rows} == {threads}
    assert capsys.readouterr().out.count("squares") >= 2
    with pytest.raises(SystemExit):
        cli.main(["--threads", "1,0"])


def test_command_line_fails_where_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(cli, "discover", lambda: [_toy(**{"peer/wrong": _wrong_value})])
    assert cli.main(["--device", "cpu", "--quick", "--mode", "fwd"]) == 1
    assert "fail: output 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cubes"], "no benchmark is named 'cubes'; there are: squares"),
        (["--shape", "1x1"], "the filters leave nothing"),
        (["compare", "missing.json", "missing.json"], "missing.json"),
        (["report", "missing.json"], "missing.json"),
    ],
)
def test_command_line_tells_bad_input(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(cli, "discover", lambda: [_toy()])
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_report_writes_markdown_and_charts(measured, tmp_path):
    measured.save(tmp_path / "out.json")
    markdown, chart = tmp_path / "table.md", tmp_path / "chart.svg"
    command = ["report", str(tmp_path / "out.json"), "--markdown", str(markdown), "--chart", str(chart)]
    assert cli.main(command) == 0
    assert "| squares | 8\u00d716" in markdown.read_text()
    assert "<svg" in chart.read_text()
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "chart.png")
    assert image.shape[0] > 200
    assert image[..., :3].std() > 0.01


def test_chart_shows_the_fullest_mode_of_each_case(measured):
    assert list(report.chart_rows(measured)["squares"]) == [
        "8\u00d716\nfloat32, fwd+bwd",
        "4\u00d74\nbfloat16, fwd",
    ]


def test_overhead_is_told_apart_from_speedups(measured):
    fwd = next(row for row in measured.rows if row.provider == "eager" and row.mode == "fwd")
    native = dataclasses.replace(fwd, op="overhead", provider="native", cpu_s=1e-6)
    call = dataclasses.replace(native, provider="genperf/cpu", cpu_s=5.5e-6)
    results = Results(measured.header, [*measured.rows, native, call])
    assert "+4.50 us" in table.terminal(results)
    shown = table.markdown(results)
    assert "| overhead" not in shown
    assert "a call of genperf/cpu takes 4.5 us more than the bare kernel" in shown
    assert list(report.chart_rows(results)) == ["squares"]


def test_report_replaces_the_marked_region_alone(measured, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    report.write_markdown(measured, readme)
    report.write_markdown(measured, readme)
    text = readme.read_text()
    assert text.startswith(f"# before\n\n{BEGIN}\n|")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    assert text.count(table.markdown(measured)) == 1


@pytest.mark.parametrize("text", ["no markers", f"{END}{BEGIN}", BEGIN, f"{BEGIN * 2}{END}"])
def test_report_does_not_overwrite_a_file_without_markers(measured, tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected one"):
        report.write_markdown(measured, path)
    assert path.read_text() == text


def test_regions_have_names(measured, tmp_path):
    first, (begin, end) = "\n".join(report.markers()), report.markers("other")
    path = tmp_path / "README.md"
    path.write_text(f"{first}\n{begin}\nold\n{end}\n")
    report.write_markdown(measured, path, "other")
    assert path.read_text() == f"{first}\n{begin}\n{table.markdown(measured)}\n{end}\n"


def test_a_report_names_what_was_measured_at_another_commit(measured):
    assert f"at {measured.header['commit']}, torch" in table.title(measured)
    later = [dataclasses.replace(row, op="cubes", commit="abc") for row in measured.rows]
    text = table.title(Results(measured.header, [*measured.rows, *later]))
    assert f"at {measured.header['commit']} (cubes at abc), torch" in text


def test_a_report_of_some_modes(measured, tmp_path, capsys):
    measured.save(tmp_path / "out.json")
    assert cli.main(["report", str(tmp_path / "out.json"), "--mode", "fwd+bwd", "--dtype", "float*"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("fwd+bwd") == 1
    assert "bfloat16" not in shown


def test_a_provider_that_is_timed_in_part():
    def slow(x):
        time.sleep(0.01)
        return _squares(x)

    def parts(shape):
        return 7 * shape[0]

    toy = dataclasses.replace(
        _toy(), baselines={"naive": slow, "peer/same": _squares}, parts={"naive": parts}
    )
    results = _run(toy, mode="fwd", dtype="float32")
    row = _rows(results, "naive")["fwd"]
    assert 7 * 8 * 0.01 <= row.median_s < 7 * 8 * 0.05
    assert speedup(_rows(results, "peer/same")["fwd"], results.rows) == pytest.approx(
        row.cpu_s / _rows(results, "peer/same")["fwd"].cpu_s
    )


def test_a_floor_of_its_own():
    results = _run(dataclasses.replace(_toy(), floor=lambda inputs: 1e-9 * inputs["x"].numel()), mode="fwd")
    for row in results.rows:
        elements = 8 * 16 if row.shape == "8x16" else 4 * 4
        assert row.ceiling_fraction == pytest.approx(1e-9 * elements / row.cpu_s)


def test_slow_providers_run_a_few_rounds_only():
    contender = measure.Contender(lambda: None, lambda _: time.sleep(0.03), contextlib.nullcontext)
    effort = measure.Effort(1e-3, rounds=15, max_rounds=100, budget_s=0.01, least=3)
    measure.race([contender], measure.CpuClock(), effort)
    assert len(contender.samples.wall) == 3


def test_groups_are_chosen_by_name():
    grouped = dataclasses.replace(_toy(), op="whole", group="models")
    known = [_toy(), grouped]
    assert cli._select(known, []) == known[:1]
    assert cli._select(known, ["models"]) == [grouped]
    assert cli._select(known, ["whole", "models", "squares"]) == [grouped, known[0]]
    with pytest.raises(ValueError, match="squares, whole, models"):
        cli._select(known, ["nothing"])


def test_installed_benchmarks_run_from_the_command_line(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "genperf", "bench", "gaussian_sample", "--device", "cpu", "--quick"]
    command += ["--threads", "1", "--shape", "256x128", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Results.load(path).rows
    assert {row.mode for row in rows} == {"fwd", "bwd", "fwd+bwd"}
    assert {"eager", "genperf/cpu"} <= {row.provider for row in rows}
