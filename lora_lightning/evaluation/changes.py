"""Compares a model with its base sample by sample, and finds the samples that only one of them classifies correctly."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypedDict

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
        return KEPT - sum(each.is_fixed is fixed for each in self.samples) if len(self.samples) < 2 * KEPT else 0

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

    def count(self, fixed: Sequence[int], broken: Sequence[int], inputs: Inputs) -> None:
        """Count samples of a batch, given the numbers of the fixed and of the broken ones."""
        self.fixed += len(fixed)
        self.broke += len(broken)
        self.fixed_indices += inputs.indices_of(fixed)
        self.broken_indices += inputs.indices_of(broken)

    def count_parts(self, is_right: Tensor, was_right: Tensor) -> None:
        """Count parts of samples, such as pixels.

        Args:
            is_right: Which parts the model gets right, of shape (N,).
            was_right: Which parts the base gets right, of shape (N,).
        """
        self.fixed += int((is_right & ~was_right).sum())
        self.broke += int((was_right & ~is_right).sum())
        self.are_independent = False


@dataclass(frozen=True)
class Predictions:
    """Holds the outputs of a model, and the classes that they predict.

    Args:
        outputs: Scores of shape (..., C), or (N,) for two classes.
        classes: Predicted classes of shape (1, N). For two classes with one output, they have the shape (2, N): those
            if the outputs are logits, and those if they are probabilities.
        rows: Number of the row of the outputs of each prediction, or `None` if all rows have one.
        can_be_probabilities: Whether single outputs are all between 0 and 1.
    """

    outputs: Tensor
    classes: Tensor
    rows: Tensor | None
    can_be_probabilities: bool

    @classmethod
    def of(cls, outputs: Tensor, counted: Tensor | None = None) -> Self:
        """Return the predictions for rows of outputs.

        Args:
            outputs: Scores of shape (..., C), or (N,) for two classes.
            counted: Which rows count, of shape (N,), or `None` for all.
        """
        if outputs.dim() > 1:
            classes = outputs.max(-1).indices.flatten()  # several times as fast as argmax
            if counted is None:
                return cls(outputs, classes[None], None, False)
            return cls(outputs, classes[None, counted], counted.nonzero()[:, 0], False)
        outputs = outputs if counted is None else outputs[counted]
        can_be_probabilities = bool(((outputs >= 0) & (outputs <= 1)).all())
        return cls(outputs, torch.stack((outputs > 0, outputs > 0.5)).long(), None, can_be_probabilities)

    def confidences(self, chosen: Tensor, is_probability: bool) -> list[float]:
        """Return the probabilities of the predicted classes of a few rows.

        Args:
            chosen: Numbers of the predictions, of shape (N,).
            is_probability: Whether single outputs are probabilities, not logits.
        """
        if self.outputs.dim() == 1:
            found = self.outputs[chosen].float()
            found = found if is_probability else found.sigmoid()
            return torch.where(found > 0.5, found, 1 - found).tolist()
        rows = chosen if self.rows is None else self.rows[chosen]
        return self.outputs.flatten(0, -2)[rows].float().softmax(1).amax(1).tolist()


class Changes:
    """Compares the predictions of a model with those of its base on one device.

    A single output per sample means two classes. It is a probability if the outputs of all samples are between 0 and 1,
    and a logit otherwise. This is only known at the end, so both interpretations are compared until then.
    """

    def __init__(self) -> None:
        self.are_probabilities = True
        self._at_zero, self._at_half = Pairs(), Pairs()

    def compare(self, model: Predictions, base: Predictions, targets: Tensor, inputs: Inputs | None = None) -> None:
        """Compare the predictions for a batch with targets of shape (N,).

        `inputs` is `None` for parts of samples, such as pixels.
        """
        _compare(self._at_zero, model, base, targets, inputs, is_probability=False)
        self.are_probabilities &= model.can_be_probabilities and base.can_be_probabilities
        if self.are_probabilities:
            _compare(self._at_half, model, base, targets, inputs, is_probability=True)

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

    def indices_of(self, rows: Sequence[int]) -> list[int]:
        """Return the indices in the data set of the samples of rows, or an empty list if they are not known."""
        indices = self._indices
        if indices is None or not rows:
            return []
        places = self._places.tolist()
        return [indices[places[row]] for row in rows]

    def of(self, rows: Sequence[int]) -> list[Shown]:
        """Return the `image`, the `text` or the `signal` of the sample of each row."""
        places: list[int] = self._places[list(rows)].tolist()
        return [self._of_sample(place) for place in places]

    def _of_sample(self, place: int) -> Shown:
        found = self._found
        if isinstance(found, list):
            return {"text": str(found[place])[:_LONGEST_TEXT]}
        if found is None:
            return {}
        if found.is_floating_point() or found.dtype == torch.uint8:
            sample = found[place]  # a single one, since tensors of some layouts have no index of several
            sample = sample if sample.layout == torch.strided else sample.to_dense()
            if is_signal(sample):
                return {"signal": small_signal(sample)}
            return {"image": small_image(sample)} if sample.dim() in (2, 3) else {}
        if self._decode is None or found.dim() != 2:
            return {}
        return {"text": self._decode(found[place : place + 1])[0][:_LONGEST_TEXT]}


def is_signal(values: Tensor) -> bool:
    """Return whether these are values over time, of shape (L,), or (C, L) with up to three channels."""
    return values.dim() in (1, 2) and values.shape[-1] >= _SHORTEST_SIGNAL and (values.dim() == 1 or len(values) <= 3)


def small_signal(values: Tensor) -> list[float]:
    """Return up to 128 values of the first channel of a signal. Longer ones are averaged piece by piece."""
    signal = values.detach().float().cpu()
    signal = torch.nan_to_num(signal[0] if signal.dim() == 2 else signal)
    if len(signal) > _LONGEST_SIGNAL:
        signal = torch.nn.functional.adaptive_avg_pool1d(signal[None], _LONGEST_SIGNAL)[0]
    found: list[float] = signal.tolist()
    return found


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


class _Row(NamedTuple):
    """Holds the number of a row in its batch, its class, and the predictions of the base and of the model."""

    number: int
    target: int
    was: int
    now: int


def _compare(
    pairs: Pairs,
    model: Predictions,
    base: Predictions,
    targets: Tensor,
    inputs: Inputs | None,
    *,
    is_probability: bool,
) -> None:
    """Add the samples of a batch. Only samples that are kept are converted to images or texts."""
    now, was = model.classes[int(is_probability)], base.classes[int(is_probability)]
    if inputs is None:
        pairs.count_parts(now == targets, was == targets)
        return
    columns = torch.stack((targets, was, now)).tolist()
    rows = [_Row(*row) for row in zip(range(len(targets)), *columns, strict=True) if row[2] != row[3]]
    fixed, broken = [row for row in rows if row.now == row.target], [row for row in rows if row.was == row.target]
    pairs.count([row.number for row in fixed], [row.number for row in broken], inputs)
    if kept := fixed[: pairs.room(True)] + broken[: pairs.room(False)]:
        numbers = [row.number for row in kept]
        chosen = torch.tensor(numbers, device=targets.device)
        befores, afters = base.confidences(chosen, is_probability), model.confidences(chosen, is_probability)
        indices: Sequence[int | None] = inputs.indices_of(numbers) or [None] * len(kept)
        samples = [
            ChangedSample(row.target, row.was, row.now, before, after, **shown, index=index)
            for row, before, after, shown, index in zip(kept, befores, afters, inputs.of(numbers), indices, strict=True)
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
