"""One HTML page of text, tables and inline SVG that loads nothing, runs no script, and follows light or dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from lib.svg import element


def page(title: str, sections: Sequence[str], refresh_seconds: int | None = None) -> str:
    """The whole page; an open one is loaded anew every `refresh_seconds`."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), "\n", *content)


def note(words: str) -> str:
    return element("p", escape(words), class_="quiet")


def legend(**names: str) -> str:
    """What each class of marks stands for."""
    items = (element("span", element("i", class_=class_), escape(words)) for class_, words in names.items())
    return element("p", *items, class_="legend")


STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --quiet: #5d6875; --page: #fbfbfa; --card: #ffffff; --edge: #dfe3e8;
  --grid: #e9ecef; --blue: #2f6fb2; --red: #c8322b; --grey: #98a2ad; --gold: #d99000; --cold: #eef1f4;
  --k0: #6fb1e0; --k1: #f0a34a; --k2: #b5484d; --k3: #6a4c93; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --quiet: #98a3b0; --page: #14171b; --card: #1b1f25;
  --edge: #2f353d; --grid: #272d34; --blue: #6caae6; --red: #ff6f66; --grey: #77828e; --gold: #f2b632; --cold: #262c33;
  --k0: #5da3d6; --k1: #e3963d; --k2: #cf6067; --k3: #9a7bc7; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 0 0 10px; } h3 { font-size: 15px; margin: 0; }
p { margin: 6px 0; } .quiet { color: var(--quiet); font-size: 14px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 16px; flex: 1 1 150px;
  color: var(--quiet); font-size: 13px; }
.tile span { display: block; }
.tile .value { color: var(--ink); font-size: 23px; font-weight: 600; white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 8px; } .charts svg { flex: 1 1 420px; } .wide { overflow-x: auto; }
.wide svg { min-width: 560px; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; } svg text { fill: var(--ink); }
svg .tick, svg .small { font-size: 11px; fill: var(--quiet); } svg text.on { fill: #fff; font-weight: 600; }
.grid { stroke: var(--grid); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.front { stroke: var(--red); } .line.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.line.history { stroke: var(--blue); stroke-width: 2.5; } .line.control { stroke: var(--gold); }
svg .band { fill: var(--gold); opacity: .18; } svg .each { fill: var(--grey); opacity: .7; }
svg .bred { fill: var(--blue); opacity: .45; } svg .random { fill: none; stroke: var(--grey); }
g.front circle { fill: var(--red); } g.best circle { fill: var(--gold); stroke: var(--red); stroke-width: 2; }
.heat { fill: var(--blue); } .cold { fill: var(--cold); } .closed { fill: none; stroke: var(--edge); }
.absent { stroke: var(--grey); stroke-width: 1.5; stroke-dasharray: 2 3; }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.legend span { margin-right: 18px; font-size: 13px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 6px;
  background: var(--blue); }
.legend .random { background: none; box-shadow: inset 0 0 0 1.5px var(--grey); }
.legend .best { background: var(--gold); box-shadow: inset 0 0 0 2px var(--red); }
.legend .front { background: var(--red); }
.legend .history, .legend .control { height: 3px; width: 18px; vertical-align: middle; }
.legend .control { background: var(--gold); }
.legend .band { background: var(--gold); opacity: .35; border-radius: 2px; }
.legend .each { background: var(--grey); } .legend .bred { opacity: .55; }
.legend .k0, .legend .k1, .legend .k2, .legend .k3 { border-radius: 2px; }
.legend .k0 { background: var(--k0); } .legend .k1 { background: var(--k1); } .legend .k2 { background: var(--k2); }
.legend .k3 { background: var(--k3); }
article { border-top: 1px solid var(--edge); padding: 14px 0 8px; }
.metrics span { display: inline-block; margin-right: 20px; color: var(--quiet); } .metrics strong { color: var(--ink); }
pre { background: var(--cold); border-radius: 6px; padding: 8px 12px; margin: 8px 0; font-size: 12.5px;
  overflow-x: auto; }
table { border-collapse: collapse; margin-top: 10px; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px; border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--quiet); font-weight: 500; }
"""
