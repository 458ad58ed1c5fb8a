"""Runs that would train nothing, as no gradient reaches a weight that is trained."""

from __future__ import annotations

from torch import Tensor, nn


class IdleRun:
    """Check of the first steps of a run.

    Args:
        model: that is trained.
        steps: how many steps with a gradient of zero are taken for a run without any, 1 or more.
    """

    def __init__(self, model: nn.Module, steps: int = 3) -> None:
        self._model, self._left = model, steps

    def add(self, grad_norm: Tensor | None) -> None:
        """Look at a step; after the first with a gradient nothing is looked at any more.

        Args:
            grad_norm: of all weights that are trained; None for a step that was skipped, or where it is not
                known.

        Raises:
            ValueError: after as many steps whose gradient is zero, saying why.
        """
        if self._left <= 0 or grad_norm is None:
            return
        self._left = self._left - 1 if float(grad_norm) == 0 else -1
        if self._left == 0:
            raise ValueError(
                f"the run trains nothing, as the gradient of every trained weight is 0: {self._why()}"
            )

    def _why(self) -> str:
        closed = [
            name
            for name, weight in self._model.named_parameters()
            if not weight.requires_grad and weight.ndim > 1 and not weight.any()
        ]
        if not closed:
            return "the loss does not depend on them; look at the data and the objective"
        more = f" and {len(closed) - 3} more" if len(closed) > 3 else ""
        return (
            f"{', '.join(closed[:3])}{more} start at 0 in a new model and are not trained, and no gradient "
            "passes them. Set trainable to all and lora.rank to 0, or go on from a trained model by "
            "model.init_from"
        )
