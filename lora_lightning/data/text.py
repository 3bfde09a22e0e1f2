"""Defines `TextDataModule`: labelled texts from CSV and JSONL files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lora_lightning.data.categories import categories_of
from lora_lightning.data.focus import as_list, check_classes, check_share, replay_sampler
from lora_lightning.data.in_memory import full_batches, stratified_split
from lora_lightning.data.module import ResumableDataModule
from lora_lightning.data.samplers import LengthGroupedSampler
from lora_lightning.data.text_dataset import TextDataset
from lora_lightning.data.text_files import read_texts
from lora_lightning.lora import some_of
from lora_lightning.resume.loader import ResumableLoader

Labelled = tuple[list[str], list[int]]


class TextDataModule(ResumableDataModule):
    """Texts with a label each, from CSV, TSV or JSONL files, tokenized for the model's backbone.

    Batches are `(inputs, targets)`: `inputs` maps `input_ids`, `attention_mask` and whatever else the tokenizer makes to tensors
    of shape (B, T), padded to the longest text of the batch; `targets` has class indices of shape (B,). Training
    batches hold texts of similar length. Every sample comes once an epoch, in an order that a stopped run goes on with.

    Args:
        train: The training file: `.csv`, `.tsv` or `.jsonl`.
        test: The test file. Without it, the test is on what validates.
        val: The validation file. Without it, `val_fraction` is held out of the training texts.
        predict: A file of texts to predict, which needs no labels. By default the test file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        classes: The names of all classes in the order of their indices; by default the training labels, sorted.
        tokenizer: Hub name or folder of a tokenizer of the transformers library. By default that of the model's backbone, if
            `text_backbone` made it.
        max_length: Longer texts are cut to this many tokens; by default the tokenizer's own limit.
        focus: Classes to show more often, for example one that the model is poor at.
        focus_fraction: Share of these classes in each training batch.
        token_dropout: Augmentation: probability that a token of a training text is replaced by the tokenizer's mask.
        batch_size: Training samples in a batch, on each device.
        eval_batch_size: Samples in a batch of validation, test and prediction, on each device.
        val_fraction: Share of every class that is held out for validation where `val` is not given.
        split_seed: Determines which are held out. It is not the seed of a run.

    Attributes:
        class_names: The names of all classes, once set up.

    Raises:
        ValueError: If a value is out of its range; in `setup`, if a file has no such column or labels of no class.
        FileNotFoundError: In `setup`, if there is no such file.

    Example::

        data = TextDataModule("train.csv", test="test.csv", label_column="category")
        trainer.fit(Classifier(text_backbone("sentence-transformers/all-MiniLM-L6-v2", num_classes=77)), datamodule=data)
    """

    def __init__(
        self,
        train: str | os.PathLike[str],
        test: str | os.PathLike[str] | None = None,
        val: str | os.PathLike[str] | None = None,
        predict: str | os.PathLike[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        classes: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        focus: str | list[str] | None = None,
        focus_fraction: float = 0.2,
        token_dropout: float = 0.0,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction!r}: expected a share of at least 0 and below 1.")
        if not 0 <= token_dropout < 1:
            raise ValueError(f"token_dropout={token_dropout!r}: expected a probability of at least 0 and below 1.")
        check_share(focus_fraction)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length!r}: expected at least 1.")
        self.files = {"train": train, "val": val, "test": test}
        self.predict = predict
        self.text_column, self.label_column = text_column, label_column
        self.class_names = None if classes is None else categories_of(classes)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.focus, self.focus_fraction = as_list(focus), focus_fraction
        self.token_dropout = token_dropout
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self._datasets: dict[str, TextDataset] = {}

    @override
    def setup(self, stage: str) -> None:
        if not self._datasets:
            self._read()
        assert self.class_names is not None
        expected = None if self.trainer is None else getattr(self.trainer.lightning_module, "num_classes", None)
        if expected not in (None, len(self.class_names)):
            raise ValueError(
                f"{self.files['train']} has {len(self.class_names)} classes ({', '.join(self.class_names[:3])}, ...), the model "
                f"has num_classes={expected}: set it, and the backbone's, to {len(self.class_names)}."
            )
        if stage == "predict" and self.predict is not None:
            texts, _ = read_texts(Path(self.predict), self.text_column, None)
            self._datasets["predict"] = TextDataset(texts, None, self._tokenizer(), self.max_length)

    @override
    def make_train_loader(self) -> ResumableLoader:
        dataset = self._dataset("train")
        sampler: DistributedSampler[int] = LengthGroupedSampler(dataset.lengths, self.batch_size, **self.placement())
        if self.focus is not None:
            assert self.class_names is not None
            assert dataset.targets is not None
            classes = [self.class_names.index(name) for name in self.focus]
            sampler = replay_sampler(
                dataset.targets, classes, self.batch_size, self.focus_fraction, self.placement(), dataset.lengths
            )
        return ResumableLoader(dataset, sampler=sampler, batch_size=self.batch_size, **full_batches())

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        dataset = self._dataset("val")
        if len(dataset):
            return self.eval_loader(dataset, **full_batches())
        if self.trainer is not None and self.trainer.state.fn == "validate":
            raise ValueError(
                f"val_fraction={self.val_fraction} holds nothing out to validate on, and val is not given."
            )
        return []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(self._dataset("test" if self.files["test"] is not None else "val"), **full_batches())

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict is None:
            return self.test_dataloader()
        return self.eval_loader(self._dataset("predict"), **full_batches())

    def _read(self) -> None:
        rows = {
            split: read_texts(Path(file), self.text_column, self.label_column)
            for split, file in self.files.items()
            if file is not None
        }
        if self.class_names is None:
            self.class_names = categories_of(sorted(set(rows["train"][1])))
        check_classes(self.focus, self.class_names)
        labelled = {split: self._labelled(split, *found) for split, found in rows.items()}
        if "val" not in labelled:
            texts, targets = labelled["train"]
            held_out = round(self.val_fraction * len(texts))
            kept, held = stratified_split(torch.tensor(targets), held_out, self.split_seed)
            for split, numbers in {"train": kept.tolist(), "val": held.tolist()}.items():
                labelled[split] = [texts[row] for row in numbers], [targets[row] for row in numbers]
        tokenizer = self._tokenizer()
        for split, (texts, targets) in labelled.items():
            if texts:
                dropout = self.token_dropout if split == "train" else 0.0
                self._datasets[split] = TextDataset(texts, targets, tokenizer, self.max_length, dropout)
        sizes = ", ".join(f"{len(texts):,} to {split}" for split, (texts, _) in labelled.items())
        rank_zero_info(f"Texts of {len(self.class_names):,} classes: {sizes}.")

    def _labelled(self, split: str, texts: list[str], labels: list[str]) -> Labelled:
        assert self.class_names is not None
        index = {name: number for number, name in enumerate(self.class_names)}
        if unknown := Counter(label for label in labels if label not in index):
            label, count = unknown.most_common(1)[0]
            raise ValueError(
                f"{self.files[split]} has {len(unknown)} labels of no class, {label!r} in {count} rows for one. Expected one of "
                f"{some_of(self.class_names)}."
            )
        return texts, [index[label] for label in labels]

    def _dataset(self, split: str) -> TextDataset | Any:
        if not self._datasets:
            raise RuntimeError("TextDataModule is not set up: call setup('fit') first, as Trainer does.")
        return self._datasets.get(split, ())

    def _tokenizer(self) -> Any:
        if self.tokenizer is not None:
            import transformers

            return transformers.AutoTokenizer.from_pretrained(self.tokenizer)
        modules = [] if self.trainer is None else self.trainer.lightning_module.modules()
        found = next((vars(each)["tokenizer"] for each in modules if "tokenizer" in vars(each)), None)
        if found is None:
            raise ValueError("The model's backbone has no tokenizer: give TextDataModule one, by hub name or folder.")
        return found
