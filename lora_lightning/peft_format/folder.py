"""Saves and loads adapters in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.checkpoints import newest_adapter
from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_names,
    is_adapted,
    set_adapter,
)
from lora_lightning.lora.adaptation import attach_to
from lora_lightning.lora.adapter import layers_of
from lora_lightning.lora.bypass import bypass_target
from lora_lightning.lora.fingerprint import BaseDigests
from lora_lightning.lora.matching import Names
from lora_lightning.lora.modules_to_save import alone
from lora_lightning.lora.record import (
    active_names,
    attachment_of,
    config_of,
    record_of,
    require_active_names,
    trained_names,
    unwrapped,
)
from lora_lightning.lora.selection import bias_keys, candidates, check
from lora_lightning.lora.state import adapter_keys, with_values
from lora_lightning.lora.targets import Target
from lora_lightning.peft_format.base_check import base_metadata, base_of, check_base
from lora_lightning.peft_format.by_name import by_name_from_peft
from lora_lightning.peft_format.differences import unknown_to_peft
from lora_lightning.peft_format.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Content,
    is_edited,
    parents_of,
    read_content,
    read_description,
    read_metadata,
    weights_file,
    write_files,
)
from lora_lightning.peft_format.from_checkpoint import load_from_checkpoint
from lora_lightning.peft_format.mapping import (
    OWN_TYPE,
    check_method,
    configuration,
    describe,
    expected_shapes,
    exported,
    from_file,
    key_in_folder,
)
from lora_lightning.peft_format.model_card import CARD_NAME, model_card


def save_adapter(module: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Write the adapters of one name to `folder`, in PEFT's format with a model card.

    Modules that are trained in full are written, too.

    Adapters of PiSSA are written as the difference to the original base, with twice their rank. If PEFT does not
    support an adapted layer or computes it incorrectly, `peft_type` is `LORA_LIGHTNING`, which PEFT refuses.

    Args:
        module: The module that `attach` was called with. The layer names in the files are relative to it.
        folder: The folder to write. It is created if necessary.
        name: Name of the adapters. `None` is for the active ones, if they have a single name.

    Raises:
        ValueError: If `module` is not adapted, there are no adapters with this name, or several are active and none is
            named.
        FileExistsError: If the folder already contains an adapter.
    """
    AdapterFolder(module, name=name).write(folder)


