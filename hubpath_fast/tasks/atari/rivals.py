"""The paper's rivals in reinforcement learning, Zoo-Tuning and Knowledge Flow, as policies.

Both are defined in ``baselines/`` for images; here are the layers that a policy has, and its
losses. The authors' code for reinforcement learning is public of neither in the form that the paper
compared with: what is said to be our choice is a reading of their papers.

Letters: n states, N of a batch, M sources, A actions, Z atoms, L depths.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...baselines.knowledge_flow import LOGIT_TRAVEL, blend, rise_of, start_logits
from ...baselines.zoo_layers import (
    MixedLayer,
    MixedLinear,
    identities,
    joined,
    mean_of_positions,
    mix_linear,
)
from ...baselines.zoo_tuning import mixed_network
from .distribution import categorical_loss
from .network import BODY, HEAD, PatchLinear, RainbowNetwork, check_alike
from .noisy import NoisyLinear
from .policy import PolicyLosses, SinglePolicy


class ZooTuningPolicy(SinglePolicy):
    """One network, each layer of its body mixed from the sources' layers for each state.

    A layer's gate reads the mean of its input over positions; its coefficients, between 0 and 1,
    mix the sources' kernels, mu and sigma of noisy layers alike: see ``MixedPatches`` and
    ``MixedNoisy``. In classification only convolutions are mixed and linear layers averaged; here
    noisy linear layers are 92 % of the body (590,848 of 645,344 parameters), and the average of two
    policies' hidden layers would be neither. That they are mixed, and each with an alignment of its
    output channels, as the convolutions of the paper have it, is our choice: the authors' code for
    reinforcement learning is not public. The head is the first network's.

    Args:
        networks: at least two of one architecture, heads for the game at hand; copied.
        atoms: [Z].

    Raises:
        ValueError: too few networks, or networks that differ.
    """

    def __init__(self, networks: Sequence[RainbowNetwork], atoms: Tensor):
        check_alike(networks, atoms, "Zoo-Tuning", least=2)
        mixed, _ = mixed_network(networks, {PatchLinear: MixedPatches, NoisyLinear: MixedNoisy})
        super().__init__(mixed, atoms)


class MixedPatches(MixedLinear):
    """The convolutions of M networks as one: [n, cells, in] -> [n, cells, out], mixed for each
    state."""

    kind = PatchLinear

    def __init__(self, layers: Sequence[PatchLinear]) -> None:
        super().__init__(layers, align=True)
        self.scale = layers[0].scale

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        return self.kernels * self.scale, self.biases

    def coefficients(self, x: Tensor) -> Tensor:
        return self.gated(mean_of_positions(x) * self.scale)


class MixedNoisy(MixedLayer):
    """The noisy layers of M networks as one: [n, in] -> [n, out], mixed for each state.

        W_n = sum_m a[n, m] T_m (mu_m + sigma_m * noise)      b_n = sum_m a[n, m] (the noisy b_m)

    with one noise for all, [out, in], since it is one layer.
    """

    def __init__(self, layers: Sequence[NoisyLinear]) -> None:
        super().__init__(len(layers), lite=False)
        self.noisy = StackedNoisy(layers)
        like = layers[0].weight_mu
        self.alignment = identities(len(layers), layers[0].out_features, like)
        self.add_gate(layers[0].in_features, like)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.noisy.matrices()
        return mix_linear(x, weight, bias, self.alignment, self.gated(mean_of_positions(x)))


class StackedNoisy(NoisyLinear):
    """Parameters of M equal noisy layers, [M*out, in] and [M*out], under one noise."""

    def __init__(self, layers: Sequence[NoisyLinear]) -> None:
        first = layers[0]
        super().__init__(first.in_features, first.out_features, first.std)
        self.count = len(layers)
        for name, _ in first.named_parameters():
            setattr(self, name, joined([getattr(layer, name) for layer in layers]))
        self.to(first.weight_mu)

    def row_noise(self) -> Tensor:
        return self.noise_out.repeat(self.count)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Noisy in training mode, plain in eval mode."""
        return self.noisy_parameters() if self.training else (self.weight_mu, self.bias_mu)


