"""The status page: what should answer, what does, and what was done about it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mlflow_tdeploy.promotion.history import Event
from mlflow_tdeploy.promotion.status import Standing
from mlflow_tdeploy.promotion.watch import View

#: Files that the page takes, by name, with their kinds.
FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_GOOD = ("in sync", "deployed", "rolled back")


def content(name: str) -> bytes:
    """Return one of :data:`FILES`."""
    return (Path(__file__).parent / name).read_bytes()


def render(view: View) -> str:
    """Return the page; whatever comes from registry and servers is text in it, and nothing else."""
    drift = [one for one in view.standings if not one.right]
    told = f"{len(drift)} of {len(view.standings)} not as the registry says" if drift else "all as the registry says"
    state = f'<strong id="state" class="{"bad" if drift else "good"}">{told}</strong>'
    if view.error:
        state = '<strong id="state" class="bad">nothing can be compared; below is what was seen last</strong>'
    elif not view.at:
        state = '<strong id="state">nothing was seen yet</strong>'
    error = f'<p class="error">{escape(view.error)}</p>' if view.error else ""
    seen = f"{escape(view.at[:19].replace('T', ' '))} UTC, look {view.looks}, {view.seconds:.2f} s"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tdeploy</title>'
        '<noscript><meta http-equiv="refresh" content="5"></noscript>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="page.css">'
        '<script src="page.js" defer></script></head><body><h1>tdeploy watch</h1><main>'
        f"<p>{state} <span class=why>({seen})</span></p>{error}{_standings(view.standings)}{_actions(view.actions)}"
        "</main></body></html>"
    )


def _standings(standings: Sequence[Standing]) -> str:
    rows = "".join(
        f"<tr>{_cell(one.state, _kind(one.state, bad=not one.right))}{_cell(one.target)}"
        f"{_cell(one.name)}{_cell(one.server)}"
        f"{_cell(one.wants or '-')}{_cell(one.serves or '-')}{_cell(one.variant)}"
        f"<td>{escape(_time(one.since))}<div class=why>{escape(one.by)}</div></td>"
        f"<td class=why>{escape(one.why)}</td></tr>"
        for one in standings
    )
    head = _head("state", "target", "name", "server", "wants", "serves", "variant", "since", "why")
    return f'<h2>Versions</h2><table id="versions">{head}{rows}</table>'


def _actions(actions: Sequence[Event]) -> str:
    rows = "".join(
        f"<tr>{_cell(_time(one.at))}{_cell(one.decision, _kind(one.decision))}{_cell(one.target)}{_cell(one.name)}"
        f"{_cell(_versions(one))}{_cell(f'{one.seconds:.1f} s')}"
        f"<td class=why>{escape(one.why)}</td></tr>"
        for one in actions
    )
    head = _head("at (UTC)", "decision", "target", "name", "version", "took", "why")
    return f'<h2>Last actions</h2><table id="actions">{head}{rows or "<tr><td colspan=7>none yet</td></tr>"}</table>'


def _versions(one: Event) -> str:
    return f"{one.before or 'none'} → {one.version}"


def _head(*names: str) -> str:
    return f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>"


def _cell(value: object, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(str(value))}</td>'


def _kind(state: str, *, bad: bool = True) -> str:
    return "good" if state in _GOOD else "bad" if bad else ""


def _time(at: str) -> str:
    return at[:19].replace("T", " ")
