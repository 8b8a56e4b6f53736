"""The command line: one short file per command under ``commands``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from harli.commands import (
    compare,
    doctor,
    estimate,
    policies,
    predictors,
    profile,
    records,
    run,
    serve,
    simulate,
    train_predictor,
)
from harli.commands.interrupt import INTERRUPTED
from harli.types import HarliError

EXIT_CODES = (
    "Exit codes: 0 done; 2 bad input or environment, a dead engine or a policy that fails its check, one line says "
    "what to mend; 130 interrupted by Ctrl-C, what was measured and learned is kept."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA finetuning inside live vLLM decode instances, within the decode latency objective.",
    epilog=EXIT_CODES,
)
app.command("run")(run.run)
app.command("serve", context_settings=serve.UNKNOWN_FLAGS_ARE_VLLMS)(serve.serve)
app.command("profile")(profile.profile)
app.command("train-predictor")(train_predictor.train_predictor)
app.command("predictors")(predictors.predictors)
app.command("compare")(compare.compare)
app.command("simulate")(simulate.simulate)
app.command("estimate")(estimate.estimate)
app.command("runs")(records.runs)
app.command("show")(records.show)
app.command("publish")(records.publish)
app.add_typer(policies.app, name="policies")
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from harli.engine.device import versions

        typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    """Options of ``harli`` itself; its help is the app's."""


def main() -> None:
    """Run the command line. A problem that the user can mend is one line, exit code 2."""
    try:
        app()
    except HarliError as error:
        Console(stderr=True, soft_wrap=True).print(f"harli: {error}", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