class KnowledgeFlowPolicy(nn.Module):
    """A student that is helped by frozen teachers, the sources, at each depth of its body.

    In training mode each output of the student's body, after the ReLU, becomes

        w[l, 0] * h + sum_t w[l, 1 + t] * Q[l, t](h_t)

    (``baselines/knowledge_flow.py``, which has the formula of the losses and what is our choice),
    when it acts, too, as in the authors' description; in eval mode the student is alone. The loss
    is

        mean_n weight_n * task_n + dependency * rise * (- sum_l log w[l, 0]) + keep * KL

    with the divergence KL(before the last update || now) of the distributions of all actions, over
    atoms, its mean over actions and states. ``rise`` goes from 0 to 1 over the first half of the
    updates, as ``set_progress`` says.

    Teachers are bodies without heads and noise, and need no gradient. They are in the state dict:
    a run goes on without its sources.

    Args:
        networks: the sources, of one architecture, heads for the game at hand; copied. The student
            starts as the first of them.
        atoms: [Z].
        lr: of the optimizer that trains all parameters alike; see ``PolicyFlow``.
        dependency, keep: weights of the losses; keep=0 saves a forward pass.

    Raises:
        ValueError: no networks, or networks that differ; weights below 0.
    """

    def __init__(
        self, networks: Sequence[RainbowNetwork], atoms: Tensor, lr: float = 1e-4,
        dependency: float = 1.0, keep: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_alike(networks, atoms, "Knowledge Flow", least=1)
        for name, value in (("lr", lr), ("dependency", dependency), ("keep", keep)):
            if not 0 <= value < float("inf") or (name == "lr" and value == 0):
                least = "above" if name == "lr" else "of at least"
                raise ValueError(f"{name}: expected a number {least} 0, got {value}")
        self.num_actions = networks[0].num_actions
        self.lr, self.dependency, self.keep = lr, dependency, keep
        self.register_buffer("atoms", atoms.clone())
        self.teachers = nn.ModuleList(_teacher(network) for network in networks)
        self.flow = PolicyFlow(copy.deepcopy(networks[0]), len(networks))
        self.register_buffer("rise", torch.zeros(()))
        # The flow's parameters before the last update, in a checkpoint as the rest is.
        self.register_buffer("previous", _flat(self.flow))

    @property
    def student(self) -> RainbowNetwork:
        """The student alone."""
        return self.flow.student

    def set_progress(self, step: int, steps: int) -> None:
        """Says that ``step`` of all ``steps`` updates are done."""
        self.rise.copy_(rise_of(torch.tensor(float(step)), steps))
        self.flow.gain.fill_(LOGIT_TRAVEL / (steps * self.lr))

    def forward(self, states: Tensor) -> Tensor:
        if not self.training:
            return self.student(states)
        cells = self.student.cells(states)
        return self.flow(cells, self.teach(cells))

    @torch.no_grad()
    def teach(self, cells: Tensor) -> list[list[Tensor]]:
        """What the teachers make of states as ``student.cells`` gives them: for each depth M
        outputs."""
        taught: list[list[Tensor]] = [[] for _ in BODY]

        def note(depth: int, output: Tensor) -> Tensor:
            taught[depth].append(output)
            return output

        for teacher in self.teachers:
            teacher.body(cells, note)
        return taught

    def losses(
        self, states: Tensor, actions: Tensor, target: Tensor, weights: Tensor
    ) -> PolicyLosses:
        """See ``Policy``. An update follows each call: it takes the present parameters as those
        before it."""
        cells = self.student.cells(states)
        taught = self.teach(cells)
        logits = self.flow(cells, taught)
        task = categorical_loss(logits, actions, target)
        log_own = self.flow.logits().log_softmax(dim=1)[:, 0]
        dependency, keep = -log_own.sum(), logits.new_zeros(())
        if self.keep:
            keep = _divergence(self._before(cells, taught), logits).mean()
            self._remember()
        total = (weights * task).mean() + self.dependency * self.rise * dependency
        terms = {"dependency": dependency, "keep": keep, "own": log_own.mean().exp()}
        terms = {name: value.detach() for name, value in terms.items()}
        return PolicyLosses(total + self.keep * keep, task.detach(), terms)

    @torch.no_grad()
    def _before(self, cells: Tensor, taught: Sequence[Sequence[Tensor]]) -> Tensor:
        """Logits by the parameters before the last update, under the same noise."""
        parameters = dict(self.flow.named_parameters())
        parts = self.previous.split([p.numel() for p in parameters.values()])
        earlier = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        return functional_call(self.flow, earlier, (cells, taught))

    @torch.no_grad()
    def _remember(self) -> None:
        self.previous.copy_(_flat(self.flow))


class PolicyFlow(nn.Module):
    """What learns in Knowledge Flow: the student, the projections Q (channels by channels, the
    identity at first), and the logits of the weights w, [L, 1 + M].

    One optimizer moves all parameters at one rate, at which the logits could not bring the weights
    to the student. ``travel`` [L, 1 + M] is learned in their place:

        logits = start + gain * travel,    the gradient for travel being that of the logits

    which is what a rate of gain * lr for the logits does under Adam, and leaves the norm of the
    gradient, by which it is clipped, alone. ``gain`` = LOGIT_TRAVEL / (steps * lr), as
    ``knowledge_flow_groups`` has it.
    """

    def __init__(self, student: RainbowNetwork, teachers: int) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleList(
            nn.ModuleList(_identity(width) for _ in range(teachers))
            for width in student.widths_of_body()
        ).to(next(student.parameters()))
        start = start_logits(len(BODY), teachers).to(next(student.parameters()))
        self.travel = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start)
        self.register_buffer("gain", torch.ones_like(start[0, 0]))

    def forward(self, cells: Tensor, taught: Sequence[Sequence[Tensor]]) -> Tensor:
        """cells: as of ``student.cells``. taught: for each depth the M outputs of the teachers."""
        weights = self.weights()

        def mix(depth: int, own: Tensor) -> Tensor:
            pairs = zip(self.projections[depth], taught[depth], strict=True)
            return blend(weights[depth], own, (project(output) for project, output in pairs))

        return self.student.head(*self.student.body(cells, mix))

    def logits(self) -> Tensor:
        """[L, 1 + M]."""
        return self.start + self.travel + (self.travel * (self.gain - 1)).detach()

    def weights(self) -> Tensor:
        """[L, 1 + M]: at each depth the weight of the student, then of every teacher."""
        return self.logits().softmax(dim=1)


def _divergence(before: Tensor, now: Tensor) -> Tensor:
    """[N]: KL(before || now) in nats over atoms, the mean over actions, of logits [N, A, Z]."""
    then = before.log_softmax(dim=-1)
    apart = F.kl_div(now.log_softmax(dim=-1), then, reduction="none", log_target=True)
    return apart.sum(dim=-1).mean(dim=-1)


def _teacher(network: RainbowNetwork) -> RainbowNetwork:
    """A copy of the body with the means of its noisy layers; it has no head."""
    teacher = copy.deepcopy(network)
    for name in BODY[2:]:
        noisy = getattr(network, name)
        layer = nn.Linear(noisy.in_features, noisy.out_features).to(noisy.weight_mu)
        layer.weight.data.copy_(noisy.weight_mu)
        layer.bias.data.copy_(noisy.bias_mu)
        setattr(teacher, name, layer)
    for name in HEAD:
        setattr(teacher, name, nn.Identity())
    return teacher.requires_grad_(False)


def _flat(module: nn.Module) -> Tensor:
    """A new tensor of all parameters, one after another."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer
