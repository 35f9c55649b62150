"""Instructions that move data: registers, parameters, memory; and the device's assertions."""

from __future__ import annotations

import numpy as np

from .arithmetic import elementwise
from .decode import Code, Step, at, decodes
from .kinds import KINDS, PRED, U64, Kind
from .memory import Fault
from .parse import Unknown
from .threads import Threads

_CACHING = "nc ca cg cs lu cv volatile relaxed acquire release weak gpu cta sys"


@decodes("mov")
def _mov(code: Code) -> Step:
    kind = code.kind
    if isinstance(code.operands[0], tuple):
        return _unpack(code, kind)
    if isinstance(code.operands[1], tuple):
        return _pack(code, kind)
    return elementwise(code, lambda x: x)


def _unpack(code: Code, kind: Kind) -> Step:
    """mov.b64 {low, high}, source"""
    parts = code.vector(0)
    part = KINDS[f"b{8 * kind.size // len(parts)}"]
    source, targets = code.source(1, kind), [code.target(p, part) for p in parts]

    def run(threads: Threads) -> None:
        bits = np.ascontiguousarray(source(threads)).view(part.unsigned).reshape(-1, len(parts))
        for i, target in enumerate(targets):
            target(threads, np.ascontiguousarray(bits[:, i]))

    return run


def _pack(code: Code, kind: Kind) -> Step:
    """mov.b64 target, {low, high}"""
    parts = code.vector(1)
    part = KINDS[f"b{8 * kind.size // len(parts)}"]
    sources, target = [code.source(p, part) for p in parts], code.target(0, kind)

    def run(threads: Threads) -> None:
        columns = np.broadcast_arrays(*(source(threads) for source in sources))
        target(threads, np.stack(columns, axis=1).view(kind.unsigned).reshape(-1))

    return run


@decodes("cvta", modifiers="to global shared local const")
def _cvta(code: Code) -> Step:
    """Generic addresses are the spaces' own here, which only global memory can do."""
    if "global" not in code.modifiers:
        raise Unknown(code.text)
    return elementwise(code, lambda address: address, U64)


@decodes("createpolicy", modifiers="fractional range")
def _createpolicy(code: Code) -> Step:
    """How long caches keep a line changes no value."""
    target = code.target(0, U64)
    zero = np.zeros(1, np.uint64)
    return lambda threads: target(threads, zero)


def _load_parameter(code: Code) -> Step:
    name, offset = code.operands[1]
    kind, target = code.kind, code.target(0, code.kind)
    if offset:
        raise Unknown(code.text)
    return lambda threads: target(
        threads, kind.values(threads.parameters[name].astype(kind.unsigned))
    )


@decodes("ld", modifiers=f"param global shared shared::cta v2 v4 v8 {_CACHING}")
def _ld(code: Code) -> Step:
    if "param" in code.modifiers:
        return _load_parameter(code)
    kind, parts, (memory_of, address) = code.kind, code.vector(0), code.memory(1)
    targets, size = [code.target(part, kind) for part in parts], kind.size * len(parts)

    def run(threads: Threads) -> None:
        which = threads.which()
        loaded = memory_of(threads).load(at(address(threads), which), size, threads.who())
        bits = loaded.view(kind.unsigned)  # [n, parts]
        for i, target in enumerate(targets):
            column = np.ascontiguousarray(bits[:, i])
            target(threads, kind.values(threads.spread(which, column)))

    return run


@decodes("st", modifiers=f"param global shared shared::cta v2 v4 v8 {_CACHING}")
def _st(code: Code) -> Step:
    if "param" in code.modifiers:
        return _store_parameter(code)
    kind, (memory_of, address) = code.kind, code.memory(0)
    sources = [code.source(part, kind) for part in code.vector(1)]

    def run(threads: Threads) -> None:
        which = threads.which()
        columns = [at(kind.bits(source(threads)), which) for source in sources]
        values = np.stack(columns, axis=1).view(np.uint8)  # [n, size]
        memory_of(threads).store(at(address(threads), which), values, threads.who())

    return run


def _store_parameter(code: Code) -> Step:
    name, offset = code.operands[0]
    if offset:
        raise Unknown(code.text)
    source = code.source(1, code.kind)

    def run(threads: Threads) -> None:
        threads.call_parameters[name] = at(source(threads), threads.which())

    return run


@decodes("call", modifiers="uni")
def _call(code: Code) -> Step:
    if code.operands[0] != "__assertfail":
        raise Unknown(code.text)
    message = code.operands[1][0]

    def run(threads: Threads) -> None:
        address = int(threads.call_parameters[message][0])
        name = next((n for n, a in threads.symbols.items() if a == address), None)
        text = threads.kernel.constants.get(name, b"").rstrip(b"\0").decode()
        raise Fault(f"device assertion: {text}, program {threads.who().program[0]}")

    return run


@decodes("trap")
def _trap(code: Code) -> Step:
    def run(threads: Threads) -> None:
        raise Fault(f"trap, program {threads.who().program[0]}")

    return run


@decodes("cp", modifiers="async ca cg shared.global shared global commit_group wait_group wait_all")
def _cp(code: Code) -> Step:
    """Copies from global to shared memory, which land when their group is waited for."""
    if code.modifiers[0] != "async":
        raise Unknown(code.text)
    if "commit_group" in code.modifiers:
        return lambda threads: threads.copies.commit(threads.which())
    if "wait_group" in code.modifiers:
        newest = int(code.operands[0], 0)
        return lambda threads: threads.copies.wait(threads.which(), newest)
    if "wait_all" in code.modifiers:
        return _wait_all
    return _copy(code)


def _wait_all(threads: Threads) -> None:
    which = threads.which()
    threads.copies.commit(which)
    threads.copies.wait(which, 0)


def _copy(code: Code) -> Step:
    """cp.async [shared], [global], size, how many of the bytes to read; the others become zero."""
    to, origin, size = code.shared_address(0), code.address(1), int(code.operands[2], 0)
    given = code.source(3, U64) if len(code.operands) > 3 else None

    def run(threads: Threads) -> None:
        which, who, shared = threads.which(), threads.who(), threads.shared
        offsets, addresses = at(to(threads), which), at(origin(threads), which)
        read = np.full(len(which), size) if given is None else at(given(threads), which)
        values = np.zeros((len(which), size), np.uint8)
        for length in np.unique(read[read > 0]):
            some = read == length
            loaded = threads.memory.load(addresses[some], int(length), who.some(some))
            values[some, :length] = loaded
        places = shared.places(offsets, size, who, "copy")
        granules = shared.granules(places, size)
        shared.check_idle(places, granules)
        shared.arriving[granules] = True

        def land(done: np.ndarray) -> None:
            shared.arriving[granules[done]] = False
            shared.store(offsets[done], values[done], threads.who(which[done]))

        threads.copies.start(which, land)

    return run


@decodes("membar", "fence", modifiers="proxy async shared::cta global gl cta gpu sys sc acq_rel")
@decodes("griddepcontrol", modifiers="wait launch_dependents")
@decodes("bar", modifiers="warp sync")
@decodes("nanosleep", "discard", "prefetch", modifiers="global")
def _nothing(code: Code) -> Step:
    """Memory is in order here, and warps in lock-step. ``bar`` is bar.warp: others end a block."""
    return lambda threads: None


@decodes("selp")
def _selp(code: Code) -> Step:
    kind = code.kind
    return elementwise(code, lambda yes, no, this: np.where(this, yes, no), kind, kind, PRED)
