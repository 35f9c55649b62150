"""Each planted fault is found, and named with its instruction; without it, nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from bench.emulated.ptx.memory import Fault

from .assembly import run

# Thread t of 64 (two warps) writes a word of shared memory, and reads the one of thread 63 - t.
EXCHANGE = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    mov.b32 %r4, global_smem;
    sub.u32 %r5, 252, %r3;
    add.u32 %r5, %r5, %r4;
    ld.shared.b32 %r6, [%r5];
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    st.global.b32 [%rd3], %r6;
"""
# Thread t copies word t of the source, rounds of 64 bytes.
COPY = """
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    ld.global.b32 %r3, [%rd3];
    st.global.b32 [%rd4], %r3;
"""
# The same through shared memory, each thread its own word.
ASYNCHRONOUS = """
    shl.b32 %r3, %r1, 2;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    cp.async.ca.shared.global [%r3], [%rd3], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd4], %r4;
"""


def exchange(body: str = EXCHANGE, size: int = 256) -> np.ndarray:
    return run(body, threads=64, shared=size)


def test_an_exchange_with_a_barrier_is_right():
    assert (exchange() == np.arange(64)[::-1]).all()


def test_without_the_barrier_it_is_a_race_between_warps():
    shorter = EXCHANGE.replace("bar.sync 0;", "")
    with pytest.raises(Fault, match=r"ld\.shared.*: race: a warp reads what another one wrote"):
        # All words are written beforehand: this is not the other fault, of nothing written.
        exchange("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; bar.sync 0;" + shorter)


def test_a_write_after_another_warp_s_read_is_a_race():
    with pytest.raises(Fault, match=r"st\.shared\.b32 \[%r3\], %r6: race: a warp writes"):
        exchange(EXCHANGE + "st.shared.b32 [%r3], %r6;")
    exchange(EXCHANGE + "bar.sync 0; st.shared.b32 [%r3], %r6;")


def test_a_write_of_what_several_warps_read_is_a_race():
    body = EXCHANGE + "ld.shared.b32 %r7, [0]; setp.ge.u32 %p1, %r1, {}; @%p1 st.shared.b32 [0], 5;"
    for last_warp_of_both in (32, 0):
        with pytest.raises(Fault, match=r"st\.shared\.b32 \[0\], 5: race: a warp writes"):
            exchange(body.format(last_warp_of_both))


