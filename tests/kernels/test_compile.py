"""The kernels compile for a real GPU without spills and with wide accesses, no GPU needed.

A handful of cases, one of each kind of kernel, for one architecture; ``python -m
bench.compile_report`` does all of them for three.
"""

from __future__ import annotations

import json

import pytest
from support.compiled import run_compiled

from bench import compile_report
from bench.compile_report import Report, judge, read_sass, read_usage

CASES = [
    "route draw N=48 M=5 K=2",
    "route backward eps N=4096 M=64 K=8",
    "plan N=4096 M=64 K=8",
    "gather [48, 3, 224, 224] uint8 to bfloat16 affine channels_last",
    "combine forward N=48 M=5 K=2 C=100",
    "combine backward with loss N=4096 M=64 K=2 C=1000",
    "aggregate products N=48 M=5 K=2 C=32 64x64 bfloat16",
    "aggregate backward rows with loss N=48 M=5 K=2 C=100",
    "aggregate backward rows with loss N=4096 M=64 K=2 C=1000  bfloat16",  # the largest tile
    "aggregate backward matrix N=48 M=5 K=2 C=32 64x64 bfloat16",
    "exploit loss forward R=8192 C=1000",
    "exploit loss forward, rows kept R=8192 C=1000",
    "router loss N=48 K=2",
    "router loss N=4096 K=8",
    "heads update N=256 M=32 K=2 C=21843 768 float16",  # more classes than a program's block
    "norm statistics N=24 C=256 56x56 bfloat16 last relu residual",
    "norm joined statistics N=24 C=256 56x56 bfloat16 last relu residual",
    "norm forward N=24 C=256 56x56 bfloat16 last relu residual",
    "norm sums of the gradient N=24 C=64 112x112 bfloat16 last relu",
    "norm gradient and its sums N=24 C=2048 7x7 float16 relu residual",  # the narrowest loads
    "norm joined sums N=24 C=256 56x56 bfloat16 last relu residual",
    "norm backward N=24 C=64 112x112 bfloat16 last relu",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("compile")
    only = [word for case in CASES for word in ("--only", case)]
    report = folder / "report.json"
    arguments = ["--arch", "90", *only, "--json", report]
    run_compiled("-m", "bench.compile_report", *arguments, TRITON_CACHE_DIR=folder)
    return json.loads(report.read_text())


def test_no_kernel_spills_and_bulk_accesses_are_wide(reports):
    for case in CASES:
        assert any(case in report["case"] for report in reports), f"no case named {case}"
    assert {r["case"]: r["failures"] for r in reports if r["failures"]} == {}


def test_reports_hold_what_a_kernel_must_have(reports):
    for report in reports:
        assert 16 <= report["registers"] <= 255
        assert report["stack"] == report["local_loads"] == report["local_stores"] == 0
        assert report["loads"]
        assert report["stores"]
    matrix = next(r for r in reports if r["case"].startswith("aggregate products"))
    assert matrix["shared"] > 0
    assert matrix["barriers"] > 0


SASS = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/               @P1 LDG.E R9, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0050*/             @!UP0 STG.E.64 desc[UR4][R2.64], R4 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   STL [R1], R5 ;
        /*0080*/                   LDL.64 R6, [R1] ;
"""


def test_instructions_are_counted_by_width():
    assert read_sass(SASS) == {
        "local_loads": 1,
        "local_stores": 1,
        "barriers": 1,
        "loads": {16: 1, 32: 1, 128: 2},
        "stores": {64: 1},
    }
    usage = " Function k:\n  REG:42 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:560\n"
    assert read_usage(usage) == {"registers": 42, "stack": 8, "shared": 1024}


def report(name="combine", local=0, stack=0, loads=128, stores=128) -> Report:
    return Report(name, 90, 32, stack, local, local, 0, 0, {32: 4, loads: 1}, {stores: 1})


def test_spills_stacks_and_narrow_accesses_fail():
    assert judge(report(), wide=True) == []
    assert judge(report(local=2), wide=False) == ["spills: 2 LDL, 2 STL"]
    assert judge(report(stack=8), wide=False) == ["a stack of 8 bytes"]
    assert judge(report(loads=64), wide=True) == ["narrow loads: at most 64 bits"]
    assert judge(report(stores=32), wide=True) == ["narrow stores: at most 32 bits"]
    assert judge(report(loads=64, stores=32), wide=False) == []
    assert judge(report("exploit loss forward R=96", stores=32), wide=True) == []


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected compiled"):
        compile_report.compile_case(None, 90)
