"""Draw the figures of README and docs: `python docs/make_figures.py <log folder of a repair>`.

The folder is `logs/repair/version_N`, as `lora-lightning repair --baselines true` names it at its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.repair.baselines import Row, tradeoff_figure
from lora_lightning.repair.predictions import Tally
from lora_lightning.report import confusion_figures


def main(folder: Path) -> None:
    """Draw what the adapters changed, and the trade-off with the baselines, from a `repair --baselines true`."""
    if not (folder / "baselines.json").is_file():
        raise SystemExit(f"{folder} has no baselines.json: expected the folder of a repair --baselines true.")
    content = json.loads((folder / "adapted" / "confusion.json").read_text())
    names = tuple(content["class_names"])
    model, base = (Confusion(torch.tensor(content[key]["matrix"]), names) for key in ("model", "base"))
    figure = confusion_figures(Report(content["stage"], model, base))["difference"]
    figure.savefig(Path(__file__).parent / "difference.png", dpi=80)
    content = json.loads((folder / "baselines.json").read_text())
    rows = [
        Row(row["name"], Tally(**row["tally"]), row["parameters"], row["seconds"], row["p"]) for row in content["rows"]
    ]
    curves = {name: [Tally(**tally) for tally in tallies] for name, tallies in content["curves"].items()}
    tradeoff_figure(rows, curves, content["focus"]).savefig(Path(__file__).parent / "tradeoff.png", dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
