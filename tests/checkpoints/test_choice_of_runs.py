"""A log folder stands for the newest run that finished, and what is chosen is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule, RichBoyNet, lora
from lora_lightning.checkpoints import newest_adapter, newest_checkpoint
from lora_lightning.checkpoints.checkpoints import choice_in_words, doubt_about_choice
from lora_lightning.checkpoints.run_record import RunRecord
from lora_lightning.checkpoints.started_from import StartedFrom

MakeTrainer = Callable[..., Trainer]


def a_run(folder: Path, age: int, steps: int | None, *files: str, best: str = "") -> None:
    """A log folder with checkpoints of this age in seconds, which finished unless `steps` is `None`."""
    RunRecord.start(folder, "")
    for place, name in enumerate(files):
        path = folder / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (10_000 - age + place, 10_000 - age + place))
    if steps is not None:
        RunRecord.finish(folder, steps, str(folder / "checkpoints" / best) if best else "")


def test_a_finished_run_is_chosen_before_a_newer_one_that_is_not(tmp_path: Path) -> None:
    a_run(tmp_path / "version_0", 200, 600, "a.ckpt")
    a_run(tmp_path / "version_1", 100, None, "b.ckpt")
    chosen = newest_checkpoint(tmp_path)
    assert chosen == tmp_path / "version_0" / "checkpoints" / "a.ckpt"
    assert "600 steps, 1970-01-01" in choice_in_words(chosen)
    assert f"{tmp_path / 'version_1'} is newer, but did not finish" in doubt_about_choice(tmp_path, chosen)
    assert newest_checkpoint(tmp_path / "version_1").name == "b.ckpt"  # as asked


def test_a_trial_is_chosen_as_the_newest_but_its_few_steps_and_the_longer_run_are_named(tmp_path: Path) -> None:
    a_run(tmp_path / "version_0", 200, 600, "a.ckpt")
    a_run(tmp_path / "version_1", 100, 2, "b.ckpt")
    chosen = newest_checkpoint(tmp_path)
    assert "b.ckpt (2 steps, " in choice_in_words(chosen)
    assert f"{tmp_path / 'version_0'} has 600 steps" in doubt_about_choice(tmp_path, chosen)
    a_run(tmp_path / "version_2", 50, 500, "c.ckpt")
    assert not doubt_about_choice(tmp_path, newest_checkpoint(tmp_path))


def test_the_best_checkpoint_is_chosen_if_a_metric_is_monitored(tmp_path: Path) -> None:
    a_run(tmp_path / "version_0", 100, 600, "best.ckpt", "last.ckpt", best="best.ckpt")
    assert newest_checkpoint(tmp_path).name == "best.ckpt"
    (tmp_path / "version_0" / "checkpoints" / "best.ckpt").unlink()
    assert newest_checkpoint(tmp_path).name == "last.ckpt"


def test_runs_without_a_record_are_chosen_by_age(tmp_path: Path) -> None:
    a_run(tmp_path / "version_0", 200, 600, "a.ckpt")
    (tmp_path / "of_python.ckpt").touch()
    chosen = newest_checkpoint(tmp_path)
    assert chosen.name == "of_python.ckpt"
    assert "steps" not in choice_in_words(chosen)
    assert not doubt_about_choice(tmp_path, chosen)


def test_after_fit_the_log_folder_and_the_adapter_folder_mean_the_same_epoch(
    make_trainer: MakeTrainer,
) -> None:
    # The best accuracy is that of some epoch; the last one is saved later.
    files = ModelCheckpoint(monitor="val/accuracy", mode="min", save_last=True, filename="{epoch}")
    trainer = make_trainer(StartedFrom(), LoRAFinetuning(rank=1), files, max_epochs=3, limit_train_batches=5)
    trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=MNISTDataModule(source="sample"))
    chosen = newest_checkpoint(trainer.log_dir)
    assert chosen == Path(files.best_model_path)
    assert f"({trainer.global_step} steps" in choice_in_words(chosen)

    saved = torch.load(chosen, weights_only=True)["state_dict"]
    written = load_file(newest_adapter(Path(trainer.log_dir)) / "adapter_model.safetensors")
    for layer in ("linear1", "linear2", "linear3"):
        for matrix in ("lora_A", "lora_B"):
            of_checkpoint = saved[f"backbone.{layer}.lora_weight.default.{matrix}"]
            assert torch.equal(written[f"base_model.model.{layer}.{matrix}.weight"], of_checkpoint)


def test_an_interrupted_fit_is_not_recorded_as_finished(make_trainer: MakeTrainer) -> None:
    class Stop(LoRAFinetuning):
        def on_train_epoch_end(self, trainer: Trainer, *args: object) -> None:
            raise RuntimeError("stopped by the test")

    trainer = make_trainer(StartedFrom(), Stop(rank=1), max_epochs=3, limit_train_batches=1)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=MNISTDataModule(source="sample"))
    record = RunRecord.read(Path(trainer.log_dir))
    assert record is not None
    assert (record.steps, record.best) == (None, None)
    assert lora.is_adapted(trainer.lightning_module)
