"""Distillation of an ensemble into one network (Hinton, Vinyals & Dean, 2015).

    loss = (1 - weight) * task loss(student, y) + weight * distance(student, ensemble; T)

averaged over the batch. What the ensemble of the teachers says and how far from it the student is
at the temperature T, the task knows: for classification, the mean of the teachers' softmax(z / T)
and T^2 KL of it to the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_share, check_temperature
from ..training import Losses, Task
from ..training.objective import batch_mean


class DistillObjective:
    """The student's loss under fine-tuned teachers, for ``Trainer``.

    Args:
        task: what is learned.
        teachers: modules, images [N, 3, S, S] -> outputs [N, C, ...], that get the very images the
            student gets. They are evaluated without gradients, in eval mode, on the images' device
            (they are moved there), and are no part of the model: neither trained nor saved with it.
        temperature: T, above 0.
        weight: of the distillation, in [0, 1]. The paper compared with leaves both open; the
            defaults are our choice.

    Calling it returns ``Losses`` with the parts "task" and "distill", neither weighted.

    Raises:
        ValueError: bad arguments; on a call, an empty batch, teachers whose outputs differ in shape
            from each other's or the student's, or that share parameters with the student.
    """

    def __init__(
        self,
        task: Task,
        teachers: Sequence[nn.Module],
        temperature: float = 2.0,
        weight: float = 0.5,
    ) -> None:
        teachers = list(teachers)
        if not teachers:
            raise ValueError("teachers: expected at least one module, got none")
        check_temperature("temperature", temperature)
        check_share("weight", weight)
        self.task = task
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self.temperature, self.weight = float(temperature), float(weight)

    def __call__(self, model: nn.Module, images: Tensor, targets: Any) -> Losses:
        self._check_apart(model)
        outputs = model(images)
        ensemble = self.ensemble(images)
        if ensemble.shape != outputs.shape:
            raise ValueError(
                f"teachers: expected outputs {list(outputs.shape)} as the student's, got "
                f"{list(ensemble.shape)}; all need the same outputs"
            )
        task = batch_mean(self.task.loss(outputs, targets))
        distill = self.task.distance(outputs, ensemble, self.temperature).mean()
        total = (1 - self.weight) * task + self.weight * distill
        return Losses(total, {"task": task, "distill": distill})

    @torch.no_grad()
    def ensemble(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, C, ...]: what the teachers say together at the temperature."""
        outputs = [teacher.eval().to(images.device)(images) for teacher in self.teachers]
        shapes = [list(output.shape) for output in outputs]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"teachers: expected outputs of one shape, got {', '.join(map(str, shapes))}"
            )
        return self.task.ensemble(torch.stack(outputs), self.temperature)

    def _check_apart(self, model: nn.Module) -> None:
        """A student that was a teacher too would have been frozen, and would learn from itself."""
        own = {id(parameter) for parameter in model.parameters()}
        for i, teacher in enumerate(self.teachers):
            if any(id(parameter) in own for parameter in teacher.parameters()):
                raise ValueError(
                    f"teachers: number {i} shares parameters with the student; give a copy"
                )