def test_one_warp_s_write_after_another_s_is_a_race():
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 st.shared.b32 [global_smem], 1;
    @!%p1 st.shared.b32 [global_smem], 2;
    """
    with pytest.raises(Fault, match=r"@!%p1 st\.shared.*: race: a warp writes"):
        exchange(body)
    exchange(body.replace("@!%p1", "bar.sync 0; @!%p1"))


def test_warps_that_write_the_same_do_not_race_but_others_do():
    same = "st.shared.b32 [global_smem], 7; "
    assert (exchange(same + "bar.sync 0;" + EXCHANGE) == np.arange(64)[::-1]).all()
    with pytest.raises(Fault, match="threads write different values to one place at once"):
        exchange("st.shared.b32 [global_smem], %r1; bar.sync 0;" + EXCHANGE)


def test_shared_memory_that_nothing_wrote():
    with pytest.raises(Fault, match=r"read of shared memory that nothing wrote, byte 252 "):
        exchange(EXCHANGE.replace("st.shared", "setp.lt.u32 %p1, %r1, 63; @%p1 st.shared"))


def test_shared_memory_out_of_bounds():
    with pytest.raises(Fault, match="shared store out of bounds: 4 bytes at 252 of 252"):
        exchange(size=252)


def test_a_misaligned_access():
    with pytest.raises(Fault, match=r"ld\.global.*: misaligned load of 4 bytes at byte 2"):
        run(COPY.replace("[%rd3]", "[%rd3+2]"), np.zeros(64, np.uint32))
    with pytest.raises(Fault, match="misaligned shared store of 4 bytes at byte 1"):
        exchange(EXCHANGE.replace("[%r3]", "[%r3+1]"), size=512)


@pytest.mark.parametrize("threads", [32, 64])
def test_global_memory_out_of_bounds(threads):
    source, result = np.arange(threads, dtype=np.uint32), np.zeros(threads, np.uint32)
    assert (run(COPY, source, result, threads=threads) == source).all()
    at = 4 * threads - 4
    with pytest.raises(Fault, match=f"store .* 4 bytes at byte {at} of result, which has {at}"):
        run(COPY, source, result[:-1].copy(), threads=threads)
    with pytest.raises(Fault, match=f"load .* 4 bytes at byte {at} of source, which has {at}"):
        run(COPY, source[:-1].copy(), result, threads=threads)


@pytest.mark.parametrize("offset", [-4, 1 << 20, 1 << 38])
def test_running_out_of_one_argument_does_not_reach_the_next(offset):
    far = COPY.replace("ld.global", f"add.s64 %rd3, %rd3, {offset}; ld.global")
    with pytest.raises(Fault, match="load out of bounds"):
        run(far)
    with pytest.raises(Fault, match="in no argument"):
        run(COPY.replace("[%rd3]", "[0]"))


def test_programs_of_their_own_places_do_not_race():
    body = "mad.lo.s32 %r1, %r2, 32, %r1;" + COPY
    source = np.arange(96, dtype=np.uint32)
    assert (run(body, source, np.zeros(96, np.uint32), programs=3) == source).all()


def test_two_programs_that_write_one_place_race():
    with pytest.raises(Fault, match="race between programs: 0 writes what another one writes"):
        run(COPY, programs=3)


def test_programs_that_write_one_place_one_after_the_other_race():
    body = "setp.eq.u32 %p1, %r2, 0; @%p1 st.global.b32 [%rd2], 1; @!%p1 st.global.b32 [%rd2], 1;"
    with pytest.raises(Fault, match="race between programs: 1 writes what another one writes"):
        run(body, programs=2)


@pytest.mark.parametrize("first", ["read", "write"])
def test_a_program_that_reads_what_another_writes_races(first):
    read, write = "ld.global.b32 %r3, [%rd2];", "st.global.b32 [%rd4], %r1;"
    own = "mad.lo.s32 %r5, %r2, 32, %r1; mad.wide.u32 %rd4, %r5, 4, %rd2;"
    with pytest.raises(Fault, match="race between programs: 1 reads what another one writes"):
        run(own + (read + write if first == "read" else write + "bar.sync 0;" + read), programs=2)


def test_warps_race_in_global_memory_too():
    body = EXCHANGE.replace("st.shared.b32 [%r3]", "st.global.b32 [%rd3]").replace(
        "ld.shared.b32 %r6, [%r5]", "ld.global.b32 %r6, [%rd4]"
    )
    own = "mad.wide.u32 %rd3, %r1, 4, %rd2; sub.u32 %r9, 63, %r1; mad.wide.u32 %rd4, %r9, 4, %rd2;"
    assert (exchange(own + body.split("mad.wide")[0]) == np.arange(64)).all()
    with pytest.raises(Fault, match="race: a warp reads what another one wrote"):
        exchange(own + body.split("mad.wide")[0].replace("bar.sync 0;", ""))


def test_a_copy_has_to_be_waited_for():
    source = np.arange(32, dtype=np.uint32)
    assert (run(ASYNCHRONOUS, source, shared=128) == source).all()
    with pytest.raises(Fault, match="read of what an unfinished copy writes"):
        run(ASYNCHRONOUS.replace("wait_group 0", "wait_group 1"), source, shared=128)
    with pytest.raises(Fault, match="write to what an unfinished copy or product uses"):
        run(ASYNCHRONOUS.replace("cp.async.wait", "st.shared.b32 [%r3], 0; cp.async.wait"),
            source, shared=128)  # fmt: skip


def test_a_copy_of_fewer_bytes_fills_up_with_zeros():
    source = np.arange(1, 33, dtype=np.uint32)
    some = "setp.lt.u32 %p1, %r1, 5; selp.b32 %r9, 4, 0, %p1;" + ASYNCHRONOUS
    found = run(some.replace("[%rd3], 4;", "[%rd3], 0x4, %r9;"), source, shared=128)
    assert found.tolist() == [1, 2, 3, 4, 5] + [0] * 27


# Four warps multiply ones, [64, 16] in registers and [16, 8] in shared memory.
PRODUCT = """
    shl.b32 %r3, %r1, 1;
    mov.u16 %rs1, 0x3F80;
    st.shared.b16 [%r3], %rs1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b32 %r4, 0x3F803F80;
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
    mov.b32 %r7, 0;
    mov.b32 %r8, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r5, %r6, %r7, %r8},
        {%r4, %r4, %r4, %r4}, 0x80000, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    st.shared.b16 [%r3], %rs1;
    add.f32 %r5, %r5, %r8;
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    st.global.b32 [%rd3], %r5;
"""


def test_a_product_has_to_be_waited_for():
    def run_product(body: str) -> np.ndarray:
        return run(body, threads=128, shared=256).view(np.float32)

    assert (run_product(PRODUCT) == 32).all()
    with pytest.raises(Fault, match="write to what an unfinished copy or product uses"):
        run_product(PRODUCT.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"))
    with pytest.raises(Fault, match="race: a warp writes what another one used"):
        run_product(PRODUCT.replace("aligned 0;\n    bar.sync 0;", "aligned 0;"))
    with pytest.raises(Fault, match="shared product out of bounds: 2 bytes at 256 of 256"):
        run_product(PRODUCT.replace("0x80000", "0x80008"))


def test_threads_at_different_barriers():
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bra $OTHER;
    bar.sync 0;
    bra.uni $END;
$OTHER:
    bar.sync 0;
$END:
    """
    with pytest.raises(Fault, match="threads of one program wait at different barriers"):
        run(body, threads=64)
    run(body.replace("%r1, 32", "%r2, 1"), programs=2, threads=64)  # programs are free to


