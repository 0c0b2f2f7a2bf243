"""What a strategy is asked, and whether a package's answer can be measured."""

from compressor.errors import PluginError
from compressor.plugins import STRATEGIES
from compressor.search.objective import (
    START,
    History,
    Problem,
    Proposal,
    Strategy,
    is_hopeless,
)


def proposed(name: str, strategy: Strategy, problem: Problem, history: History) -> Proposal | None:
    """The next plan: the fastest one where none can meet the limit; None where none is left.

    Args:
        name: Of the strategy, in `plugins.STRATEGIES`.
        strategy: The one of that name.
        problem: What is searched.
        history: What was proposed before.

    Raises:
        PluginError: The strategy is of a package, and failed or proposed what is no new plan.
    """
    if is_hopeless(problem):
        return Proposal(problem.space.narrowest, START)
    with STRATEGIES.running(name):
        proposal = strategy.propose(problem, history)
    if proposal is not None and name not in STRATEGIES.built_in:
        _check_new(STRATEGIES.flag(name), proposal, problem, history)
    return proposal


def _check_new(package: str, proposal: Proposal, problem: Problem, history: History) -> None:
    """Raises `PluginError` where a package proposes what cannot be measured, or was."""
    space, widths = problem.space, getattr(proposal, "widths", None)
    if (
        not isinstance(widths, tuple)
        or len(widths) != len(space.choices)
        or any(w not in choice for w, choice in zip(widths, space.choices, strict=True))
    ):
        raise PluginError(
            f"{package} proposed {widths!r:.200}; expected a number of {space.choices!r:.200} "
            f"for each of {', '.join(space.names)!r:.200}."
        )
    if widths in history.proposed(space) or space.written_once([widths]) != [widths]:
        raise PluginError(f"{package} proposed {widths}, which is no new plan.")
