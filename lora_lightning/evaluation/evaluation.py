"""Defines `Evaluation`, which counts the passes of a trainer over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lora_lightning.evaluation.datasets import (
    data_parallel_group,
    decoder,
    first_time,
    names_of_classes,
    sample_indices,
    warn_of_repeated_samples,
)
from lora_lightning.evaluation.decision import LoaderCounts, Question, Stream, sum_over_devices
from lora_lightning.evaluation.found import Candidate, candidates, described, find_targets
from lora_lightning.evaluation.metrics import UserMetrics, collection_of
from lora_lightning.evaluation.reading import Batch, Context, Sources
from lora_lightning.evaluation.recorded_calls import Call, RecordedCalls
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.text_inputs import TextInputs
from lora_lightning.lora import adapted_weights, adapter_parameters, disabled, is_adapted
from lora_lightning.wording import some_of


@dataclass(frozen=True)
class EvaluationSettings:
    """Holds what the user says about the data, as `ComparisonReport` takes it.

    Args:
        name: Name of the report, for warnings.
        tasks: The tasks to report.
        class_names: Names of the classes or labels.
        target_key: Key or position of the targets in a batch.
        ignore_index: Target to ignore in addition to -100.
        task: The task.
        output_key: Key, attribute or position of the outputs in the output of the model.
        metrics: Metrics of torchmetrics.
        against: Which adapters the base has: `None` for none, `"frozen"`, or their names.
    """

    name: str
    tasks: tuple[str, ...]
    class_names: Sequence[str] | None = None
    target_key: str | int | None = None
    ignore_index: int | None = None
    task: str | None = None
    output_key: str | int | None = None
    metrics: MetricCollection | Metric | None = None
    against: str | Sequence[str] | None = None


class Evaluation:
    """Counts passes over the data for a model and, if it has adapters, its base.

    Call `start` before a pass, `record` before and `count` after each step, and `reports` after the pass.

    Args:
        settings: What the user says about the data.

    Attributes:
        compares_in_fit: Whether to count the base in the validations of `fit`, too.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.compares_in_fit = False
        self._settings = settings
        collection = collection_of(settings.metrics)
        self._metrics = None if collection is None else UserMetrics(collection)
        self._counts: dict[int, LoaderCounts] = {}
        """The counts by the number of the loader."""
        self._texts = TextInputs()
        self._decode: Callable[[Tensor], list[str]] | None = None
        self._has_looked_for_decoder = False
        self._recorded: RecordedCalls | None = None
        self._warned: set[str] = set()
        self._kept: list[str] = []
        """Names of the adapters that the base has."""
        self._unread = ""
        """Description of the first batch, for warnings."""

    def start(self) -> None:
        """Start a pass over the data."""
        self._counts, self._texts, self._unread, self._kept = {}, TextInputs(), "", []
        self._decode, self._has_looked_for_decoder = None, False

    def record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the calls of the step that is about to run."""
        self.stop()
        self._recorded = RecordedCalls(pl_module, self._compares(trainer) and is_adapted(pl_module))

    def stop(self) -> list[Call]:
        """Restore the module, and return the recorded calls."""
        recorded, self._recorded = self._recorded, None
        return recorded.stop() if recorded else []

    def count(self, trainer: Trainer, pl_module: LightningModule, batch: Any, loader: int) -> None:
        """Count a batch after its step."""
        calls = self.stop()
        targets = find_targets(batch, self._settings.target_key)
        if targets is None:
            what = f" under {self._settings.target_key!r}" if self._settings.target_key is not None else ""
            self._warn(
                f"{self._settings.name} counts nothing: no targets{what} were found in the batch, which is "
                f"{described(batch)}. Set target_key of {self._settings.name} to the key or position of the targets, "
                "which have to be a tensor."
            )
            return
        if loader not in self._counts:
            metrics = None if trainer.state.fn == "fit" else self._metrics
            self._counts[loader] = LoaderCounts(self._settings.task, metrics)
        counts = self._counts[loader]
        own = [call for call in calls if call.module is pl_module]
        if not self._unread:
            returned = ", ".join(described(call.output) for call in own or calls) or "nothing, as it was not called"
            called = "forward" if own or not calls else "what the step called"
            self._unread = (
                f"The targets are {described(targets)} of {targets.dtype}; {called} of {type(pl_module).__name__} "
                f"returned {returned}"
            )
        if counts.failure is None:
            try:
                self._add(trainer, pl_module, batch, loader, calls, targets)
            except Exception as error:  # noqa: BLE001 - a report must not cost the run
                counts.failure = f"{type(error).__name__}: {error}"

    def _add(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        loader: int,
        calls: list[Call],
        targets: Tensor,
    ) -> None:
        counts = self._counts[loader]
        own = [call for call in calls if call.module is pl_module]
        found = self._find(pl_module, counts, own or list(reversed(calls)), targets)
        if found is None:
            counts.has_no_outputs = True
            return
        call, outputs, seen = found
        try:
            base = self._base_outputs(trainer, pl_module, call, calls)
        except Exception:  # a report must not cost a fit, which goes on without the numbers of the base
            if trainer.state.fn != "fit":
                raise
            base, self.compares_in_fit = None, False
        loaders = trainer.test_dataloaders if trainer.state.fn == "test" else trainer.val_dataloaders
        data_loader = _number(loaders, loader)
        replicas = trainer.world_size if data_parallel_group(trainer) is None else 0
        indices = sample_indices(data_loader, counts.seen, len(targets), replicas)
        new = first_time(data_loader, counts.seen, len(targets))
        if not self._has_looked_for_decoder:
            self._decode, self._has_looked_for_decoder = decoder(trainer), True
        counts.update(outputs, seen, base, Sources(batch, self._decode, indices, new))

    def _find(
        self, pl_module: LightningModule, counts: LoaderCounts, calls: list[Call], targets: Tensor
    ) -> tuple[Call, list[Candidate], Batch] | None:
        """Return the call with the outputs, the candidates for them, and what is known of the batch."""
        ignored = self._settings.ignore_index
        if ignored is None and isinstance(named := pl_module.hparams.get("ignore_index"), int):
            ignored = named
        possible = []
        for call in calls:
            outputs = [
                Candidate(each.place, each.tensor.detach(), each.is_named)
                for each in candidates(call.output, self._settings.output_key)
            ]
            seen = self._texts.look(call, Batch(targets, targets, ignored))
            if outputs:
                possible.append((call, outputs, seen))
        fitting = (each for each in possible if len(possible) == 1 or counts.fits(each[1], each[2]))
        return next(fitting, possible[0] if possible else None)

    def _compares(self, trainer: Trainer) -> bool:
        """Return whether to count the base, too. In `fit` this is asked for by `compares_in_fit`."""
        return trainer.state.fn != "fit" or self.compares_in_fit

    def _base_outputs(
        self, trainer: Trainer, pl_module: LightningModule, call: Call, calls: list[Call]
    ) -> list[Candidate] | None:
        if not self._compares(trainer) or not is_adapted(pl_module):
            return None
        left_out = self._left_out(pl_module)
        if call.module is not pl_module and not _holds_adapters(call, calls, pl_module, left_out):
            self._warn(
                f"{self._settings.name} cannot report the base: the step of {type(pl_module).__name__} calls "
                "several of its modules, and the input of one depends on the adapters of another. Call them in "
                "forward, and self(...) in the step."
            )
            return None
        with disabled(pl_module, left_out), trainer.precision_plugin.forward_context():
            return candidates(call.again(), self._settings.output_key)

    def _left_out(self, pl_module: LightningModule) -> list[str] | None:
        """Return the names of the adapters that the base lacks; `None` stands for all.

        Raises:
            ValueError: If one of the names in `against` is not that of active adapters.
        """
        against = self._settings.against
        if against is None:
            return None
        found = adapted_weights(pl_module)
        frozen = [weight.adapter_name for weight in found if not weight.is_trained]
        names = frozen if against == "frozen" else [against] if isinstance(against, str) else against
        active = dict.fromkeys(weight.adapter_name for weight in found)
        for name in names:
            if name not in active:
                raise ValueError(f"against={against!r}: none of the active adapters, {', '.join(active)}, is {name!r}")
        self._kept = [name for name in active if name in names]
        if not self._kept:
            self._warn(f"{self._settings.name} reports the base without adapters: none of the active ones is frozen.")
        return [name for name in active if name not in names]

    def reports(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> list[Report]:
        """Return the reports over all devices. Every device has to call this, even without samples."""
        group = data_parallel_group(trainer)
        own = {loader: dict(each.streams) for loader, each in self._counts.items()}
        summed, repeated = sum_over_devices(self._counts, group)
        reports = []
        for number, counts in summed.items():
            dataset = getattr(_number(loaders, number), "dataset", None)
            chosen = counts.decide(self._number_of_classes(trainer, pl_module, dataset))
            if not isinstance(chosen, Stream) or chosen.reading.task not in self._settings.tasks:
                self._explain(counts, chosen)
                continue
            self._warn_of_strange(chosen)
            metrics = {}
            if self._metrics is not None and trainer.state.fn != "fit":
                keys = [key for key, each in counts.streams.items() if each is chosen]
                local = own.get(number, {}).get(keys[0])
                known = None if local is None else local.metrics
                metrics = (known or self._metrics.copy(trainer.strategy.root_device)).compute(group)
            size = chosen.tally.number_of_names
            names = names_of_classes(self._given_names(trainer, dataset, size), size) if size else ()
            read_as = chosen.reading.words(chosen.width, chosen.evidence)
            loader = number if len(summed) > 1 else None
            if self._kept:
                read_as += f"; the base has the adapters {', '.join(map(repr, self._kept))}"
            report = chosen.tally.report(Context(stage, names, loader, read_as, metrics))
            reports.append(replace(report, against=tuple(self._kept)))
            if not trainer.sanity_checking:
                warn_of_repeated_samples(trainer, counts.samples, dataset, repeated[number])
        return reports

    def _explain(self, counts: LoaderCounts, chosen: Stream | Question | None) -> None:
        """Warn of what was not counted."""
        start = f"{self._settings.name} counts nothing: "
        if not counts.has_seen_any:
            return
        if isinstance(chosen, Question):
            self._warn(f"{start}{chosen.text}. {self._unread}.")
        elif isinstance(chosen, Stream):
            self._warn(
                f"{start}no logits of classes were found. {self._unread}. These are "
                f"{chosen.reading.words(chosen.width, chosen.evidence)}: ComparisonReport reports them."
            )
        else:
            for stream in counts.streams.values():
                self._warn_of_strange(stream)
            self._warn(
                f"{start}no logits of classes were found. {self._unread}. Expected logits of shape "
                "(batch, classes, ...) from forward, or outputs of the shape of the targets. If the targets are "
                "elsewhere, set target_key."
            )

    def _warn_of_strange(self, stream: Stream) -> None:
        if strange := sorted(stream.evidence.strange):
            numbers = some_of(map(str, strange))
            self._warn(
                f"{self._settings.name} ignores targets outside 0..{max(stream.width, 2) - 1}: {numbers}. If these "
                "samples should be ignored, set ignore_index."
            )

    def _given_names(self, trainer: Trainer, dataset: Any, size: int) -> Any:
        given = self._settings.class_names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if given is None:
            found = getattr(dataset, "classes", None)
            given = found if isinstance(found, list | tuple) and len(found) == size else None
        return given

    def _number_of_classes(self, trainer: Trainer, pl_module: LightningModule, dataset: Any) -> int | None:
        holders = (self._settings.class_names, getattr(getattr(trainer, "datamodule", None), "class_names", None))
        names = next((each for each in (*holders, getattr(dataset, "classes", None)) if each is not None), None)
        if isinstance(names, Sequence) and len(names):
            return len(names)
        given = pl_module.hparams.get("num_classes", getattr(pl_module, "num_classes", None))
        return given if isinstance(given, int) else None

    def _warn(self, message: str) -> None:
        start = message.partition(":")[0]
        if start not in self._warned:
            self._warned.add(start)
            rank_zero_warn(message)


def _holds_adapters(call: Call, calls: list[Call], pl_module: LightningModule, left_out: list[str] | None) -> bool:
    """Return whether the inputs of the call are independent of the adapters that the base lacks."""
    inside, layers = {id(parameter) for parameter in call.module.parameters()}, set(call.module.modules())
    first = next(each for each in calls if each.module is call.module) is call
    found = adapted_weights(pl_module)
    adapted = [weight.layer for weight in found if left_out is None or weight.adapter_name in left_out]
    in_full = (id(parameter) in inside for parameter in adapter_parameters(pl_module))
    return first and all(layer in layers for layer in adapted) and all(in_full)


def _number(loaders: Any, number: int) -> Any:
    """Return the data loader of this number."""
    each = loaders if isinstance(loaders, list | tuple) else [loaders]
    return each[number] if number < len(each) else None
