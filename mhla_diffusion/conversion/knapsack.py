"""Multiple-choice knapsack: one form for each layer, of least summed error for every cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

STOCK = "stock"

# Costs and errors are shares; sums in another order differ in their last bits.
_EXACT = 9


@dataclass(frozen=True)
class Choice:
    """Form of each layer.

    Args:
        forms: candidate of each layer, or ``"stock"``.
        cost: of self-attention, as a share of the teacher's.
        error: sum over layers of the errors measured in alignment.
        measured: error of the assembled model's prediction relative to the teacher's, once measured.
    """

    forms: tuple[str, ...]
    cost: float
    error: float
    measured: float | None = None


@dataclass(frozen=True)
class Limits:
    """Errors and costs of each layer by form, the budget, and the layers that stay as they are."""

    errors: Sequence[Mapping[str, float]]
    costs: Sequence[Mapping[str, float]]
    budget: float
    keep: Sequence[int] = ()

    def choice(self, forms: Sequence[str]) -> Choice:
        """Return forms with their cost and summed error."""
        cost, error = (
            sum(table[form] for table, form in zip(tables, forms, strict=True))
            for tables in (self.costs, self.errors)
        )
        return Choice(tuple(forms), cost, error)

    def neighbours(self, choice: Choice) -> Iterator[Choice]:
        """Choices within the budget in which one layer differs, or two that exchange their forms."""
        free = [number for number in range(len(choice.forms)) if number not in self.keep]
        for i in free:
            for form in self.errors[i]:
                yield from self._changed(choice, {i: form})
            for j in free[:i]:
                yield from self._changed(choice, {i: choice.forms[j], j: choice.forms[i]})

    def _changed(self, choice: Choice, changes: Mapping[int, str]) -> Iterator[Choice]:
        forms = [changes.get(number, form) for number, form in enumerate(choice.forms)]
        known = all(form in table for form, table in zip(forms, self.errors, strict=True))
        if (
            known
            and tuple(forms) != choice.forms
            and (found := self.choice(forms)).cost <= self.budget + 1e-9
        ):
            yield found


def frontier(
    errors: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, float]], *, keep: Sequence[int] = ()
) -> list[Choice]:
    """Return the choices that no other beats in both cost and error, the cheapest first.

    It is the exact solution of the multiple-choice knapsack for every budget at once: of all partial choices
    of the first layers only those that are not beaten are gone on with (Nemhauser and Ullmann 1969).

    Args:
        errors: of each layer, by form, the stock form included.
        costs: of each layer, by form.
        keep: layers that stay as they are.
    """
    partial: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    for number, (its_errors, its_costs) in enumerate(zip(errors, costs, strict=True)):
        forms = [STOCK] if number in keep else sorted(its_errors)
        grown = [
            (cost + its_costs[form], error + its_errors[form], (*chosen, form))
            for cost, error, chosen in partial
            for form in forms
        ]
        partial = []
        for state in sorted(grown, key=lambda state: (round(state[0], _EXACT), state[1])):
            if not partial or round(state[1], _EXACT) < round(partial[-1][1], _EXACT):
                partial.append(state)
    return [Choice(chosen, cost, error) for cost, error, chosen in partial]


def require_share(budget: float) -> None:
    """Check that a budget is a share of what the teacher costs.

    Raises:
        ValueError: when it is not above 0 and at most 1, at which no layer need be another.
    """
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget is a share of the teacher's self-attention, above 0 and at most 1, got {budget:g}"
        )


def within(choices: Sequence[Choice], budget: float) -> Choice:
    """Return the choice of least error whose cost is within a budget.

    Raises:
        ValueError: when all cost more, naming the cheapest.
    """
    fitting = [choice for choice in choices if choice.cost <= budget + 1e-9]
    if not fitting:
        cheapest = min(choices, key=lambda choice: choice.cost)
        raise ValueError(
            f"no choice costs {budget:g} or less of the teacher's self-attention; the nearest costs "
            f"{cheapest.cost:.4g}: raise the budget, keep fewer layers, or align cheaper candidates"
        )
    return min(fitting, key=lambda choice: choice.error)
