"""Compares a model with its base sample by sample, and finds the samples that only one of them classifies correctly."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from lora_lightning.evaluation.paired import mcnemar_p

KEPT = 100
"""Maximum number of samples of each kind, fixed and broken, that are kept for the report."""
_SIDE = 96
_LONGEST_TEXT = 500
_SHORTEST_SIGNAL, _LONGEST_SIGNAL = 24, 128
_INPUT_KEYS = ("image", "images", "pixel_values", "text", "texts", "input_ids", "x", "inputs", "input")


class Shown(TypedDict, total=False):
    """Holds what a report shows of a sample."""

    image: str
    text: str
    signal: list[float]


@dataclass(frozen=True)
class ChangedSample:
    """Holds a sample that only one of two models classifies correctly.

    Args:
        target: Index of the class.
        base: Prediction of the base, with the probability `base_confidence`.
        model: Prediction of the model, with the probability `confidence`.
        image: A small image as a `data:image/…` URL, or an empty string.
        text: The text, or an empty string.
        index: Index of the sample in the data set, if it is known.
        signal: Up to 128 values of a signal, or an empty list.
        labels: For several labels per sample, the indices of the true labels, of those of the base, and of those of the
            model. `target` is then 1, and `base` and `model` are 1 if all labels are right and else 0.
    """

    target: int
    base: int
    model: int
    base_confidence: float
    confidence: float
    image: str = ""
    text: str = ""
    index: int | None = None
    signal: list[float] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)

    @property
    def is_fixed(self) -> bool:
        """Return whether the model is correct."""
        return self.model == self.target


@dataclass
class Pairs:
    """Counts the samples that only the adapted model or only the base gets right, and keeps some of them.

    Args:
        fixed: Number of samples that only the adapted model gets right.
        broke: Number of samples that only the base gets right.
        samples: Some of these samples.
        are_independent: Whether the samples are independent, unlike pixels of an image.
        fixed_indices: Indices of the fixed samples in the data set, as far as they are known.
        broken_indices: Indices of the broken samples in the data set, as far as they are known.
    """

    fixed: int = 0
    broke: int = 0
    samples: list[ChangedSample] = field(default_factory=list)
    are_independent: bool = True
    fixed_indices: list[int] = field(default_factory=list)
    broken_indices: list[int] = field(default_factory=list)

    @property
    def p(self) -> float | None:
        """Return McNemar's p-value, or `None` for parts of samples such as pixels, which are not independent."""
        return mcnemar_p(self.fixed, self.broke) if self.are_independent else None

    def room(self, fixed: bool) -> int:
        """Return the number of further samples of a kind to keep."""
        return KEPT - sum(each.is_fixed is fixed for each in self.samples)

    def add(self, other: Pairs) -> None:
        """Add the samples of another batch or device."""
        self.fixed += other.fixed
        self.broke += other.broke
        self.are_independent &= other.are_independent
        self.fixed_indices += other.fixed_indices
        self.broken_indices += other.broken_indices
        if other.samples:
            samples = [*self.samples, *other.samples]
            kept = [[each for each in samples if each.is_fixed is kind][:KEPT] for kind in (True, False)]
            self.samples = kept[0] + kept[1]

    def add_unnamed(self, fixed: Tensor, broke: Tensor, inputs: Inputs | None) -> None:
        """Add a batch of samples of which only the indices are kept.

        Args:
            fixed: Which rows are fixed, of shape (N,).
            broke: Which rows are broken, of shape (N,).
            inputs: The inputs of the rows, or `None` for parts of samples.
        """
        of_fixed, of_broken = ([] if inputs is None else inputs.indices_of(each) for each in (fixed, broke))
        self.add(Pairs(int(fixed.sum()), int(broke.sum()), [], inputs is not None, of_fixed, of_broken))


