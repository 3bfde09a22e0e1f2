"""Compares a model with its base sample by sample, and finds the samples that only one of them classifies correctly."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEPT = 100
"""Maximum number of samples of each kind, fixed and broken, that are kept for the report."""
_SIDE = 96
_LONGEST_TEXT = 500
_INPUT_KEYS = ("image", "images", "pixel_values", "text", "texts", "input_ids", "x", "inputs", "input")


@dataclass(frozen=True)
class ChangedSample:
    """Holds a sample that only one of two models classifies correctly.

    Args:
        target: Index of the class.
        base: Prediction of the base, with the probability `base_confidence`.
        model: Prediction of the model, with the probability `confidence`.
        image: A small image as a `data:image/…` URL, or an empty string.
        text: The text, or an empty string.
    """

    target: int
    base: int
    model: int
    base_confidence: float
    confidence: float
    image: str = ""
    text: str = ""

    @property
    def is_fixed(self) -> bool:
        """Return whether the model is correct."""
        return self.model == self.target


@dataclass
class Pairs:
    """Counts the samples that only the model (`fixed`) or only the base (`broke`) classifies correctly, and keeps some of them."""

    fixed: int = 0
    broke: int = 0
    samples: list[ChangedSample] = field(default_factory=list)
    are_independent: bool = True

    @property
    def p(self) -> float | None:
        """Return McNemar's p-value, or `None` for parts of samples such as pixels, which are not independent."""
        return mcnemar_p(self.fixed, self.broke) if self.are_independent else None

    def room(self, fixed: bool) -> int:
        """Return the number of further samples of a kind to keep."""
        return KEPT - sum(each.is_fixed is fixed for each in self.samples)

    def __add__(self, other: Pairs) -> Pairs:
        samples = [*self.samples, *other.samples]
        kept = [[each for each in samples if each.is_fixed is kind][:KEPT] for kind in (True, False)]
        independent = self.are_independent and other.are_independent
        return Pairs(self.fixed + other.fixed, self.broke + other.broke, kept[0] + kept[1], independent)


class Changes:
    """Compares the predictions of a model with those of its base on one device.

    A single output per sample means two classes. It is a probability if the outputs of all samples are between 0 and 1, and a logit
    otherwise. This is only known at the end, so both interpretations are compared until then.
    """

    def __init__(self) -> None:
        self.are_probabilities = True
        self._at_zero, self._at_half = Pairs(), Pairs()

    def update(self, logits: Tensor, base: Tensor, targets: Tensor, inputs: Inputs | None = None) -> None:
        """Compare a batch: logits of shape (N, C), or (N,) for two classes, and targets of shape (N,).

        `inputs` is `None` for parts of samples, such as pixels.
        """
        if logits.dim() > 1:
            self.are_probabilities = False
            self._at_zero = _compare(self._at_zero, _of_classes(logits), _of_classes(base), targets, inputs)
            return
        self.are_probabilities &= bool(((logits >= 0) & (logits <= 1) & (base >= 0) & (base <= 1)).all())
        logit, probability = (
            (_of_logit(logits.sigmoid()), _of_logit(base.sigmoid())),
            (_of_logit(logits), _of_logit(base)),
        )
        self._at_zero = _compare(self._at_zero, *logit, targets, inputs)
        self._at_half = _compare(self._at_half, *probability, targets, inputs)

    def pairs(self, are_probabilities: bool) -> Pairs:
        """Return the result for single outputs that are probabilities or not."""
        return self._at_half if are_probabilities else self._at_zero


