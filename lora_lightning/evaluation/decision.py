"""Counts the batches of a data loader in all ways that are possible, and decides once at the end which one is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_lightning.evaluation.found import Candidate
from lora_lightning.evaluation.metrics import UserMetrics
from lora_lightning.evaluation.reading import Batch, Evidence, Reading, Sources, Tally
from lora_lightning.evaluation.tasks import READINGS


@dataclass
class Stream:
    """Holds the counts of one way to read the outputs and targets.

    Args:
        place: Where the outputs are in the output of the model.
        is_named: Whether this place is named like outputs.
        reading: The reading.
        width: Number of outputs of a row.
        tally: The counts.
        metrics: The user's metrics, if any.
        evidence: What is known of all batches.
    """

    place: str
    is_named: bool
    reading: Reading[Any]
    width: int
    tally: Tally
    metrics: UserMetrics | None = None
    evidence: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True)
class Question:
    """Tells what can not be known, so that nothing is counted."""

    text: str


class LoaderCounts:
    """Counts the batches of one data loader on one device.

    Every reading that fits the first batch is counted until a batch does not fit it.

    Args:
        task: The task, if it is known.
        metrics: The user's metrics, if any.
    """

    def __init__(self, task: str | None = None, metrics: UserMetrics | None = None) -> None:
        self.seen = 0
        """Number of samples of this device, repeated ones included."""
        self.samples = 0
        self.digest = 0.0
        self.has_no_outputs = False
        """Whether there was no tensor in what the model returned for a batch."""
        self.failure: str | None = None
        """An error while counting, after which nothing more is counted."""
        self.streams: dict[tuple[str, int], Stream] = {}
        self._task = task
        self._metrics = metrics
        self._has_started = False

    @property
    def has_seen_any(self) -> bool:
        """Return whether there was a batch, counted or not."""
        return bool(self.samples or self.failure or self.has_no_outputs)

    def fits(self, found: Sequence[Candidate], batch: Batch) -> bool:
        """Return whether a reading fits one of the candidates."""
        batches = [batch.with_outputs(each.tensor) for each in found]
        return any(reading.align(self._told(each)) is not None for each in batches for _, reading in self._readings())

    def update(
        self,
        found: Sequence[Candidate],
        batch: Batch,
        base: Sequence[Candidate] | None,
        sources: Sources,
    ) -> None:
        """Count a batch.

        Args:
            found: The candidates for outputs.
            batch: The targets, and what is known of them. Its outputs are not read.
            base: The candidates for outputs of the base at the same places, or `None` without a base.
            sources: Where the samples come from.
        """
        if not len(batch.targets):
            return
        outputs = {each.place: each for each in found}
        of_base = None if base is None else {each.place: each.tensor for each in base}
        if not self._has_started:
            self._has_started = True
            self._start(found, batch)
        self.seen += len(batch.targets)
        self.samples += len(batch.targets) if sources.first_time is None else sum(sources.first_time)
        for key, stream in list(self.streams.items()):
            place = stream.place
            if place not in outputs or not self._add(
                stream, batch.with_outputs(outputs[place].tensor), of_base, sources
            ):
                del self.streams[key]
        if found and torch.distributed.is_available() and torch.distributed.is_initialized():
            tensor = found[0].tensor.detach()
            self.digest = self.digest * 0.999 + float(tensor.double().sum()) + float(batch.targets.double().sum())

    def merge(self, other: LoaderCounts) -> None:
        """Add the counts of another device. A reading remains if it fits the batches of all devices that have some."""
        self.has_no_outputs |= other.has_no_outputs
        self.failure = self.failure or other.failure
        if not other.samples:
            return
        if not self.samples:
            vars(self).update(vars(other) | {"failure": self.failure, "has_no_outputs": self.has_no_outputs})
            return
        self.samples += other.samples
        for key, stream in list(self.streams.items()):
            further = other.streams.get(key)
            if further is None or (further.width != stream.width and stream.reading.task != "regression"):
                del self.streams[key]
                continue
            stream.tally.merge(further.tally)
            stream.evidence.merge(further.evidence)

    def decide(self, num_classes: int | None = None) -> Stream | Question | None:
        """Return the right reading, or what can not be known, or `None` if no reading fits all batches.

        Args:
            num_classes: Number of classes, if it is known.
        """
        if self.failure is not None:
            return Question(self.failure)
        streams = [each for each in self.streams.values() if each.tally.counted]
        if any(each.is_named for each in streams):
            first = next(each.place for each in streams if each.is_named)
            streams = [each for each in streams if each.place == first]
        places = list(dict.fromkeys(each.place for each in streams))
        if len(places) > 1 and num_classes is not None:
            fitting = [each for each in streams if max(each.width, 2) == num_classes]
            streams = fitting or streams
            places = list(dict.fromkeys(each.place for each in streams))
        if len(places) > 1:
            return Question(f"outputs that fit the targets are at {', '.join(places)}: set output_key to one of them")
        if not streams:
            return None
        chosen = streams[0]
        others = [each.reading.task for each in streams[1:]]
        doubt = None if self._task else chosen.reading.doubt(chosen.evidence, others)
        return chosen if doubt is None else Question(doubt)

    def to_cpu(self) -> None:
        """Move the counts to the CPU, so that they can be sent to other devices."""
        for stream in self.streams.values():
            stream.tally.to_cpu()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for other devices, without the user's metrics, which synchronize themselves."""
        streams = {key: Stream(**(vars(each) | {"metrics": None})) for key, each in self.streams.items()}
        return vars(self) | {"streams": streams, "_metrics": None}

    def _start(self, found: Sequence[Candidate], batch: Batch) -> None:
        named = [each for each in found if each.is_named]
        for tier in [named[:1], named[1:], found] if named else [found]:
            for each in tier:
                whole = self._told(batch.with_outputs(each.tensor))
                for number, reading in self._readings():
                    if (aligned := reading.align(whole)) is None:
                        continue
                    metrics = None if self._metrics is None else self._metrics.copy(each.tensor.device)
                    tally = reading.tally(aligned)
                    key = each.place, number
                    self.streams[key] = Stream(each.place, each.is_named, reading, aligned.width, tally, metrics)
            if self.streams:
                return

    def _add(self, stream: Stream, batch: Batch, base: Mapping[str, Tensor] | None, sources: Sources) -> bool:
        """Count a batch in one way. Return whether it fits."""
        batch = self._told(batch)
        aligned = stream.reading.align(batch)
        if aligned is None or (aligned.width != stream.width and stream.reading.task != "regression"):
            return False
        aligned = aligned.without_repeated(sources.first_time)
        of_base = None
        if base is not None:
            if stream.place not in base:
                return False
            of_base = stream.reading.outputs_of_base(batch.with_outputs(base[stream.place]))
            if of_base is not None and of_base.shape != aligned.outputs.shape:
                of_base = None
        stream.tally.update(aligned, of_base, sources)
        stream.evidence.add(batch, aligned)
        if stream.metrics is not None:
            stream.metrics.update(aligned, of_base)
        return True

    def _readings(self) -> list[tuple[int, Reading[Any]]]:
        return [(i, each) for i, each in enumerate(READINGS) if self._task in (None, each.task)]

    def _told(self, batch: Batch) -> Batch:
        """Return a batch with what follows from the task that the user has named."""
        if self._task not in ("tokens", "next_tokens"):
            return batch
        return replace(batch, is_text=True, is_per_token=True, is_next_token=self._task == "next_tokens")


def sum_over_devices(
    counts: Mapping[int, LoaderCounts], group: Any = None
) -> tuple[dict[int, LoaderCounts], dict[int, bool]]:
    """Return the counts over all devices by the number of the loader, and whether devices counted the same samples.

    Every device has to call this, including devices without samples.

    Args:
        counts: The counts of this device by the number of the loader.
        group: The processes with different samples, or `None` for all.
    """
    for each in counts.values():
        each.to_cpu()
    devices: list[Mapping[int, LoaderCounts]] = [counts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        devices = [counts] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(devices, counts, group)
    summed: dict[int, LoaderCounts] = {}
    repeated: dict[int, bool] = {}
    for loader in sorted({loader for each in devices for loader in each}):
        own = [each[loader] for each in devices if loader in each and each[loader].has_seen_any]
        digests = [(each.samples, each.digest) for each in own]
        repeated[loader] = len(set(digests)) < len(digests)
        first, *others = own or [next(each[loader] for each in devices if loader in each)]
        for other in others:
            first.merge(other)
        summed[loader] = first
    return summed, repeated
