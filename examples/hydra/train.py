"""LoRA fine-tuning in a project with Hydra: every object comes from the configuration.

python examples/hydra/train.py                              # trains, then tests the best checkpoint
python examples/hydra/train.py callbacks.lora.rank=8        # another rank
python examples/hydra/train.py ckpt_path=path/to/last.ckpt trainer.max_epochs=4   # resumes
"""

from __future__ import annotations

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    """Train and test the model of a configuration."""
    seed_everything(config.seed)  # a resumed run needs the same base, which is made anew if there is no base_checkpoint
    data, model = instantiate(config.data), instantiate(config.model)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    trainer = instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
    trainer.test(model, datamodule=data, ckpt_path=trainer.checkpoint_callback.best_model_path)
    print("Adapter:", callbacks[0].adapter_folder)


if __name__ == "__main__":
    main()