class Inputs:
    """Finds the images or texts of a batch for the report.

    Args:
        batch: A mapping with one of the usual keys, a sequence whose first element is the input, or the input tensor.
        places: Indices of the samples that are counted, of shape (N,).
        decode: A function that decodes a batch of token ids.
    """

    def __init__(self, batch: Any, places: Tensor, decode: Callable[[Tensor], list[str]] | None = None) -> None:
        self._found, self._places, self._decode = _inputs(batch), places, decode

    def of(self, number: int) -> dict[str, str]:
        """Return the `image` or the `text` of a sample."""
        found, index = self._found, int(self._places[number])
        if isinstance(found, list):
            return {"text": str(found[index])[:_LONGEST_TEXT]}
        if found is None:
            return {}
        if found.is_floating_point() or found.dtype == torch.uint8:
            return {"image": small_image(found[index])} if found[index].dim() in (2, 3) else {}
        if self._decode is None or found.dim() != 2:
            return {}
        return {"text": self._decode(found[index : index + 1])[0][:_LONGEST_TEXT]}


def small_image(pixels: Tensor) -> str:
    """Return pixels of shape (H, W) or (C, H, W) as the URL of a small image, scaled to the range of the values."""
    from PIL import Image

    values = pixels.detach().float().cpu()
    if values.dim() == 3:
        values = values[:3] if len(values) >= 3 else values[:1]
    low, high = values.min(), values.max()
    values = ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    array = values.movedim(0, -1).squeeze(-1).numpy() if values.dim() == 3 else values.numpy()
    image = Image.fromarray(array)
    image.thumbnail((_SIDE, _SIDE))
    kind, file = ("png" if max(image.size) <= 32 else "jpeg"), io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def mcnemar_p(fixed: int, broke: int) -> float:
    """Return the two-sided p-value of McNemar's exact test for equal error rates of two models.

    Under the null hypothesis, each sample that only one model classifies correctly is equally likely for both models (McNemar 1947,
    https://doi.org/10.1007/BF02295996). The exact form is a sign test.
    """
    changed = torch.tensor(float(fixed + broke), dtype=torch.float64)
    fewer = torch.arange(min(fixed, broke) + 1, dtype=torch.float64)
    choices = torch.lgamma(changed + 1) - torch.lgamma(fewer + 1) - torch.lgamma(changed - fewer + 1)
    tail = torch.logsumexp(choices - changed * torch.log(torch.tensor(2.0, dtype=torch.float64)), 0).exp()
    return min(1.0, float(2 * tail))


def pairs_of_devices(changes: Mapping[int, Changes], group: Any = None) -> dict[int, Pairs]:
    """Return the results over all devices by key. Every device has to call this."""
    devices: list[Mapping[int, Changes]] = [changes]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        devices = [changes] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(devices, changes, group)
    found = {}
    for key in sorted({key for each in devices for key in each}):
        own = [each[key] for each in devices if key in each]
        are_probabilities = all(each.are_probabilities for each in own)
        found[key] = sum((each.pairs(are_probabilities) for each in own), Pairs())
    return found


def _of_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    predicted = logits.argmax(1)
    return predicted, logits.float().softmax(1).gather(1, predicted[:, None])[:, 0]


def _of_logit(probability: Tensor) -> tuple[Tensor, Tensor]:
    predicted = probability > 0.5
    return predicted.long(), torch.where(predicted, probability, 1 - probability)


def _compare(
    before: Pairs, model: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor], targets: Tensor, inputs: Inputs | None
) -> Pairs:
    """Add the samples of a batch. Only samples that are kept are converted to images or texts."""
    (now, confidence), (was, base_confidence) = model, base
    fixed, broke = (now == targets) & (was != targets), (now != targets) & (was == targets)
    if inputs is None:
        return before + Pairs(int(fixed.sum()), int(broke.sum()), are_independent=False)
    kept = [each.nonzero()[: before.room(kind), 0].tolist() for each, kind in ((fixed, True), (broke, False))]
    samples = [
        ChangedSample(
            int(targets[each]),
            int(was[each]),
            int(now[each]),
            float(base_confidence[each]),
            float(confidence[each]),
            **inputs.of(each),
        )
        for each in kept[0] + kept[1]
    ]
    return before + Pairs(int(fixed.sum()), int(broke.sum()), samples)


def _inputs(batch: Any) -> Tensor | list[str] | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return _inputs(next((batch[key] for key in _INPUT_KEYS if key in batch), None))
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        return list(batch) if isinstance(batch[0], str) else _inputs(batch[0])
    return None
