"""How a run is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from harli.records.schema import RunInfo


def run_table(info: RunInfo) -> Table:
    """The numbers that a person looks at first; ``--json`` has all."""
    metrics = info.summary
    title = f"{info.policy} on {info.model} ({info.role}), {info.duration_s:.0f} s, {info.status}"
    title += " (simulated)" if info.simulated else ""
    table = Table(title=title, box=None, show_header=False, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(style="dim")
    table.add_column()

    def number(name: str, digits: int = 1, unit: str = "") -> str:
        value = metrics.get(name)
        return "-" if value is None else f"{value:,.{digits}f}{unit}"

    def attained(name: str, slo_ms: float | None) -> str:
        value = metrics.get(name)
        return "" if slo_ms is None or value is None else f"   {value:.1%} within {slo_ms:g} ms"

    def quantiles(kind: str) -> str:
        return " / ".join(number(f"decode/{kind}_{q}_ms") for q in ("p50", "p90", "p99"))

    requests = f"{number('decode/requests_completed', 0)} completed, {number('decode/requests_failed', 0)} failed"
    table.add_row("requests", f"{requests}, {number('decode/requests_per_s', 2)}/s")
    table.add_row(
        "batch", f"{number('decode/batch_mean')} mean, busy {100 * (metrics.get('decode/busy_fraction') or 0):.0f}%"
    )
    table.add_row("TPOT p50/p90/p99 ms", quantiles("tpot") + attained("slo/tpot_attainment", info.slo.tpot_ms))
    table.add_row("ITL  p50/p90/p99 ms", quantiles("itl") + attained("slo/itl_attainment", info.slo.itl_ms))
    ttft = " / ".join(number(f"decode/ttft_{q}_ms") for q in ("p50", "p99"))
    table.add_row("TTFT p50/p99 ms", f"{ttft}   queue wait p99 {number('decode/queue_wait_p99_ms')}")
    table.add_row("finetune", f"{number('finetune/tokens_per_s')} tokens/s, {number('finetune/updates', 0)} updates")
    if metrics.get("finetune/loss_first") is not None:
        table.add_row("loss", f"{number('finetune/loss_first', 3)} to {number('finetune/loss_last', 3)}")
    if metrics.get("predictor/gap_mape") is not None:
        error, coverage = (100.0 * (metrics.get(f"predictor/{name}") or 0.0) for name in ("gap_mape", "bound_coverage"))
        width = number("predictor/bound_width", 2)
        table.add_row("predictor", f"{error:.1f}% error, bound kept in {coverage:.1f}% of steps, {width} times the gap")
    decision = f"{number('scheduler/decision_p99_us')} us CPU, {number('scheduler/decision_wall_p99_us')} us wall"
    table.add_row("decision p99", f"{decision}; other hooks {number('scheduler/hook_p99_us')} us")
    job = info.finetune
    if job.base_bytes:
        share = f"{job.shared_bytes / 2**20:,.0f} of {job.base_bytes / 2**20:,.0f} MiB"
        table.add_row("base weights", f"{share} shared with decode, not copied")
    if job.samples:
        table.add_row("samples", f"{job.samples:,}, of which {job.truncated:,} cut; {job.dropped:,} left out")
    if job.memory:
        peak, kept, revoked = (job.memory.get(name, 0) for name in ("peak_bytes", "kept", "revoked"))
        lent = f"{number('memory/lent_mean', 2)} of the KV cache lent, {peak / 2**20:,.0f} MiB used at most"
        table.add_row("memory", f"{lent}; {kept} layers kept, {revoked} recalled")
    if job.reason:
        table.add_row("stopped", job.reason)
    return table
