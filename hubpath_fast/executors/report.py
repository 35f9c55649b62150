"""What an executor says of itself: which one runs, why, and what it has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Counters:
    """What an executor counts while it runs.

    steps: calls. hits: groups run by a captured graph, or whose expert was in memory. misses:
    groups run eagerly although graphs are in use, or whose expert was read in. room: bytes that
    experts may take in memory; 0: they are all there. bytes_in: of experts that were read in;
    bytes_out: of those that left. seconds_waited: for experts to be read in. seconds_copying: of a
    device, to it; seconds_running: of a device, on all groups. captured: expert ->
    group sizes with a graph for forward and backward;
    captured_predictions: for predictions. replayed_rows: that experts' graphs were run with;
    padded_rows: of these, those that only filled a graph's size. memory: bytes that the graphs
    hold. exact: expert -> why its groups are not padded in training. eager: expert -> why it is
    never captured. notes: what else happened.
    """

    steps: int = 0
    hits: int = 0
    misses: int = 0
    room: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds_waited: float = 0.0
    seconds_copying: float = 0.0
    seconds_running: float = 0.0
    captured: dict[int, list[int]] = field(default_factory=dict)
    captured_predictions: dict[int, list[int]] = field(default_factory=dict)
    replayed_rows: int = 0
    padded_rows: int = 0
    memory: int = 0
    exact: dict[int, str] = field(default_factory=dict)
    eager: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class ExecutorReport(Counters):
    """The executor of a model. ``str(report)`` is the text, ``report.to_dict()`` plain values.

    asked: the ``executor=`` of the model. executor: the one that runs. reasons: why that one.
    host_reads_per_step: of the counts, by the executor; None before the first step. compiled:
    whether ``torch.compile`` was applied to the experts. The rest: what was counted so far.
    """

    asked: str
    executor: str
    reasons: tuple[str, ...]
    host_reads_per_step: float | None
    compiled: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"reasons": list(self.reasons), "notes": list(self.notes)}

    @property
    def room_text(self) -> str:
        """What came into the room that experts share, and went."""
        copies = ""
        if self.seconds_running:
            share = self.seconds_copying / self.seconds_running
            copies = (
                f"; copies to the device took {self.seconds_copying:.3g} s, {share:.1%} of the "
                f"{self.seconds_running:.3g} s of its experts"
            )
        return (
            f"room for {self.room:,} bytes: {self.hits} groups found their expert in memory, "
            f"{self.misses} did not; {self.bytes_in:,} bytes came, {self.bytes_out:,} left, "
            f"{self.seconds_waited:.3g} s waited{copies}"
        )

    def __str__(self) -> str:
        asked = "" if self.asked == self.executor else f" (asked for: {self.asked})"
        lines = [f"executor: {self.executor}{asked}", *(f"  because {r}" for r in self.reasons)]
        reads = self.host_reads_per_step
        lines.append(
            f"  {self.steps} steps" + ("" if reads is None else f", {reads:g} host reads per step")
        )
        if self.compiled:
            lines.append("  experts compiled by torch.compile, with dynamic batch")
        if self.room:
            lines.append(f"  {self.room_text}")
        elif self.hits or self.misses:
            lines.append(
                f"  graphs: {self.hits} groups replayed, {self.misses} run eagerly, "
                f"{self.memory / 2**20:.1f} MiB held"
            )
        if self.replayed_rows:
            share = self.padded_rows / self.replayed_rows
            lines.append(f"  {share:.1%} of replayed rows were padding")
        captured = {"training": self.captured, "predictions": self.captured_predictions}
        for use, sizes in captured.items():
            lines += [f"  experts[{i}]: {use} at sizes {s}" for i, s in sizes.items()]
        lines += [f"  experts[{i}]: exact sizes, since {why}" for i, why in self.exact.items()]
        lines += [f"  experts[{i}]: eager, {why}" for i, why in self.eager.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
