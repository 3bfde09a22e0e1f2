"""Defines `image_backbone`, which builds a network of torchvision, timm or transformers by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model_weights, list_models
from torchvision.transforms._presets import ImageClassification

from lora_lightning.backbone_facts import BackboneFacts, set_backbone_facts
from lora_lightning.models.weights import (
    check_name,
    copy_of_download,
    load_strictly,
    none_of_words,
    read_weights,
    through_torchvision,
)

_IMAGENET_CLASSES = 1000
_AUXILIARY = ("AuxLogits", "aux1", "aux2")


def image_backbone(name: str, weights: str | None = None, num_classes: int | None = None) -> nn.Module:
    """Build an image classifier for `Classifier(backbone=...)`.

    The network is that of the library, with the same parameter names and an additional attribute, `backbone_facts`: its
    `preprocessing`, which `ImageFolderDataModule` applies to images, and its `new_head`, the name of a layer that was
    replaced with a new one, if any, which `LoRAFinetuning` trains in full.

    Args:
        name: A classification network of torchvision (`vgg19`), `timm/<name>`, or `transformers/<folder or hub name>`.
        weights: `None` for random weights, with norm layers calibrated on a batch of noise; the name of weights in
            torchvision (`IMAGENET1K_V1`, `DEFAULT`), which are downloaded once and compared with the hash in the name
            of the file; `pretrained` for timm and transformers; or a file with a state dict of this network (`.pth` or
            `.safetensors`), which is compared with the hash in its name, if any.
        num_classes: Number of outputs. If it differs from that of the weights, the last layer is replaced with a new
            one. `None` keeps the layer.

    Raises:
        ValueError: If the network or weights do not exist, or if a file is damaged or does not fit.
        FileNotFoundError: If a file does not exist.

    Example::

        Classifier(image_backbone("vgg19", weights="IMAGENET1K_V1"), num_classes=1000)
    """
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: expected at least 2.")
    weights = none_of_words(weights)
    package, _, rest = name.partition("/")
    if package == "timm":
        network = _from_timm(rest, weights, num_classes)
    elif package == "transformers":
        network = _from_transformers(rest, weights, num_classes)
    else:
        network = _from_torchvision(name, weights, num_classes)
    return network


def _from_torchvision(name: str, weights: str | None, num_classes: int | None) -> nn.Module:
    names = list_models(module=torchvision.models)
    if name not in names:
        alike = difflib.get_close_matches(name, names, n=3)
        raise ValueError(
            f"torchvision has no classification network {name!r}."
            + (f" Did you mean {', '.join(alike)}?" if alike else "")
            + " Expected a name of torchvision.models.list_models(), timm/<name>, or transformers/<name>."
        )
    entries = {entry.name: entry for entry in get_model_weights(name)}
    file = None if weights is None or weights in (*entries, "DEFAULT") else _existing(weights, [*entries, "DEFAULT"])
    entry = copy_of_download(file, list(entries.values())) if file else None
    if weights is not None and file is None:
        entry = get_model_weights(name)[weights]
    # Without this option, their builders warn that the default will change.
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    builder = torchvision.models.get_model_builder(name)
    if entry is not None:
        network = through_torchvision(builder, entry, file)
    elif file is not None:
        check_name(file)
        state = read_weights(file)
        network = builder(**options)
        head = state.get(f"{head_of(network)}.weight")
        if head is not None and len(head) != _IMAGENET_CLASSES:
            network = builder(num_classes=len(head), **options)
        if not any(key.startswith(_AUXILIARY) for key in state):
            _drop_auxiliary_heads(network)
        load_strictly(network, state, file)
    else:
        network = builder(**options)
    _drop_auxiliary_heads(network)
    preset = entry or entries.get("IMAGENET1K_V1")
    preprocessing = preset.transforms() if preset else ImageClassification(crop_size=224)
    if weights is None:
        _calibrate_norms(network, (3, *preprocessing.crop_size * 2))
    return _with_head_and_facts(network, preprocessing, num_classes)


def _from_timm(name: str, weights: str | None, num_classes: int | None) -> nn.Module:
    timm = library("timm", f"timm/{name}")
    if not timm.is_model(name):
        alike = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no network {name!r}." + (f" Did you mean {', '.join(alike)}?" if alike else ""))
    file = None if weights in (None, "pretrained") else _existing(str(weights), ["pretrained"])
    network = timm.create_model(name, pretrained=weights == "pretrained")
    if file is not None:
        check_name(file)
        load_strictly(network, read_weights(file), file)
    config = timm.data.resolve_model_data_config(network)
    if weights is None:
        _calibrate_norms(network, config["input_size"])
    preprocessing = timm.data.create_transform(**config, is_training=False)
    head = network.pretrained_cfg.get("classifier")
    if not isinstance(head, str):
        raise ValueError(f"timm/{name} has {head or 'no layer'} as its classifier; expected a single last layer.")
    return _with_head_and_facts(network, preprocessing, num_classes, head)


def _from_transformers(name: str, weights: str | None, num_classes: int | None) -> nn.Module:
    transformers = library("transformers", f"transformers/{name}")
    if weights not in (None, "pretrained"):
        raise ValueError(f"weights={weights!r}: expected null or 'pretrained' for transformers/<folder or hub name>.")
    if weights is None:
        network = transformers.AutoModelForImageClassification.from_config(
            transformers.AutoConfig.from_pretrained(name)
        )
    else:
        network = transformers.AutoModelForImageClassification.from_pretrained(name)
    return _with_head_and_facts(network, _Processor(transformers.AutoImageProcessor.from_pretrained(name)), num_classes)


class _Processor:
    """Applies an image processor of transformers to a single image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def library(name: str, wanted_by: str) -> ModuleType:
    """Import a package, or raise an error that says what needs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{wanted_by} needs the package {name}: pip install {name}.") from None


def head_of(network: nn.Module) -> str:
    """Return the name of the last layer of a classifier: the linear layer or convolution that is defined last."""
    layers: list[str] = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear layer or convolution that could be its head.")
    return layers[-1]


def _with_head_and_facts(
    network: nn.Module, preprocessing: Callable[[Any], Any], num_classes: int | None, name: str = ""
) -> nn.Module:
    """Replace the head if it has another number of classes, and return the network with its facts, in training mode."""
    new_head: tuple[str, ...] = ()
    name = name or head_of(network)
    head = network.get_submodule(name)
    if num_classes is not None and num_classes != len(head.get_parameter("weight")):
        new_head = (name,)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, _like(head, num_classes))
    set_backbone_facts(network, BackboneFacts(new_head, preprocessing))
    return network.train()  # the transformers library returns it in evaluation mode


def _like(head: nn.Module, num_classes: int) -> nn.Module:
    """Return a new layer with another size."""
    if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1):
        return nn.Conv2d(head.in_channels, num_classes, kernel_size=1, bias=head.bias is not None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The last layer is {head}; expected a linear layer or a convolution of size 1, which can be replaced."
        )
    return nn.Linear(head.in_features, num_classes, bias=head.bias is not None)


@torch.no_grad()
def _calibrate_norms(network: nn.Module, size: tuple[int, ...]) -> None:
    """Calibrate the norm layers of a random network on a batch of noise.

    The initial statistics are 0 and 1. If they are frozen, almost no signal passes through a deep network: in
    EfficientNet-B0, features of 1e-14 reach the last layer, and nothing can be trained. The same holds for a branch
    whose norm has a weight of zero, which is the initialization of timm's residual networks. It is set to one.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        if norm.affine and not norm.weight.any():
            nn.init.ones_(norm.weight)
        norm.momentum = None  # adopt the statistics of the batch
        norm.train()
    network(torch.randn(8, *size, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _drop_auxiliary_heads(network: nn.Module) -> None:
    """Remove the auxiliary classifiers of GoogLeNet and Inception, whose outputs are only returned in training."""
    if hasattr(network, "aux_logits"):
        network.aux_logits = False  # type: ignore[assignment] # a plain attribute
        for name in _AUXILIARY:
            if hasattr(network, name):
                setattr(network, name, None)


def _existing(weights: str, names: list[str]) -> Path:
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    alike = difflib.get_close_matches(weights, names, n=1)
    raise FileNotFoundError(
        f"weights={weights!r} is not a file."
        + (f" Did you mean {alike[0]}?" if alike else "")
        + f" Expected one of {', '.join(names)}, a file with a state dict, or null for random weights."
    )
