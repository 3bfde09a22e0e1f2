"""Saves and loads checkpoints that contain adapters without their base, through Lightning's CheckpointIO."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from typing_extensions import override

from lora_lightning.checkpoints.checkpoints import ADAPTER_KEY
from lora_lightning.checkpoints.packed_layers import packed_keys
from lora_lightning.lora import AdaptedWeight, adapted_weights, adapter_names, is_adapted
from lora_lightning.lora.fingerprint import digests
from lora_lightning.lora.merged_state import base_weights, merged_weights, require_mergeable
from lora_lightning.lora.record import active_names, config_of, trained_names
from lora_lightning.lora.sharding import local
from lora_lightning.lora.state import adapter_keys, saved_keys
from lora_lightning.wording import some_of

_LEFT_OUT = "left_out"
"""Entry of the description with trained tensors that the model's own code has removed from its state."""
_ADAPTERS, _BASE = "adapter_state", "base_weights"
"""Entries of the description of a full checkpoint."""
_WITHOUT_FILE = "the model as it was created"
_STATES = ("state_dict", "current_model_state", "average_model_state")
"""Entries that hold the model's state.

`WeightAveraging` saves the averaged state under the first key and the current one under the second.
`StochasticWeightAveraging` saves the averaged state under the third key, among the states of callbacks.
"""


class NotFiniteError(RuntimeError):
    """Raised if adapters contain NaN or infinity, from which training cannot recover."""


