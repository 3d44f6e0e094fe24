"""What was weighed at a site, as the evidence tells it."""

from __future__ import annotations

from collections.abc import Sequence

from ccompile.core import Budget, Candidate, Choice, Pass

TOLD = 24  # candidates of a site that the evidence tells
_UNITS = ("stored_bytes", "macs", "params")


def told(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return candidates, cheapest first; of many, the chosen ones and TOLD spread evenly.

    >>> many = [Candidate("split-svd", float(n), 0.0, None, float(-n), n == 5) for n in range(100)]
    >>> [int(one.strength) for one in told(many)][:3], len(told(many)), any(one.chosen for one in told(many))
    ([99, 94, 89], 22, True)
    """
    ordered = sorted(found, key=lambda candidate: candidate.cost)
    step = -(-len(ordered) // TOLD) or 1
    last = len(ordered) - 1
    return tuple(one for index, one in enumerate(ordered) if one.chosen or index % step == 0 or index == last)


def weighed(step: Pass, choices: Sequence[Choice], chosen: Choice | None) -> tuple[Candidate, ...]:
    """Return the choices that a pass had at a site; `chosen` None: what leaves the site as it is, where there is one.

    Their cost is in the measure of the step's budget, else in bytes where the pass stores weights, else in
    multiply-accumulates. Nothing was weighed where there is one choice.
    """
    if len(choices) < 2:
        return ()
    if chosen is not None and chosen not in choices:
        choices = [*choices, chosen]
    unit = _unit(step, choices)
    found = []
    for index, choice in enumerate(choices):
        whole = index == 0 and choice.error == 0
        taken = whole if chosen is None else choice == chosen
        name = "none" if whole else step.pass_name()
        found.append(Candidate(name, choice.strength, choice.error, None, float(getattr(choice, unit)), taken, unit))
    return told(found)


def _unit(step: Pass, choices: Sequence[Choice]) -> str:
    """Return the first measure in which choices differ: that of the step's budget before others."""
    options = (getattr(step, name) for name in type(step).model_fields)
    budgets = [option.given[0][0] for option in options if isinstance(option, Budget)]
    for unit in (*budgets, *_UNITS):
        if len({getattr(choice, unit) for choice in choices}) > 1:
            return unit
    return "params"
