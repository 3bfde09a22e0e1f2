"""The share of the time of `fit` that `init="eva"` takes.

`python -m tests.benchmarks.eva_cost --steps 1500 --batch 100` trains RichBoyNet with rank 8 on the embedded digits. The
defaults are the settings of `repair`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.callbacks import start_from_data


def main() -> None:
    """Print the seconds of some fits, and of EVA in each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="number of fits")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    seconds: list[float] = []
    compute = start_from_data.eva

    def timed(*arguments: Any) -> Any:
        began = time.process_time()
        found = compute(*arguments)
        seconds.append(time.process_time() - began)
        return found

    start_from_data.eva = timed
    for seed in range(options.seeds):
        seed_everything(seed, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=options.steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[LoRAFinetuning(rank=8, init="eva")],
        )
        began = time.process_time()
        trainer.fit(Classifier(RichBoyNet()), MNISTDataModule(source="sample", batch_size=options.batch))
        whole = time.process_time() - began
        print(f"seed {seed}: fit {whole:.1f} s, of which EVA {seconds[-1]:.2f} s, {seconds[-1] / whole:.1%} (CPU time)")


if __name__ == "__main__":
    main()
