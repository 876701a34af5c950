"""``tdeploy bench``: every variant that can serve here, timed side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import clean_errors, decide, policy_options
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.decision import align

if TYPE_CHECKING:
    from mlflow_tdeploy.runtime.bench import BenchRow
    from mlflow_tdeploy.runtime.decision import Decision

#: How bench measures unless it is told otherwise.
_SPLIT = (
    "text batches split as serving splits them; a single batch on the threads of one of those "
    "(serving also tries every core for it, and keeps to what is faster)"
)


@click.command()
@click.argument("uri")
@policy_options
@click.option("--shape", "shapes", multiple=True, help="batch=8,sequence=128; several times. A sweep by default.")
@click.option(
    "--rounds", default=20, show_default=True, type=click.IntRange(min=1), help="Calls of each variant per shape."
)
@click.option(
    "--intra-op-threads", default=0, show_default=True,
    help="Threads inside one operator; 0 is what serving takes.",
)  # fmt: skip
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to this file too."
)
@click.option("--record", is_flag=True, help="Add the figures to the model, so that hosts of this kind rank by them.")
def bench(
    uri: str, variant: str | None, runtime: str | None, strict: bool,
    shapes: tuple[str, ...], rounds: int, intra_op_threads: int, json_path: Path | None, record: bool,
) -> None:  # fmt: skip
    """Time every variant that can serve here, interleaved, over batch and length; inputs from the signature."""
    from mlflow_tdeploy.registry_io import locate, open_records
    from mlflow_tdeploy.runtime.bench import sweep
    from mlflow_tdeploy.runtime.options import SessionOptions

    if record:
        if variant or runtime or strict or shapes or intra_op_threads:
            raise click.UsageError(
                "--record measures every variant, always in the same way: leave the other choices out."
            )
        _record(uri, rounds, json_path)
        return
    with clean_errors():
        bundle, fetch = open_records(locate(uri))
        decision = decide(bundle, variant, runtime, strict)
        if not decision.openable:
            raise decision.none_left()
        rows = sweep(
            bundle, decision.openable, shapes=[_parse_shape(shape) for shape in shapes] or None, rounds=rounds,
            options=SessionOptions(intra_op_threads=intra_op_threads), fetch=fetch,
        )  # fmt: skip
        how = f"as served with intra_op_threads={intra_op_threads}" if intra_op_threads else _SPLIT
        click.echo(f"{decision.host.kind}; ms per call, {how}")
        _show_bench(decision, rows, json_path)


def _record(uri: str, rounds: int, json_path: Path | None) -> None:
    from mlflow_tdeploy.flavor.measure import record_latency

    with clean_errors():
        decision, rows = record_latency(uri, rounds=rounds)
        click.echo(f"{decision.host.kind}; ms per call, {_SPLIT}; recorded with the model")
        _show_bench(decision, rows, json_path)


def _show_bench(decision: Decision, rows: list[BenchRow], json_path: Path | None) -> None:
    click.echo(_bench_table(rows))
    if json_path:
        document = {"host": decision.host.kind, "rows": [row.as_dict() for row in rows]}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _bench_table(rows: list[BenchRow]) -> str:
    table: list[tuple[str, ...]] = [
        ("shape", "variant", "runtime", "mean", "std", "min", "max", "p50", "p95", "p99", "items/s")
    ]
    for row in rows:
        t = row.timing
        figures = (t.mean_ms, t.std_ms, t.min_ms, t.max_ms, t.p50_ms, t.p95_ms, t.p99_ms)
        shape = ",".join(f"{name}={size}" for name, size in row.shape.items())
        table.append((shape, row.variant, row.runtime, *(f"{x:.2f}" for x in figures), f"{row.throughput:.0f}"))
    return align(table)


def _parse_shape(text: str) -> dict[str, int]:
    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InvalidInputError(f"Cannot read the shape {text!r}. Write it like batch=8,sequence=128.") from None
