"""Draw docs/overview.png from the demo's run: the search's front beside what the detector sees.

make demo && python docs/overview.py runs/shapes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def main(run: Path) -> None:
    records = [json.loads(line) for line in (run / "search" / "evals.jsonl").read_text().splitlines()]
    scored = [record["metrics"] for record in records if record["status"] == "ok"]
    pareto = json.loads((run / "search" / "pareto.json").read_text())
    objective = pareto["objective"]
    front = [member["metrics"] for member in pareto["front"]]
    figure = Figure(figsize=(12, 4.6))
    axis, *places = figure.subplot_mosaic("AAABC\nAAADE").values()
    axis.scatter([m["flops"] / 1e6 for m in scored], [m[objective] for m in scored], s=16, color="C0", alpha=0.5)
    axis.step([m["flops"] / 1e6 for m in front], [m[objective] for m in front], "o-", where="post", color="C3")
    axis.set_xlabel("M multiply-adds")
    axis.set_ylabel(f"{objective} with inherited weights")
    axis.set_title(f"{len(scored)} evaluated sub-networks and the front")
    for place, picture in zip(places, sorted((run / "drawn").glob("*.jpg"))[::2], strict=False):
        place.imshow(Image.open(picture))
        place.set_axis_off()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("overview.png"), dpi=75)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