COUNT = """
    atom.global.add.u32 %r3, [%rd1], 1;
    mad.lo.s32 %r4, %r2, 32, %r1;
    mad.wide.u32 %rd3, %r4, 4, %rd2;
    st.global.b32 [%rd3], %r3;
"""


def test_programs_may_count_together_but_not_look_at_the_count():
    count = np.zeros(1, np.uint32)
    assert sorted(run(COUNT, count, programs=2)) == list(range(64))
    assert count == 64
    with pytest.raises(Fault, match=r"race between programs: \d reads what another one writes"):
        run(COUNT + "ld.global.b32 %r5, [%rd1];", count, programs=2)
    with pytest.raises(Fault, match=r"race between programs: \d writes what another one writes"):
        run(COUNT + "st.global.b32 [%rd1], 0;", count, programs=2)


def test_atomic_operations_in_shared_memory():
    body = """
    mov.u32 %r3, 7;
    st.shared.b32 [0], %r3;
    bar.sync 0;
    atom.shared.max.u32 %r4, [0], %r1;
    atom.shared.cas.b32 %r5, [0], 31, 99;
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    st.global.b32 [%rd3], %r5;
    """
    assert run(body, shared=16).tolist() == [31] + [99] * 31
    with pytest.raises(Fault, match="nothing wrote"):
        run("atom.shared.add.u32 %r4, [0], %r1;", shared=16)


def test_a_trap():
    with pytest.raises(Fault, match="planted: trap: trap, program 1"):
        run("setp.eq.u32 %p1, %r2, 0; @%p1 bra $END; trap;\n$END:", programs=2)
