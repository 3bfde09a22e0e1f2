"""`LoRAFinetuning`: turns any training of a LightningModule into LoRA fine-tuning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpointIO
from lora_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from lora_lightning.callbacks.random_state import RandomState
from lora_lightning.checkpoints import load_base, newest_checkpoint
from lora_lightning.lora import (
    LoRAConfig,
    adapted_layers,
    adapter_parameters,
    attach,
    check_lr_ratio,
    fingerprint,
    holder_of_parameters,
    is_adapted,
    is_fresh,
    lora_plus,
    save_adapter,
    verify,
)
from lora_lightning.lora.config import Initialisation, matches
from lora_lightning.lora.frozen import FrozenStatistics
from lora_lightning.report import free_path

_SEED_OFFSET = 1_000_003


class LoRAFinetuning(RandomState):
    """Freezes a trained model, attaches low-rank adapters before the optimizer exists, and trains those alone.

    Works with any `LightningModule` whose layers exist after construction and whose `configure_optimizers` takes the
    parameters that require gradients, or all of them. Checkpoints hold the adapters, not the base; `ckpt_path` takes
    them. At the end of `fit` the adapters are written to `<log folder>/adapter` in PEFT's format.

    Args:
        rank: See `LoRAConfig`, as for all arguments up to `bypass`.
        alpha: Numerator of the scale; `rank` by default.
        dropout: On the adapters' inputs.
        targets: Which layers.
        exclude: Which of them to leave out.
        rank_pattern: Ranks that differ, by layer.
        alpha_pattern: Alphas that differ, by layer.
        init: How A and B begin: `kaiming`, `gaussian` or `pissa`.
        rslora: Whether to scale by alpha / sqrt(rank).
        dora: Whether to train magnitudes too (DoRA).
        target_parameters: Parameters to adapt by name.
        trainable: Modules trained whole beside the adapters. The new head of an `image_backbone` is added to a list; a regular
            expression has to match it.
        bypass: Sizes of the flattened input and output of an adapter around the whole; alone with `targets=[]`.
        lr_ratio: B's learning rate over A's (LoRA+, https://arxiv.org/abs/2402.12354; about 16 there): every parameter group
            of the optimizer is split in two, and the ratio is kept under any scheduler and after resuming.
        base_checkpoint: Lightning checkpoint of the model that is adapted: a file, or a log folder, whose newest
            checkpoint is taken. `None` adapts the model as it is.

    Raises:
        ValueError: If a value is out of its range; in `setup`, as `attach` does, or if the checkpoint does not fit.
        FileNotFoundError: In `setup`, if there is no such checkpoint.

    Example::

        callback = LoRAFinetuning(rank=1, base_checkpoint="logs/pretrain")
        trainer = Trainer(callbacks=[callback, ConfusionReport()])
        trainer.fit(Classifier(RichBoyNet()), datamodule=MNISTDataModule(focus=[9]))
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | list[str] = "all",
        exclude: str | list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        init: Initialisation = "kaiming",
        rslora: bool = False,
        dora: bool = False,
        target_parameters: str | list[str] | None = None,
        trainable: str | list[str] | None = None,
        bypass: tuple[int, int] | None = None,
        lr_ratio: float = 1.0,
        base_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            exclude=exclude or [],
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
            init=init,
            rslora=rslora,
            dora=dora,
            target_parameters=target_parameters or [],
            trainable=trainable or [],
            bypass=bypass,
        )
        self.lr_ratio = check_lr_ratio(lr_ratio)
        self.base_checkpoint = base_checkpoint
        self.base_path: Path | None = None
        self.base_fingerprint = ""
        self._fingerprint_at_start = ""
        self._call_to_verify: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._listener: RemovableHandle | None = None
        self.adapter_folder: Path | None = None
        self.adapted: nn.Module | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_adapted(pl_module):
            self._adapt(pl_module)
        elif self.adapted is not holder_of_parameters(pl_module):
            raise ValueError(
                f"This {type(pl_module).__name__} came with adapters that this LoRAFinetuning did not attach. Give it the "
                "plain model, or leave the callback out."
            )
        assert self.adapted is not None
        _expect_frozen_layers_in_eval_mode(pl_module)
        if self.lr_ratio != 1 and "configure_optimizers" not in vars(pl_module):
            pl_module.configure_optimizers = partial(  # type: ignore[method-assign]
                _configure_with_lora_plus, pl_module.configure_optimizers, self.adapted, self.lr_ratio
            )
        files = trainer.strategy.checkpoint_io
        if isinstance(files, AdapterCheckpointIO):
            files = files.checkpoint_io
        if not isinstance(files, AtomicCheckpointIO):
            files = AtomicCheckpointIO(files)
        base_path = str(self.base_path) if self.base_path else None
        trainer.strategy.checkpoint_io = AdapterCheckpointIO(
            files, pl_module, self.adapted, self.base_fingerprint, base_path
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop("configure_optimizers", None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.adapted is not None
        self._listener = self.adapted.register_forward_pre_hook(self._remember_call, with_kwargs=True)
        # Not the fingerprint of setup: a precision like bf16-true has converted the base since.
        self._fingerprint_at_start = fingerprint(self.adapted)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Once, on the first batch: checks that no adapter is inert."""
        self._stop_listening()
        if self._call_to_verify is None:
            return
        assert self.adapted is not None
        (inputs, keywords), self._call_to_verify = self._call_to_verify, None
        with trainer.precision_plugin.forward_context():
            verify(self.adapted, *inputs, **keywords)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fresh(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fresh(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fresh(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the base is what it was, and writes the adapter folder."""
        assert self.adapted is not None
        if fingerprint(self.adapted) != self._fingerprint_at_start:
            raise RuntimeError(
                "The frozen base changed during training: its fingerprint is no longer "
                f"{self._fingerprint_at_start[:12]}. Something writes to its parameters or buffers, for example an "
                "optimizer that was given them by another path."
            )
        if trainer.log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
            return
        self.adapter_folder = trainer.strategy.broadcast(free_path(Path(trainer.log_dir) / "adapter"))
        if trainer.is_global_zero:
            save_adapter(self.adapted, self.adapter_folder)
        rank_zero_info(
            f"The base is bitwise unchanged (SHA-256 {self.base_fingerprint[:12]}). Adapter: {self.adapter_folder}"
        )

    def _say_if_fresh(self, trainer: Trainer) -> None:
        assert self.adapted is not None
        if trainer.state.fn != "fit" and is_fresh(self.adapted):
            rank_zero_info("The adapters are as they began, and change nothing: ckpt_path gives them what was trained.")

    def _remember_call(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module.training and self._call_to_verify is None:
            self._call_to_verify = inputs, keywords

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.remove()
            self._listener = None

    def load_base(self, pl_module: LightningModule) -> None:
        """Loads `base_checkpoint`, if there is one, into a model without adapters."""
        if self.base_checkpoint is not None:
            self.base_path = newest_checkpoint(self.base_checkpoint)
            rank_zero_info(f"Base: {self.base_path}")
            load_base(pl_module, self.base_path)

    def _adapt(self, pl_module: LightningModule) -> None:
        self.load_base(pl_module)
        self.adapted = holder_of_parameters(pl_module)
        new_head = vars(self.adapted).get("new_head")
        config = self.config
        if new_head and isinstance(config.trainable, list) and not matches(config.trainable, new_head):
            rank_zero_info(f"{new_head} is a new layer: it is trained whole.")
            config = replace(config, trainable=[*config.trainable, new_head])
        with _own_random_numbers():
            attach(self.adapted, config)
        self.base_fingerprint = fingerprint(self.adapted)
        rank_zero_info(self._what_trains(self.adapted))

    def _what_trains(self, adapted: nn.Module) -> str:
        """One line a layer, and the sum."""
        lines = ["LoRA adapters on:"]
        for name, layer in adapted_layers(adapted).items():
            down, up = (layer.get_parameter(key) for key in (layer.lora_name_A, layer.lora_name_B))
            size = sum(parameter.numel() for parameter in layer.parameters(recurse=False) if parameter.requires_grad)
            lines.append(
                f"  {name or type(adapted).__name__}: {down[0].numel()} -> {len(up)}, rank {layer.lora_rank}, scale "
                f"{layer.lora_scaling:g}, {size:,} parameters"
            )
        lines.append(f"Trained: {self.trained_parameters()}.")
        return "\n".join(lines)

    def trained_parameters(self) -> str:
        """How many parameters train, in words: `6,794 of 2,813,804 parameters, 0.242% of the base`."""
        assert self.adapted is not None, "nothing is attached before setup"
        trained = sum(parameter.numel() for parameter in adapter_parameters(self.adapted))
        total = sum(parameter.numel() for parameter in self.adapted.parameters())
        return f"{trained:,} of {total:,} parameters, {trained / (total - trained):.3%} of the base"


def _expect_frozen_layers_in_eval_mode(pl_module: LightningModule) -> None:
    """Lightning warns of layers in evaluation mode; frozen norm layers are, on purpose."""
    in_eval = [layer for layer in pl_module.modules() if not layer.training]
    if in_eval and all(isinstance(layer, FrozenStatistics) for layer in in_eval):
        warnings.filterwarnings("ignore", message=rf"Found {len(in_eval)} module\(s\) in eval mode at the start")


def _configure_with_lora_plus(configure_optimizers: Callable[[], Any], adapted: nn.Module, lr_ratio: float) -> Any:
    with lora_plus(adapted, lr_ratio):
        return configure_optimizers()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Makes what is drawn a function of the run's seed alone.

    How many random numbers came before depends on the strategy (`ddp` seeds anew), and one device has to get the adapters
    that several get. They must not be the numbers that the base was initialised with either, hence the offset.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed) + _SEED_OFFSET)
        yield
