"""Runs the benchmarks, prints their tables and writes them as JSON.

LORA_LIGHTNING_DATA=<folder that holds MNIST/raw> python -m tests.benchmarks [lora_step] [networks] [idle]
[seed_protocol] [memory] [architectures] [continual] [layers] [language_model] [report_cost] [report_pass]
[report_memory] [hooks] [loops] [callback_cost] [start_end] [text_step]
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich import get_console

from tests.benchmarks import (
    architectures,
    callback_cost,
    continual,
    hooks,
    language_model,
    layers,
    loops,
    lora_step,
    networks,
    report_cost,
    report_memory,
    seed_protocol,
    start_end,
    text_step,
    vgg19,
)

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "lora_step": lora_step.run,
    "networks": lambda: networks.run("networks"),
    "idle": lambda: networks.run("idle"),
    "seed_protocol": lambda: seed_protocol.run(Path(os.environ.get("LORA_LIGHTNING_DATA", "data")).resolve()),
    "continual": continual.run,
    "memory": vgg19.run_memory,
    "architectures": architectures.run,
    "layers": layers.run,
    "language_model": language_model.run,
    "report_cost": report_cost.run,
    "report_pass": report_cost.run_pass,
    "report_memory": report_memory.run,
    "hooks": hooks.run,
    "loops": loops.run,
    "callback_cost": callback_cost.run,
    "start_end": start_end.run,
    "text_step": text_step.run,
}


def main() -> None:
    """Runs those named on the command line, or all."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    for name in wanted:
        if name not in BENCHMARKS:
            sys.exit(f"{name!r} is no benchmark; expected one of {', '.join(BENCHMARKS)}.")
    RESULTS.mkdir(exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
    for name in wanted:
        table, numbers = BENCHMARKS[name]()
        get_console().print(table)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"machine": machine, "results": numbers}, indent=1) + "\n")
        get_console().print(f"Written to {path}")


if __name__ == "__main__":
    main()
