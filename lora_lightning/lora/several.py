"""Several adapters for one base, one of them in use: `switch_adapter`, `combine_adapters`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import attach_beside
from lora_lightning.lora.attached import (
    Attachment,
    adapter_names,
    attachment,
    bare,
    exchange,
    freeze_base,
    put_on,
    set_aside,
    sites,
)
from lora_lightning.lora.config import LoRAConfig, exactly
from lora_lightning.lora.selection import candidates


def switch_adapter(module: nn.Module, name: str) -> None:
    """Puts other adapters to use; those in use so far are set aside, with all that they have learned.

    Adapters that are set aside are no part of the module: they cost nothing but memory, and neither `state_dict` nor
    `parameters` shows them. An optimizer that had their parameters still has them.

    Raises:
        ValueError: If there are no adapters of this name.
    """
    names = adapter_names(module)
    if name not in names:
        raise ValueError(f"This {type(module).__name__} has no adapters named {name!r}; it has {', '.join(names)}.")
    attached = attachment(module)
    if name == attached.name:
        return
    shelf = set_aside(module)
    wanted = shelf.pop(name)
    originals = {key: value for key, value in module.state_dict(keep_vars=True).items() if key in wanted.whole}
    module._lora_attachment = Attachment(  # type: ignore[assignment]
        wanted.config, name, attached.was_trainable, originals, shelf
    )
    exchange(module, wanted.whole)
    freeze_base(module)
    put_on(module, wanted.parts)


def combine_adapters(module: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Makes adapters whose update is the weighted sum of others', exactly, and puts them to use.

    Σ w_i s_i B_i A_i is B A with the factors side by side, so that the ranks add up.

    Args:
        module: A module with adapters of all these names.
        weights: The weight of each, by name.
        name: What to call the sum.

    Raises:
        ValueError: If a name is missing or taken, or an adapter is no such sum: one with DoRA, or with modules trained whole.

    Example::

        combine_adapters(net, {"digit9": 0.5, "digit7": 0.5}, name="both")
    """
    names = adapter_names(module)
    missing = [other for other in weights if other not in names]
    if missing or name in names or not weights:
        raise ValueError(
            f"Can't combine {list(weights)} as {name!r}: this {type(module).__name__} has adapters named "
            f"{', '.join(names)}. Name some of these, and a new name for their sum."
        )
    in_use = names[0]
    terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
    read: list[str] = []
    bypass: tuple[int, int] | None = None
    try:
        for other, weight in weights.items():
            switch_adapter(module, other)
            config = attachment(module).config
            if config.dora or config.trainable:
                raise ValueError(
                    f"The adapters {other!r} are no sum of products: they have DoRA, or modules trained whole beside "
                    "them. Combine others."
                )
            for site in sites(module):
                down, up = (factor.detach() for factor in site.update.lora_factors())
                terms.setdefault(site.name, []).append((down, up * (weight * site.update.lora_scaling)))
                if site.parameter is None:
                    bypass = config.bypass
                elif site.update is not site.layer:
                    read.append(site.name)
    finally:
        switch_adapter(module, in_use)
    ranks = {re.escape(key) or "(?:)": sum(len(down) for down, _ in parts) for key, parts in terms.items()}
    called = [key for key in terms if key not in read and not (bypass and not key)]
    config = LoRAConfig(
        rank=max(ranks.values()),
        targets=exactly(called) if called else [],
        rank_pattern=ranks,
        target_parameters=exactly(read) if read else [],
        bypass=bypass,
    )
    with bare(module):
        known = candidates(module, config)
    attach_beside(module, config, [known[key] for key in terms if key in known], name)
    with torch.no_grad():
        for site in sites(module):
            down, up = site.update.lora_factors()
            down.copy_(torch.cat([part for part, _ in terms[site.name]]))
            up.copy_(torch.cat([part for _, part in terms[site.name]], dim=1))