class AdapterFolder:
    """Holds the content of an adapter folder of `module`.

    It is a copy, so the module may change before the folder is written. Tensors that are distributed over processes are
    gathered. All processes have to create this object, and one of them writes it.

    Args:
        module: The module that `attach` was called with.
        data: Name of the data that `metrics` were measured on, for the README.md in the folder.
        metrics: Metrics for this file, by name.
        values: Values to write instead of those of the module, by state-dict key. They are used if no adapter is
            missing.
        name: Name of the adapters, as in `save_adapter`.
        base: Digests of the base, which are computed unless they are known.
    """

    def __init__(
        self,
        module: nn.Module,
        data: str | None = None,
        metrics: Mapping[str, float] | None = None,
        values: Mapping[str, Tensor] | None = None,
        name: str | None = None,
        base: BaseDigests | None = None,
    ) -> None:
        module = unwrapped(module)
        chosen = _the_active_name(module) if name is None else name
        with with_values(module, values or {}, chosen):
            description = describe(module, chosen)
            tensors = exported(module, chosen, to_peft=description["peft_type"] != OWN_TYPE)
        with alone(attachment_of(module).saved, chosen):
            self._files = description, tensors, base_metadata(module, base)
        size = sum(tensor.numel() for tensor in tensors.values())
        frozen = [other for other in active_names(module) if other not in trained_names(module)]
        beside = frozen if chosen in trained_names(module) else []
        self._card = model_card(description, size, data, metrics, beside)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder as `save_adapter` does."""
        folder = Path(folder)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file; expected a folder for the adapter. Choose another path.")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (folder / name).exists():
                raise FileExistsError(
                    f"{folder / name} exists: it is not overwritten. Choose another folder, or remove the adapter "
                    "there."
                )
        write_files(folder, *self._files)
        if not (folder / CARD_NAME).exists():
            (folder / CARD_NAME).write_text(self._card, encoding="utf-8")


def load_adapter(
    module: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, strict: bool = False
) -> list[str]:
    """Load the adapters that `save_adapter`, PEFT or a run wrote. They are attached if `module` has none.

    A warning says if they were trained on another base.

    Args:
        module: The base, plain or adapted.
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`; or a log folder, whose newest
            adapter is used; or a checkpoint of a run with `LoRAFinetuning`.
        name: Name of the adapters. If adapters with this name exist, they get the values in the folder, and must have
            the same layers, ranks and scales. Adapters with other names become inactive until `set_adapter`.
        strict: Whether to refuse adapters of another base. The same base in another precision is accepted.

    Returns:
        The names of the adapted layers.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, contains another kind of adapter, or does not fit `module`, or because of
            `strict`. `module` is then unchanged.
    """
    module, folder = unwrapped(module), Path(folder)
    if folder.is_file():
        return load_from_checkpoint(module, folder, name, strict)
    if folder.is_dir() and not (folder / CONFIG_NAME).exists() and any(True for _ in folder.rglob(CONFIG_NAME)):
        folder = newest_adapter(folder)
    description = read_description(folder / CONFIG_NAME)
    check_method(description, folder / CONFIG_NAME)
    content = read_content(weights_file(folder), description, module)
    config, selected = _config_and_weights(module, folder, description, content)
    _check_shapes(module, folder, config, selected, content)
    record = record_of(module)
    with alone({} if record is None else record.saved, name):
        other_base = check_base(module, folder, read_metadata(folder), content.base, content.saved, strict)
    if is_adapted(module) and name in adapter_names(module):
        _activate_if_equal(module, config, selected, folder, name)
    else:
        check(selected, config)
        attach_to(module, selected, config, name)
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in content.saved.items():
            state[key].copy_(value)
        for adapted in adapted_weights(module, name):
            for parameter, own in adapted.adapter.named_parameters():
                own.copy_(from_file(adapted, parameter, content.adapters[key_in_folder(adapted, parameter)]))
    if other_base:
        warnings.warn(other_base, stacklevel=2)
    _warn_if_edited(folder)
    if description["peft_type"] != OWN_TYPE:
        _warn_where_peft_is_wrong(module, folder, name)
    return [adapted.name for adapted in adapted_weights(module, name)]


def trained_on(folder: str | os.PathLike[str]) -> str | None:
    """Return the fingerprint of the base of the adapters in a folder, or `None` if PEFT wrote the folder."""
    return base_of(read_metadata(Path(folder)))


def _the_active_name(module: nn.Module) -> str:
    """Return the name of the active adapters, if they have a single one.

    Raises:
        ValueError: If several are active, or none.
    """
    names = require_active_names(module)
    if len(names) > 1:
        raise ValueError(
            f"The adapters {', '.join(map(repr, names))} of this {type(module).__name__} are active: say which of them "
            f"is meant, for example name={names[-1]!r}."
        )
    return names[0]


def _config_and_weights(
    module: nn.Module,
    folder: Path,
    description: dict[str, Any],
    content: Content,
) -> tuple[LoRAConfig, list[Target]]:
    """Return our configuration and the weights that it adapts, and rename the tensors to our keys."""
    tensors = content.adapters
    if description["peft_type"] != OWN_TYPE and (of_peft := description.get("target_parameters")):
        description = description | {"target_parameters": by_name_from_peft(tensors, of_peft, module)}
    modules = dict(layers_of(module))
    names: dict[str, None] = {}
    for key in list(tensors):
        parent, _, leaf = key.rpartition(".")
        layer_name, _, last = parent.rpartition(".")
        if isinstance(modules.get(parent), nn.MultiheadAttention):
            tensors[f"{parent}.lora_in_proj_weight.{leaf}".lstrip(".")] = tensors.pop(key)
            names[f"{parent}.in_proj_weight".lstrip(".")] = None
        elif last.startswith("lora_") and parent not in modules:
            names[f"{layer_name}.{last.removeprefix('lora_')}".lstrip(".")] = None
        else:
            names[parent] = None
    saved_names = list(description.get("modules_to_save") or [])
    saved = {parent for key in content.saved for parent in parents_of(key)}
    trained = [name for name in modules if name in saved and name.endswith(tuple(saved_names))]
    if saved_names and not trained:
        raise ValueError(
            f"The adapter in {folder} comes with modules_to_save={saved_names}, none of which exists in this "
            f"{type(module).__name__}."
        )
    config = configuration(description, folder / CONFIG_NAME, module, list(names), trained)
    known = candidates(module, config)
    missing = [name for name in names if name not in known and not (config.bypass and not name)]
    if missing:
        raise ValueError(
            f"The adapter in {folder} adapts {missing[0]!r}, which this {type(module).__name__} does not have. Layers "
            f"that can be adapted: {', '.join(known) or 'none'}."
        )
    bypass = [bypass_target(module, config)] if config.bypass else []
    return config, [*(target for name, target in known.items() if name in names), *bypass]


def _check_shapes(
    module: nn.Module,
    folder: Path,
    config: LoRAConfig,
    selected: list[Target],
    content: Content,
) -> None:
    shapes = {key: tuple(value.shape) for key, value in (content.adapters | content.saved).items()}
    saved, of_adapters = Names(config.modules_to_save), adapter_keys(module)
    state = module.state_dict()
    expected = {key: shape for adapted in selected for key, shape in expected_shapes(adapted, config).items()}
    expected |= {
        f"{name}.{key}": tuple(value.shape)
        for name, child in layers_of(module)
        if name and saved.match(name)
        for key, value in child.state_dict().items()
        if f"{name}.{key}" not in of_adapters
    }
    expected |= {key: tuple(state[key].shape) for key in bias_keys(module, selected, config)}
    if shapes != expected:
        wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        listed = "; ".join(
            f"{key} is {shapes.get(key, 'missing')}, expected {expected.get(key, 'none')}" for key in wrong[:5]
        )
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        grouped = any(getattr(adapted.layer, "groups", 1) > 1 for adapted in selected)
        why = (
            " PEFT's adapter of a grouped convolution mixes the groups, so it does not fit this layer."
            if grouped
            else ""
        )
        raise ValueError(f"The adapter in {folder} does not fit this {type(module).__name__}: {listed}{more}.{why}")


def _activate_if_equal(module: nn.Module, config: LoRAConfig, selected: list[Target], folder: Path, name: str) -> None:
    """Activate the adapters with this name if the folder describes the same ones. Otherwise raise an error."""
    attached = {adapted.name: adapted.adapter.scaling for adapted in adapted_weights(module, name)}
    described = {target.name: config.scaling_of(*target.names) for target in selected}
    alike = attached.keys() == described.keys() and all(
        math.isclose(scaling, described[key]) for key, scaling in attached.items()
    )
    if not alike or config_of(module, name).use_dora != config.use_dora:
        raise ValueError(
            f"The adapter in {folder} differs from the attached one (layers with their scale alpha / rank): "
            f"{described} in the folder, {attached} attached. Call detach(module) first, or load it under another name."
        )
    set_adapter(module, name)


def _warn_if_edited(folder: Path) -> None:
    if is_edited(folder):
        warnings.warn(
            f"{folder / CONFIG_NAME} has changed since the adapter was written: it is damaged or was edited. Its "
            "current content is used.",
            stacklevel=3,
        )


def _warn_where_peft_is_wrong(module: nn.Module, folder: Path, name: str) -> None:
    wrong = unknown_to_peft(module, name)
    if wrong:
        warnings.warn(
            f"{folder} was written by PEFT, whose outputs differ for the adapters of {', '.join(wrong)}: PEFT ignores "
            "the dilation and padding mode of a convolution (PEFT issue 3697), applies the output projection of an "
            "attention twice (3774), or ignores weights that a module reads itself and layers of a mixture of "
            "experts. Here they compute W + s B A.",
            stacklevel=3,
        )
