"""Hub-Pathway itself: generator, routing, experts and aggregator under one ``nn.Module``."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as HF
from .._checks import check_k
from .._onednn import enlarge_primitive_cache
from ..devices import eval_mode
from ..executors import (
    Executor,
    ExecutorReport,
    ModelExecutors,
    ResidentExecutor,
    RowPrecision,
    RowSource,
    check_executor,
    make_executor,
)
from ..executors.groups import expert_name
from ..routing import Routing
from .aggregator import LinearAggregator, SumAggregator, make_aggregator
from .batch_norm import check_batch_norm
from .distributing import Distributing, Placement
from .expert_major import ExpertMajor
from .experts import ChangingExperts
from .fixed_routes import FixedRoutes
from .generator import check_scores
from .inference import Frozen
from .newcomers import NewcomerAggregator, NewcomerGenerator, with_old_weights
from .normalization import read_normalization
from .origin import Origin
from .output import FusedExploit, PathwayOutput
from .parts import are_channels_last, check_modules, infer_num_outputs
from .policy import RoutingPolicy
from .readiness import GettingReady
from .saving import Saving
from .tracing import REFUSAL, refuse_recording


class HubPathway(Distributing, Saving, GettingReady, ChangingExperts, ExpertMajor, nn.Module):
    """Routes each input to K of M experts and combines their weighted outputs (equations 1 to 3).

    ``x -> A(concat_i(w_i * expert_i(x)))``, where a generator gives each input its weights and
    inactive experts never see it.

    Args:
        experts: M modules, x [n, ...] -> [n, C, ...], the same C for all; kept as ``experts``. Each
            gets rows of its own; where all have an attribute ``keeps_input`` that is true, which
            says that they never write to their input, and K = M, they may get x itself.
        generator: a module, x -> (clean [N, M], noise [N, M]); kept as ``generator``. It gets
            uint8 images divided by 255.
        aggregator: a module on the concatenation [N, M*C, ...]; None for
            ``LinearAggregator(M, num_outputs)``, or, where that would have more than 50 M weights
            (M*C*C), ``SumAggregator(M, num_outputs)``; kept as ``aggregator``.
        k: K, active experts per sample, 1..M.
        num_outputs: C, needed by the default aggregator only, which otherwise reads it off the
            experts' last layers.
        min_group: an expert with fewer rows than this in a training step runs its BatchNorm layers
            on running statistics; so a part whose BatchNorm keeps none is refused.
        executor: what runs the experts: "sequential" (one after another), "threads" (concurrent on
            a CPU's threads), "streams" (concurrent on CUDA streams), "graphs" (captured as CUDA
            graphs), or "auto" to let the model choose; on another device than an executor's the
            first call is a ValueError. "resident", with a ``room``: experts rest in files, and are
            in memory while they are used. Or an ``Executor`` of your own, taken as it is.
            ``executor_report()`` says what runs, and why.
        normalization: (mean [M, channels], std [M, channels]) of the images each expert was
            pre-trained on, in units of images in [0, 1]. With it, x is images as uint8 or as floats
            in [0, 1]; without it, every expert gets x as it is.
        renormalize: divide the K weights by their sum (not in the paper).
        room: of executor="resident", what experts may take in memory: bytes such as "8GB", or a
            number of experts as large as the largest; at least K of them.

    ``origin`` says what the experts were made from (see ``Origin``). ``policy``, None at first, may
    be set to a ``RoutingPolicy``, by which predictions in evaluation mode ask fewer experts, and
    then they record no gradients; training never follows it. ``noise_draw``, None at first, says
    how training draws noise where none is given: None from torch's generator, and a
    ``functional.NoiseDraw``, which is to be another at each step, as a function of the samples'
    numbers alone. Making a model sets
    ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` in the environment unless it is set: see
    ``hubpath_fast._onednn``.

    In training mode ``model(x)`` draws noise and returns a ``PathwayOutput``; in evaluation mode
    there is no noise and it returns the prediction [N, C, ...], a plain tensor, which
    ``model.predict(x)`` does in either mode.

    Raises:
        ValueError: k out of range, no experts, an unknown executor, a wrong normalization, a
            BatchNorm without running statistics in any part; a room that K experts do not fit in,
            or experts with state outside their parameters and buffers, which "resident" cannot
            move; in forward: an empty batch, a
            generator of another width, experts that disagree on C, a call that is recorded as a
            fixed graph (``torch.jit.trace`` and the like).
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        generator: nn.Module,
        aggregator: nn.Module | None = None,
        k: int = 2,
        num_outputs: int | None = None,
        min_group: int = 2,
        executor: str | Executor = "auto",
        normalization: tuple[Tensor, Tensor] | None = None,
        renormalize: bool = False,
        room: int | str | None = None,
    ):
        super().__init__()
        enlarge_primitive_cache()
        if len(experts) == 0:
            raise ValueError("experts: the hub is empty; give at least one module")
        check_k(k, len(experts))
        if min_group < 1:
            raise ValueError(f"min_group: expected an integer >= 1, got {min_group}")
        executor = _with_room(executor, room)
        check_modules(experts, generator, aggregator)
        check_batch_norm(
            [
                *((expert_name(experts, i), expert) for i, expert in enumerate(experts)),
                ("generator", generator),
                *([] if aggregator is None else [("aggregator", aggregator)]),
            ]
        )
        if isinstance(executor, ResidentExecutor):
            executor.check(experts, k)
        if aggregator is None:
            num_outputs = infer_num_outputs(experts) if num_outputs is None else num_outputs
            aggregator = make_aggregator("auto", len(experts), num_outputs)
        self.experts = nn.ModuleList(experts)
        self.generator = generator
        self.aggregator = aggregator
        self.k, self.num_outputs, self.min_group = k, num_outputs, min_group
        self.executor, self.renormalize = executor, renormalize
        mean, std = read_normalization(normalization, len(experts))
        self.register_buffer("input_mean", mean)
        self.register_buffer("input_std", std)
        self.origin = Origin.of_modules(experts)
        self.frozen: Frozen | None = None
        self.policy: RoutingPolicy | None = None
        self.noise_draw: HF.NoiseDraw | None = None
        self.placement: Placement | None = None
        self._executors = ModelExecutors()
        self._precision = RowPrecision()
        self._compiled = False

    def forward(
        self,
        x: Tensor,
        eps: Tensor | HF.NoiseDraw | None = None,
        routing: Routing | None = None,
        target: Tensor | None = None,
        label_smoothing: float = 0.0,
        router_temperature: float | None = None,
    ) -> PathwayOutput | Tensor:
        """Predict for x [N, ...].

        Args:
            x: the samples.
            eps: [N, M], or a ``functional.NoiseDraw``: replaces the noise that training draws.
            routing: replaces what ``route`` would say; the generator is not run.
            target: [N, ...] int64 classes, or float class probabilities [N, C, ...], in training
                mode: the exploit loss (cross-entropy) is computed along with the aggregation, so
                that a row's output is read once in backward and its gradient written once (of
                probabilities by torch's implementation, in a pass of its own). A
                ``HubPathwayLoss`` that is called with this very tensor, and has the same label
                smoothing, takes it; any other computes its own.
            label_smoothing: of that loss.
            router_temperature: with a target, the router's loss at this temperature is computed
                along with it, too (see ``functional.router_loss``); None: it is not.
        """
        refuse_recording(x)
        if not self.training:
            return self._predict(x, eps, routing)
        routing = self.route(x, eps) if routing is None else routing
        outputs = self._outputs(x, routing)
        if target is None or self._sums_rows(routing):
            return PathwayOutput(self._aggregate(outputs, routing), outputs, routing)
        asked = {"label_smoothing": label_smoothing, "router_temperature": router_temperature}
        if isinstance(self.aggregator, LinearAggregator):
            weight, bias = self.aggregator.weight, self.aggregator.bias
            prediction, exploit, *router = HF.aggregate_with_exploit_loss(
                outputs, routing, weight, bias, target, **asked
            )
        else:
            concat, exploit, *router = HF.combine_with_exploit_loss(
                outputs, routing, target, **asked
            )
            prediction = self.aggregator(concat)
        output = PathwayOutput(prediction, outputs, routing)
        with_router = (router[0], router_temperature) if router else ()
        output.fused_exploit = FusedExploit(exploit, target, label_smoothing, *with_router)
        return output

    def predict(self, x: Tensor) -> Tensor:
        """The prediction [N, C, ...] for x [N, ...]: no pathway noise, and nothing kept for losses.

        So is ``model(x)`` in evaluation mode. Here every part stays in the mode it is in: an expert
        in training mode draws its own noise (dropout, noisy layers), as a policy does that acts
        while it learns. Gradients are recorded unless the caller turns them off. A ``policy`` is
        followed in evaluation mode, and not in training mode.
        """
        refuse_recording(x)
        if not self.training:
            return self._predict(x)
        routing = self.route(x, noisy=False)
        return self._aggregate(self._outputs(x, routing), routing)

    def _predict(
        self,
        x: Tensor,
        eps: Tensor | HF.NoiseDraw | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """In evaluation mode. With a policy no gradients are recorded: routes are cut there."""
        if self.policy is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x: requires a gradient, which a model with a policy does not give; set "
                "model.policy = None, or detach x"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.policy is None):
            routing = self.route(x, eps) if routing is None else routing
            return self._aggregate(self._outputs(x, routing), routing)

    def _outputs(self, x: Tensor, routing: Routing) -> Tensor:
        """[R, C, ...] of the experts, in row order."""
        source = self._row_source(x, routing)
        outputs = self._executor(x)(self.experts, source, self.min_group)
        return outputs if self.experts_dtype is None else outputs.float()

    def _aggregate(self, outputs: Tensor, routing: Routing) -> Tensor:
        if isinstance(self.aggregator, (LinearAggregator, SumAggregator, NewcomerAggregator)):
            return self.aggregator.from_rows(outputs, routing)
        return self.aggregator(HF.combine(outputs, routing))

    def _sums_rows(self, routing: Routing) -> bool:
        aggregator = self.aggregator
        return isinstance(aggregator, SumAggregator) and aggregator.prefers_rows(routing)

    def route(
        self, x: Tensor, eps: Tensor | HF.NoiseDraw | None = None, noisy: bool | None = None
    ) -> Routing:
        """The routing of x [N, ...]; in evaluation mode by the ``policy``, if there is one.

        Args:
            x: the samples.
            eps: [N, M], the noise; or a ``functional.NoiseDraw``, which says how to draw it.
            noisy: whether to draw noise where none is given, by ``noise_draw``; None: in training
                mode, and not in evaluation mode.
        """
        if len(x) == 0:
            raise ValueError(
                f"x: empty batch, shape {list(x.shape)}; the model needs N >= 1 samples"
            )
        policy = None if self.training else self.policy
        if isinstance(self.generator, FixedRoutes):
            routing = self.generator.routing(x)
            return routing if policy is None else policy.route_fixed(routing, self.k)
        clean, noise = self.scores(x)
        if policy is not None:
            if eps is not None or noisy:
                raise ValueError(
                    "eps: a policy routes without noise; set model.policy = None to draw some"
                )
            return policy.route(clean, noise, self.k, self.renormalize)
        if eps is None and (self.training if noisy is None else noisy):
            eps = "draw" if self.noise_draw is None else self.noise_draw
        routing = HF.noisy_topk(clean, noise, self.k, eps, self.renormalize)
        if eps is None and isinstance(self.generator, NewcomerGenerator):
            old = self.generator.num_old
            return with_old_weights(routing, clean, noise, old, self.renormalize)
        return routing

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(clean [N, M], noise [N, M]): what the generator says of x [N, ...]."""
        clean, noise = self._executor(x).scores(self.generator, self._unit_images(x))
        check_scores(clean, noise, len(x), len(self.experts))
        return clean, noise

    @torch.no_grad()
    def ask_all(self, x: Tensor) -> Tensor:
        """[N, M, C, ...]: what every expert says of every sample of x [N, ...], without routing.

        In evaluation mode whatever the model's, one expert after another unless the model was given
        an executor of its own, and without gradients.
        """
        count = len(self.experts)
        everyone = FixedRoutes(range(count), [1.0] * count, count).routing(x)
        source = self._row_source(x, everyone)
        given = isinstance(self.executor, Executor)
        executor = self.executor if given else make_executor("sequential")
        with eval_mode(self):
            rows = executor(self.experts, source, self.min_group)
        return rows.unflatten(0, (count, len(x))).transpose(0, 1)

    def _unit_images(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            return x
        if self.input_mean is None:
            raise ValueError(
                "x: uint8 images need the experts' normalization=(mean, std); pass it to "
                "HubPathway or give float inputs"
            )
        return x.to(self.input_mean.dtype) / 255

    def executor_report(self) -> ExecutorReport:
        """What runs the experts, why, and what it did so far: text by ``str``, or ``to_dict()``.

        Of what runs training steps, or else predictions; where other batches are run otherwise, a
        note says so. Before the first call: what would run where the model's parameters are now.
        """
        here = (p.device for p in self.parameters() if not p.is_meta)
        device = next(here, torch.device("cpu"))
        return self._executors.report(self.executor, self.experts, self.k, device, self._compiled)

    def warm_up(self, x: Tensor) -> ExecutorReport:
        """Captures at once what later steps with such batches need, so that none of them stalls.

        By itself ``executor="graphs"`` does so in the third step. Call it in the mode that the
        steps will be in, within their autocast: in training mode it is for training steps, in
        evaluation mode under ``torch.no_grad()`` for predictions of the group sizes of this batch.
        In training mode under ``torch.no_grad()`` experts run eagerly: nothing is captured of them.
        No parameter, buffer, gradient or random state changes. Executors other than "graphs" have
        nothing to get ready, and nothing is run.

        Args:
            x: [N, ...], a batch as in training.

        Returns:
            ``executor_report()``.
        """
        refuse_recording(x)
        step = lambda: self._outputs(x, self.route(x))  # noqa: E731
        self._executor(x).warm_up(step, x.device)
        return self.executor_report()

    def __prepare_scriptable__(self):
        raise ValueError(REFUSAL)  # torch.jit.script asks every module of a model, forward or not

    def __getstate__(self):
        return super().__getstate__() | {"_compiled": False}  # modules drop their compiled calls

    def _executor(self, x: Tensor) -> Executor:
        return self._executors(self.executor, self.experts, self.k, x)

    def _row_source(self, x: Tensor, routing: Routing) -> RowSource:
        if self.input_mean is None:
            scale, shift, dtype = None, None, x.dtype
        else:
            full_scale = 1 if x.is_floating_point() else 255
            scale, shift = 1 / (self.input_std * full_scale), -self.input_mean / self.input_std
            dtype = x.dtype if x.is_floating_point() else self.input_mean.dtype
        dtype = self.experts_dtype or self._precision.rows_dtype(self.experts, x, dtype)
        return RowSource(x, routing, scale, shift, dtype, self._rows_format(x), self._precision)

    def _rows_format(self, x: Tensor) -> torch.memory_format:
        """channels_last where the experts' convolutions are, else x's own.

        The gather writes the rows in any case; in the experts' layout they need no copy.
        """
        if x.dim() == 4 and are_channels_last(self.experts):
            return torch.channels_last
        return HF.own_memory_format(x)

    def _restart_executor(self) -> None:
        """An executor may keep things by an expert's number; a copy starts with nothing."""
        self._executors = ModelExecutors()
        self.executor = copy.copy(self.executor)

    def extra_repr(self) -> str:
        return f"k={self.k}, min_group={self.min_group}, executor={self.executor!r}"


def _with_room(executor: str | Executor, room: int | str | None) -> str | Executor:
    """The executor as it is kept. Raises ValueError."""
    if executor == ResidentExecutor.name:
        if room is None:
            raise ValueError(
                "room: executor='resident' needs one: bytes such as '8GB', or a number of experts"
            )
        return ResidentExecutor(room)
    if room is not None:
        raise ValueError(f"room: is of executor='resident', got {room!r} with {executor!r}")
    if not isinstance(executor, Executor):
        check_executor(executor)
    return executor
