"""``harli policies``: what there is to choose from, and whether a policy keeps the contract."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from harli.commands import flags
from harli.settings_file import override_params
from harli.types import DecodeState, FinetuneState, HarliError, Menu

if TYPE_CHECKING:
    from harli.records.reader import Record
    from policies.trial import States

app = typer.Typer()


@app.callback(invoke_without_command=True)
def policies(context: typer.Context) -> None:
    """List the installed policies with their parameters.

    A policy of your own is used as `--policy path.py:Class`.

    Example: harli policies
    """
    if context.invoked_subcommand:
        return
    from policies.registry import load_policy, names, parameters

    table = Table("policy", "parameters (default)", "what it does", box=None, pad_edge=False)
    for name in names():
        policy = load_policy(name)
        settings = ", ".join(f"{p.name} ({p.default!r})" for p in parameters(policy)) or "-"
        table.add_row(name, settings, (inspect.getdoc(policy) or "").split("\n", 1)[0])
    Console().print(table)


@app.command()
def check(
    policy: Annotated[str, typer.Argument(help="An installed policy, or path.py:Class.")],
    param: flags.Param = None,
    record: Annotated[Path | None, typer.Option(help="Take states, shares and SLO from this record folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random states, and the policy's.")] = 0,
) -> None:
    """Check that a policy keeps the contract, one line per rule; exit code 2 when it does not.

    Example: harli policies check mine.py:Half --param limit=4
    """
    from policies import testing

    settings: dict[str, Any] = {"params": {}}
    override_params(settings, param or [])
    given: dict[str, Any] = {}
    if record is not None:
        from harli.records.reader import read_record

        found = read_record(record)
        given = {"menu": Menu.parse(found.info.menu), "slos": [found.info.slo], "states": _states(found)}
    report = testing.check(policy, settings["params"], seed=seed, **given)
    for result in report.results:
        typer.echo(
            f"{'FAILED' if result.problem else 'ok    '} {result.name}" + _after(result.note) + _after(result.problem)
        )
    if report.failures:
        raise HarliError(f"policy {policy!r} breaks {len(report.failures)} of {len(report.results)} rules; see above")


def _after(text: str) -> str:
    return f": {text}" if text else ""


def _states(record: Record) -> States:
    """Its steps as the policy saw them; that there was a unit to run is assumed, since a record does not say."""
    rows = record.steps.to_pylist()
    if not rows:
        raise HarliError(f"the record {record.folder} has no steps to check a policy on; name another")
    seen = DecodeState.__dataclass_fields__
    return [
        (
            DecodeState(**{name: row[name] for name in seen}),
            FinetuneState(ready=True, microbatch_tokens=row["microbatch_tokens"], kept_layers=row["kept_layers"]),
        )
        for row in rows
    ]