class CheckpointListener(Protocol):
    """Is told which checkpoints are saved and removed."""

    def saved(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Take note of a checkpoint that is about to be saved with this state of the model."""

    def removed(self, path: str) -> None:
        """Take note of a checkpoint that was removed."""


class AdapterContent:
    """Determines the content of a checkpoint of adapters: the part of the model's state, and a description.

    The entry `lora_lightning` contains the configuration and the scales of the adapters, the SHA-256 fingerprint of the
    base, and the path of the base as a hint.

    Args:
        pl_module: The adapted model.
        adapted: The part of the model that `attach` was called with.
        base_fingerprint: The `base_fingerprint` of this part.
        base_path: The file of the base, if any.
        updated: Names of the tensors of the base that the user's code has updated. Later ones are added.
        is_full: Whether the state of the model in a checkpoint is that of the plain, merged model, for libraries that
            read checkpoints themselves. The adapters, and the adapted weights of the base unless it has a file, are
            then in the description.

    Attributes:
        at_start: Digests of the tensors of the base that the user's code may update, at the start of training.
    """

    def __init__(
        self,
        pl_module: LightningModule,
        adapted: nn.Module,
        base_fingerprint: str,
        base_path: str | None,
        updated: set[str],
        is_full: bool = False,
    ) -> None:
        if is_full:
            require_mergeable(adapted)
        self.is_full = is_full
        self.pl_module = pl_module
        self.adapted = adapted
        self.base_fingerprint = base_fingerprint
        self.base_path = base_path
        self.updated = updated
        self.at_start: dict[str, str] = {}

    def applies(self, strategy: Strategy) -> bool:
        """Return whether the adapters are still attached, and the trainer of `strategy` still has this model."""
        return is_adapted(self.adapted) and strategy.lightning_module is self.pl_module

    def description(self) -> dict[str, Any]:
        """Return the entry `lora_lightning`."""
        return {
            "configs": {name: asdict(config_of(self.adapted, name)) for name in adapter_names(self.adapted)},
            "adapters": self._adapters(),
            "active": active_names(self.adapted),
            "trained": trained_names(self.adapted),
            "part": self.part(),
            "base_fingerprint": self.base_fingerprint,
            "base_path": self.base_path,
        }

    def check(self, path: object, description: dict[str, Any] | None) -> None:
        """Compare the description in a checkpoint with the model.

        Raises:
            ValueError: If the checkpoint has none, has other adapters, or adapters of another base.
        """
        if description is None:
            raise ValueError(
                f"{path} is a full checkpoint, but with LoRAFinetuning, ckpt_path is a checkpoint of adapters. Pass "
                "this one as base_checkpoint of LoRAFinetuning."
            )
        saved, attached = description["adapters"], self._adapters()
        if saved != attached:
            raise ValueError(
                f"{path} contains adapters that differ from those of the model. In the checkpoint: {_summary(saved)}; "
                f"attached: {_summary(attached)}. Configure LoRAFinetuning with the rank, alpha, targets and variant "
                "of the checkpoint."
            )
        if description["base_fingerprint"] != self.base_fingerprint and _BASE not in description:
            trained_on = description["base_path"]
            advice = (
                "Set base_checkpoint of LoRAFinetuning to the first one."
                if trained_on
                else "Create the model with the same weights as in the training, for example with the same seed, "
                "without base_checkpoint."
            )
            raise ValueError(
                f"{path} contains adapters of another base: they were trained on {trained_on or _WITHOUT_FILE} "
                f"(fingerprint {description['base_fingerprint'][:12]}), but the base of the model is "
                f"{self.base_path or _WITHOUT_FILE} ({self.base_fingerprint[:12]}). {advice}"
            )

    def part(self) -> str:
        """Return the name of the adapted part of the model, `""` for the model itself."""
        found: str = next(name for name, module in self.pl_module.named_modules() if module is self.adapted)
        return found

    def trained_keys(self) -> set[str]:
        """Return the names of the tensors of adapters and of modules that are trained in full."""
        return adapter_keys(self.pl_module) | saved_keys(self.pl_module)

    def merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of the plain, merged model for a state of the adapted one."""
        start, adapters = f"{self.part()}.".lstrip("."), adapter_keys(self.pl_module)
        values = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        weights = {start + key: value for key, value in merged_weights(self.adapted, values).items()}
        return {key: weights.get(key, value) for key, value in state.items() if key not in adapters}

    def separate(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the entries of the description with what is not in the state of the plain, merged model."""
        start, adapters = f"{self.part()}.".lstrip("."), adapter_keys(self.pl_module)
        # A bias that is trained in full is merged with those of adapters.
        merged = {start + key for key in base_weights(self.adapted)} & saved_keys(self.pl_module)
        found: dict[str, Any] = {_ADAPTERS: {key: value for key, value in state.items() if key in adapters | merged}}
        if self.base_path is None:
            found[_BASE] = {start + key: value for key, value in base_weights(self.adapted).items()}
        return found

    def left_out(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained tensors that are missing in a state of the model, since its own code filters it."""
        missing = self.trained_keys() - state.keys()
        own = nn.Module.state_dict(self.pl_module) if missing else {}
        return {key: own[key] for key in missing}

    def base_keys(self) -> set[str]:
        """Return the names of the parameters and buffers of the frozen base, which checkpoints omit.

        Checkpoints include trained parameters, buffers outside the adapted part, and tensors inside it that the user's
        code has updated.
        """
        prefix = self.part()
        frozen = {
            name
            for name, parameter in self.pl_module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        }
        now = digests(self.adapted, only=self.at_start)
        self.updated |= {
            f"{prefix}.{key}".lstrip(".") for key, digest in self.at_start.items() if now.get(key) != digest
        }
        buffers = {name for name, _ in self.adapted.named_buffers(prefix=prefix, remove_duplicate=False)}
        return (frozen | buffers | packed_keys(self.pl_module)) - self.trained_keys() - self.updated

    def base_of(self, description: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the adapted weights of the base for a full checkpoint: those in it, or else those of the model."""
        if _BASE in description:
            self.base_fingerprint = description["base_fingerprint"]
            found: dict[str, Tensor] = description[_BASE]
            return found
        start = f"{self.part()}.".lstrip(".")
        return {start + key: value for key, value in base_weights(self.adapted).items()}

    def keep(self, keys: Iterable[str]) -> None:
        """Include these tensors of the base in checkpoints, since a checkpoint that was loaded includes them."""
        self.updated |= self.base_keys().intersection(keys)

    def _adapters(self) -> dict[str, str]:
        """Describe each adapter by name, for example `rank 1, scale 1`, and the modules that are trained in full.

        They have their name in brackets, but for active ones of a single name.
        """
        active, names = active_names(self.adapted), adapter_names(self.adapted)
        described = {
            (weight.name if [name] == active else f"{weight.name} ({name})"): _describe(weight, active)
            for name in names
            for weight in adapted_weights(self.pl_module, name)
        }
        in_full = {key.rpartition(".")[0] for key in saved_keys(self.pl_module)}
        return described | dict.fromkeys(sorted(in_full), "trained in full")


class AdapterCheckpointIO(CheckpointIO):
    """Omits the frozen base when saving a checkpoint, and takes it from the model when loading one.

    This applies everywhere in Lightning: `ModelCheckpoint` in all modes, `save_weights_only`,
    `Trainer.save_checkpoint`, and `ckpt_path` in `fit`, `validate`, `test` and `predict`, including strict loading.
    After the adapters are merged or detached, or if the trainer has another model, checkpoints are passed on unchanged.

    A checkpoint with another base or other adapters is refused.

    Args:
        checkpoint_io: The CheckpointIO that reads and writes the files.
        strategy: The strategy, which knows the model of the trainer.
        content: The content of a checkpoint of the adapted model.
        listener: Is told which checkpoints are saved and removed.

    Attributes:
        closed: Whether saving and removing are disabled because the adapters are not finite.
    """

    def __init__(
        self, checkpoint_io: CheckpointIO, strategy: Strategy, content: AdapterContent, listener: CheckpointListener
    ) -> None:
        super().__init__()
        self.listener = listener
        self.checkpoint_io = checkpoint_io
        self.strategy = strategy
        self.content = content
        self.closed = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if self.closed:
            return
        # A strategy that starts processes also uses this method to return the bare state dict to the main process.
        if "state_dict" not in checkpoint or not self.content.applies(self.strategy):
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        if names := not_finite(checkpoint["state_dict"], self.content.trained_keys()):
            raise NotFiniteError(not_written(path, names))
        self.listener.saved(str(path), checkpoint["state_dict"])
        base_keys = self.content.base_keys()

        def without_base(state: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in state.items() if key not in base_keys}

        state = checkpoint["state_dict"]
        description = self.content.description() | {_LEFT_OUT: self.content.left_out(state)}
        content = {**_with_states(checkpoint, without_base), ADAPTER_KEY: description}
        if self.content.is_full:
            content["state_dict"] = self.content.merged(state)
            description.update(self.content.separate(state))
        self.checkpoint_io.save_checkpoint(content, path, storage_options)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        if "state_dict" not in checkpoint or not self.content.applies(self.strategy):
            return checkpoint
        self.content.check(path, checkpoint.get(ADAPTER_KEY))
        description = checkpoint[ADAPTER_KEY]
        if _ADAPTERS in description:  # the state is that of the plain, merged model
            checkpoint["state_dict"] |= self.content.base_of(description) | description[_ADAPTERS]
        else:
            self.content.keep(checkpoint["state_dict"])
        live = self.content.pl_module.state_dict()
        filled_in = self.content.base_keys() - packed_keys(self.content.pl_module)
        base = {key: live[key] for key in filled_in if key in live}
        left_out = description.get(_LEFT_OUT, {})
        return _with_states(checkpoint, lambda state: {**base, **left_out, **state})

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        if not self.closed:
            self.checkpoint_io.remove_checkpoint(path)
            self.listener.removed(str(path))

    @override
    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def _with_states(checkpoint: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply `change` to each state of the model in a checkpoint, including those in the states of callbacks."""
    changed = {name: change(checkpoint[name]) for name in _STATES if isinstance(checkpoint.get(name), dict)}
    if isinstance(callbacks := checkpoint.get("callbacks"), dict):
        changed["callbacks"] = {
            name: _with_states(state, change) if isinstance(state, dict) else state for name, state in callbacks.items()
        }
    return {**checkpoint, **changed}


def not_finite(state: Mapping[str, Tensor], trained: Container[str]) -> list[str]:
    """Return the keys of trained tensors that contain NaN or infinity, in this process's part of sharded ones."""
    return [key for key, value in state.items() if key in trained and not bool(local(value).isfinite().all())]


def not_written(path: object, names: list[str]) -> str:
    """Return the error message for a checkpoint whose adapters of these names are not finite."""
    return (
        f"{path} is not written: {some_of(map(repr, names))} contain NaN or infinity. Checkpoints that were written "
        "before are kept. Lower the learning rate, or clip gradients with gradient_clip_val."
    )


def _describe(weight: AdaptedWeight, active: list[str]) -> str:
    words = weight.adapter.in_words()
    if len(active) > 1 and not weight.is_trained:
        return f"{words}, {'frozen' if weight.adapter_name in active else 'inactive'}"
    return words


def _summary(adapters: dict[str, str]) -> str:
    """Return a description of the adapters: `linear1 (rank 1, scale 1), ...`."""
    return ", ".join(f"{name} ({what})" for name, what in adapters.items())
