"""``harli compare --tune``: the search before the comparison, on the terminal."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from rich.console import Console

from harli.commands.train_predictor import OPTUNA_FILE
from harli.commands.work_bar import WorkBar

if TYPE_CHECKING:
    from harli.compare.settings import ComparisonSettings

DEFAULT_TRIALS = 30


def tuned_settings(
    settings: ComparisonSettings, policy: str, trials: int | None, console: Console
) -> ComparisonSettings:
    """``settings`` with the parameters that a search in the simulator finds best for ``policy`` as another entrant.

    Unchanged when nothing beats the defaults. Raises HarliError when there is nothing to search.
    """
    from harli.compare.tune import Search, best

    trials = trials or DEFAULT_TRIALS
    with console.status("simulating decode alone"):
        search = Search(settings, policy)
    done = count(1)
    with WorkBar(console, f"tuning {policy}", trials + 1) as bar:
        tried = search.run(trials, storage=OPTUNA_FILE, on_trial=lambda _: bar.update(next(done)))
    defaults, found = tried[0], best(tried)
    if not found.params:
        console.print(f"no parameters of {policy} beat its defaults in the simulator")
        return settings
    chosen = ", ".join(f"{name}={value}" for name, value in found.params.items())
    console.print(
        f"{policy} with {chosen}: {found.tokens_per_s:,.0f} finetune tokens/s in the simulator, {found.attainment:.1%} "
        f"attained; defaults {defaults.tokens_per_s:,.0f}, {defaults.attainment:.1%}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return settings.model_copy(update={"tuned": {policy: found.params}})