class Changes:
    """Compares the predictions of a model with those of its base on one device.

    A single output per sample means two classes. It is a probability if the outputs of all samples are between 0 and 1,
    and a logit otherwise. This is only known at the end, so both interpretations are compared until then.
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
            _compare(self._at_zero, _of_classes(logits), _of_classes(base), targets, inputs)
            return
        self.are_probabilities &= bool(((logits >= 0) & (logits <= 1) & (base >= 0) & (base <= 1)).all())
        logit, probability = (
            (_of_logit(logits.sigmoid()), _of_logit(base.sigmoid())),
            (_of_logit(logits), _of_logit(base)),
        )
        _compare(self._at_zero, *logit, targets, inputs)
        if self.are_probabilities:
            _compare(self._at_half, *probability, targets, inputs)

    def merge(self, other: Changes) -> None:
        """Add the samples of another device."""
        self.are_probabilities &= other.are_probabilities
        self._at_zero.add(other._at_zero)
        self._at_half.add(other._at_half)

    def pairs(self) -> Pairs:
        """Return the result."""
        return self._at_half if self.are_probabilities else self._at_zero


class Inputs:
    """Finds the images or texts of a batch for the report.

    Args:
        batch: A mapping with one of the usual keys, a sequence whose first element is the input, or the input tensor.
        places: Indices of the samples that are counted, of shape (N,).
        decode: A function that decodes a batch of token ids.
        indices: Index in the data set of each sample of the batch, or `None` if it is not known.
    """

    def __init__(
        self,
        batch: Any,
        places: Tensor,
        decode: Callable[[Tensor], list[str]] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._found, self._places, self._decode = _inputs(batch), places, decode
        self._indices = indices

    def index_of(self, number: int) -> int | None:
        """Return the index of a sample in the data set, if it is known."""
        return None if self._indices is None else self._indices[int(self._places[number])]

    def indices_of(self, chosen: Tensor) -> list[int]:
        """Return the indices in the data set of the chosen samples, or an empty list if they are not known.

        Args:
            chosen: Which samples, of shape (N,).
        """
        indices = self._indices
        return [] if indices is None else [indices[place] for place in self._places[chosen].tolist()]

    def of(self, number: int) -> Shown:
        """Return the `image`, the `text` or the `signal` of a sample."""
        found, index = self._found, int(self._places[number])
        if isinstance(found, list):
            return {"text": str(found[index])[:_LONGEST_TEXT]}
        if found is None:
            return {}
        if found.is_floating_point() or found.dtype == torch.uint8:
            sample = found[index]
            if is_signal(sample):
                return {"signal": small_signal(sample)}
            return {"image": small_image(sample)} if sample.dim() in (2, 3) else {}
        if self._decode is None or found.dim() != 2:
            return {}
        return {"text": self._decode(found[index : index + 1])[0][:_LONGEST_TEXT]}


def is_signal(values: Tensor) -> bool:
    """Return whether these are values over time, of shape (L,), or (C, L) with up to three channels."""
    return values.dim() in (1, 2) and values.shape[-1] >= _SHORTEST_SIGNAL and (values.dim() == 1 or len(values) <= 3)


def small_signal(values: Tensor) -> list[float]:
    """Return up to 128 values of the first channel of a signal. Longer ones are averaged piece by piece."""
    signal = values.detach().float().cpu()
    signal = torch.nan_to_num(signal[0] if signal.dim() == 2 else signal)
    if len(signal) > _LONGEST_SIGNAL:
        signal = torch.nn.functional.adaptive_avg_pool1d(signal[None], _LONGEST_SIGNAL)[0]
    return [float(f"{value:.4g}") for value in signal.tolist()]


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


def _of_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    predicted = logits.argmax(1)
    return predicted, logits.float().softmax(1).gather(1, predicted[:, None])[:, 0]


def _of_logit(probability: Tensor) -> tuple[Tensor, Tensor]:
    predicted = probability > 0.5
    return predicted.long(), torch.where(predicted, probability, 1 - probability)


def _compare(
    pairs: Pairs, model: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor], targets: Tensor, inputs: Inputs | None
) -> None:
    """Add the samples of a batch. Only samples that are kept are converted to images or texts."""
    (now, confidence), (was, base_confidence) = model, base
    fixed, broke = (now == targets) & (was != targets), (now != targets) & (was == targets)
    kept: list[int] = []
    if inputs is not None:
        for kind, rows in ((True, fixed), (False, broke)):
            kept += rows.nonzero()[: pairs.room(kind), 0].tolist()
    pairs.add_unnamed(fixed, broke, inputs)
    if inputs is not None and kept:
        samples = [
            ChangedSample(
                int(targets[each]),
                int(was[each]),
                int(now[each]),
                float(base_confidence[each]),
                float(confidence[each]),
                **inputs.of(each),
                index=inputs.index_of(each),
            )
            for each in kept
        ]
        pairs.add(Pairs(samples=samples))


def _inputs(batch: Any) -> Tensor | list[str] | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return _inputs(next((batch[key] for key in _INPUT_KEYS if key in batch), None))
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        return list(batch) if isinstance(batch[0], str) else _inputs(batch[0])
    return None
