"""What bench.issue_slots reads off machine code, and its estimate beside what was measured."""

from __future__ import annotations

import pytest

from bench import issue_slots
from bench.issue_slots import H100, H200, issue_seconds, read_code, resident_warps, seconds

SASS = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R8, R4, R5, R6 ;
        /*0030*/                   SHFL.BFLY PT, R9, R8, 0x2, 0x1f ;
        /*0040*/              @!P0 FMNMX R8, R8, R9, !PT ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0070*/                   BRA 0x90 ;
        /*0080*/                   NOP ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP ;
"""


def test_a_loop_is_what_a_branch_goes_back_to():
    code = read_code(SASS)
    assert code.loop == {"FFMA": 1, "SHFL": 1, "FMNMX": 1, "BRA": 1}
    assert code.once == {"IMAD": 1, "LDG": 1, "STG": 1, "BRA": 1, "NOP": 1, "EXIT": 1}
    assert code.issued(passes=10) == 6 + 40
    assert [code.of(unit) for unit in ("SHFL", "FMA", "LDG", "other")] == [1, 1, 0, 2]


def test_code_without_a_loop_counts_as_a_whole():
    code = read_code(SASS.replace("@P1 BRA 0x20", "@P1 BRA 0x60"))
    assert not code.loop
    assert code.of("FMA") == 2
    assert code.issued(passes=1) == 10


def test_registers_are_given_out_by_eights():
    assert resident_warps(128, 1) == 16
    assert resident_warps(129, 1) == 15
    assert resident_warps(32, 1) == 32  # programs
    assert resident_warps(86, 16) == 16


def test_a_single_warp_takes_as_long_as_its_instructions():
    assert issue_seconds(1, 1000, 16, H100) == pytest.approx(6000 / 1.98e9)
    assert issue_seconds(528 * 8, 1000, 32, H100) == pytest.approx(8000 / 1.98e9)


# Programs, instructions of one, registers and bytes of the router's kernels of commit bad0a04 at
# (262144, 64, 2), and what bench.gpu_speed measured of graphs with them: bench/results.
FORWARD = (4096, 277 + 8 * 1145, 164, 3 * 2**26 + 262144 * 32 + 4096 * 64 * 8)
BACKWARD = (32768, 989, 96, 5 * 2**26 + 262144 * 24)
MEASURED = {
    ("H100", "forward"): 119.6e-6, ("H100", "backward"): 121.2e-6,
    ("H200", "forward"): 102.2e-6, ("H200", "backward"): 87.5e-6,
}  # fmt: skip


@pytest.mark.parametrize(("device", "direction"), MEASURED)
def test_the_estimate_was_near_what_was_measured(device, direction):
    programs, issued, registers, moved = FORWARD if direction == "forward" else BACKWARD
    where = {"H100": H100, "H200": H200}[device]
    issue = issue_seconds(programs, issued, resident_warps(registers, 1), where)
    estimate = seconds(issue, moved, where)
    if direction == "forward":  # and the scan, and the plan
        estimate += 2 * issue_slots.LEAST
    assert estimate == pytest.approx(MEASURED[device, direction], rel=0.05)
