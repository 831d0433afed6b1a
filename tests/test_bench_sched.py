"""The measurements of sched: the load itself, natively and under sched; what is made of recorded runs."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Enclave, bring_up, take_down, wait_for

from bench import sched
from bench.__main__ import Row


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sched.compiled(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def scheduled(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "sb", "--ram", "128M", "-i", "sched=shinjuku")
    yield e
    take_down(e)


def sane(run: dict[str, Any]) -> None:
    """Whatever else this machine does meanwhile."""
    short, long = run["short"], run["long"]
    assert run["n"] == short["n"] + long["n"] > 300 and 0 < long["n"] < short["n"] / 20
    assert run["unfinished"] + run["drops"] < run["n"] and run["late_p99"] >= 0
    for of, least in ((short, 1.0), (long, 100.0)):
        latencies = [of[q] for q in ("p50", "p99", "p999", "max") if of[q] is not None]
        assert latencies == sorted(latencies) and all(v >= least for v in latencies), of
    assert short["p50"] is not None or run["drops"] + run["unfinished"] > run["n"] / 3
    assert run["cpu_ms"] > 0.9 * run["work_ms"] > 0 or run["unfinished"]


def none(_: Sequence[Any]) -> list[str]:
    raise AssertionError("not for a native run")


def test_native_load(programs: dict[str, Path]) -> None:
    run = sched.once(programs, none, sched.ALONE, False, 0.3, 1.0, 1)
    sane(run)
    assert run["iterations"] == 0
    again = sched.once(programs, none, sched.UNKNOWN, False, 0.3, 1.0, 1)
    sane(again)
    assert (again["n"], again["long"]["n"]) == (run["n"], run["long"]["n"]), "equal seeds, equal arrivals"
    assert again["iterations"] > 0


def test_requests_beyond_all_threads_are_not_forgotten(programs: dict[str, Path]) -> None:
    out = subprocess.run([programs["dispersive"], "--load", "8", "--seconds", "0.5", "--workers", "2"], capture_output=True, text=True, timeout=60, check=True).stdout
    run = json.loads(out)
    assert run["drops"] > run["n"] / 2 and run["short"]["p99"] is None and run["short"]["p50"] is None


@pytest.mark.parametrize("server", ["/nonexistent", "true"])
def test_a_server_that_does_not_start(programs: dict[str, Path], server: str) -> None:
    done = subprocess.run([programs["dispersive"], "--seconds", "1", "--", server], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the server does not answer" in done.stderr


@pytest.mark.parametrize("beside", [sched.ALONE, sched.KNOWN])
def test_load_under_sched(scheduled: Enclave, programs: dict[str, Path], beside: str) -> None:
    before = scheduled.request(t="sched")["counters"]["runs"]
    sane(sched.once(programs, lambda cmd: scheduled.command([*cmd], "--sched"), beside, True, 0.3, 1.0, 1))
    assert scheduled.request(t="sched")["counters"]["runs"] >= before + 200, "its threads are not sched's"
    wait_for(lambda: scheduled.request(t="sched")["tasks"] == [], 10, "threads are left")


def test_probe_measures(scheduled: Enclave, programs: dict[str, Path]) -> None:
    scheduled.cli("swap", "sched", "probe")

    def dump() -> dict[str, Any]:
        return dict(scheduled.component("sched")["dump"])

    try:
        done = subprocess.run(scheduled.command([programs["wakes"], "1", "sleep", "5000"], "--sched"), capture_output=True, text=True, timeout=60)
        assert done.stdout == "wakes 200\n", done
        found = wait_for(lambda: (d := dump().get("delivered_us", {})).get("n", 0) > 20 and d, 10, "no wake-up was seen")
        assert 0 < found["p50"] <= found["p99"]
        with sched.batch(programs["batch"], lambda cmd: scheduled.command([*cmd], "--sched"), 4):
            found = wait_for(lambda: (d := dump().get("ran_us", {})).get("n", 0) > 2 and d, 30, "nothing was put on a CPU")
        assert 0 < found["p50"] <= found["p99"]
    finally:
        scheduled.cli("swap", "sched", "shinjuku")


def recorded(beside: str, ours: bool, load: float, p99: float | None, iterations: int = 0) -> dict[str, Any]:
    """As dispersive prints it."""
    short = {"n": 9000, "p50": 1.1, "p99": p99, "p999": None if p99 is None else 2 * p99, "max": None}
    return {
        "beside": beside, "ours": ours, "seed": 1, "load": load, "seconds": 10, "cpus": 2, "workers": 200, "n": 9045, "short": short,
        "long": {"n": 45, "p50": 101.0, "p99": 150.0 if ours else 120.0, "p999": 150.0, "max": 150.0}, "drops": 0, "unfinished": 0,
        "work_ms": 13500.0, "cpu_ms": 13770.0, "iterations": iterations, "late_p99": 0.05, "own_cpu": 0.1 if ours else 0.0,
    }  # fmt: skip


RECORDED = [
    *(recorded(sched.ALONE, False, 0.7, p) for p in (7.0, 7.4, 30.0)),
    *(recorded(sched.ALONE, True, 0.7, p) for p in (2.9, 3.7, 3.1)),
    recorded(sched.UNKNOWN, False, 0.7, 14.0, 1000), recorded(sched.UNKNOWN, True, 0.7, 7.0, 900), recorded(sched.KNOWN, True, 0.7, 1.4, 950),
    recorded(sched.ALONE, False, 0.9, 15.0), recorded(sched.ALONE, True, 0.9, None),
]  # fmt: skip


def test_table_of_recorded_runs() -> None:
    found = sched.points(RECORDED)
    first = next(p for p in found if p.ours and p.beside == sched.ALONE)
    assert first.of("short_p99") == 3.1 and first.of("overhead") == pytest.approx(1.02)
    head, line, *rows = sched.markdown(found).splitlines()
    assert len({text.count("|") for text in (head, line, *rows)}) == 1
    assert [r.split(" | ")[0].strip("| ") for r in rows] == [sched.ALONE, sched.ALONE, sched.UNKNOWN, sched.KNOWN]
    assert "| 0.7 | 1.1 | 1.1 | 7.4 | 3.1 | 0.419 | 14.8 | 6.2 | 1.25 |  | 1.02 / 1.02 | 0.1 | 0 / 0 |" in rows[0]
    assert "| 15 | ∞ | ∞ |" in rows[1] and "| 14 | 1.4 | 0.1 |" in rows[3] and "| 0.95 |" in rows[3]


def test_bounds_of_recorded_runs() -> None:
    rows = [Row(*line) for line in sched.lines_of(sched.points(RECORDED))]
    reached = {r.what: r.reached for r in rows if r.bound}
    assert reached == {
        "short requests' p99, load 0.7, alone": True, "short requests' p99, load 0.7, beside batch": False,
        "short requests' p99, load 0.7, beside batch that sched has": True,
    }  # fmt: skip
    assert [r.ratio for r in rows if r.unit == "blocks"] == [0.9, 0.95]
    assert next(r for r in rows if "0.9, alone" in r.what).ratio == math.inf


def test_ratios_of_what_has_no_end() -> None:
    assert sched.ratio(3.0, math.inf) == 0 and sched.ratio(math.inf, 3.0) == math.inf
    assert math.isnan(sched.ratio(math.inf, math.inf)) and math.isnan(sched.ratio(1.0, math.nan)) and math.isnan(sched.ratio(1.0, 0.0))


def test_plots_of_recorded_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sched.report(RECORDED, tmp_path)
    plot = capsys.readouterr().out
    of = {line.split("|")[0].strip(): line.split("|")[1] for line in plot.splitlines() if "|" in line}
    assert of["0.9"].rstrip().endswith(">") and "N" in of["0.9"]
    assert json.loads((tmp_path / "sched.json").read_text()) == RECORDED
    assert (tmp_path / "sched.md").read_text() == sched.markdown(sched.points(RECORDED))
    at = [line.split("|")[1] for line in plot.splitlines() if line.strip().startswith("0.7")]
    assert [row.index("S") < row.index("N") for row in at] == [True, True, True]
    assert sched.text_plot([]) == "nothing to plot\n"
