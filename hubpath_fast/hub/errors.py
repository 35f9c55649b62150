"""The one error of this layer: a hub that cannot be built, with all that is wrong with it."""

from __future__ import annotations


class HubError(ValueError):
    """A hub, or the weights of one, cannot be built as asked.

    problems: one message each, so that a user mends a list of names in one go; what is wrong with a
    name that occurs twice is said once.
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = tuple(dict.fromkeys(problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"  {i}. {problem}" for i, problem in enumerate(self.problems, start=1)]
        return "\n".join([f"the hub has {len(self.problems)} problems:", *lines])
