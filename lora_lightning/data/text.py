"""Defines `TextDataModule`, for labelled texts in CSV, TSV and JSONL files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lora_lightning.backbone_facts import backbone_facts
from lora_lightning.checkpoints import ResumableLoader
from lora_lightning.data.categories import categories_of
from lora_lightning.data.focus import as_list, check_classes, check_share, replay_sampler
from lora_lightning.data.in_memory import full_batches, stratified_split
from lora_lightning.data.module import ResumableDataModule
from lora_lightning.data.samplers import LengthGroupedSampler
from lora_lightning.data.text_dataset import TextDataset, token_limit
from lora_lightning.data.text_files import read_texts
from lora_lightning.data.text_labels import head_labels, ordered_labels
from lora_lightning.wording import some_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labelled = tuple[list[str], list[int]]


class TextDataModule(ResumableDataModule):
    """Loads labelled texts from CSV, TSV or JSONL files and tokenizes them for the backbone of the model.

    Batches are `(inputs, targets)`. `inputs` maps `input_ids`, `attention_mask` and other outputs of the tokenizer to
    tensors of shape (B, T), padded to the longest text of the batch. `targets` contains class indices of shape (B,).
    Training batches contain texts of similar length. Every sample is used once per epoch, in an order that resumed runs
    continue.

    Args:
        train: The training file: `.csv`, `.tsv` or `.jsonl`.
        test: The test file. Without it, the test uses the validation texts.
        val: The validation file. Without it, `val_fraction` of the training texts is held out.
        predict: A file of texts to predict, without labels. By default the test file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        classes: The names of all classes in the order of their indices. By default the order of the head, if it is
            trained and its `id2label` contains the labels, else the training labels, sorted: numerically if all are
            whole numbers. A message says which.
        tokenizer: Hub name or folder of a tokenizer of the transformers library. By default that of the backbone if
            `text_backbone` created it.
        max_length: Maximum number of tokens, to which longer texts are truncated. By default the limit of the
            tokenizer.
        focus: Classes to over-represent, for example one with low recall.
        focus_fraction: Share of these classes in each training batch.
        token_dropout: Probability of replacing a token of a training text with the mask token, as augmentation.
        batch_size: Batch size in training, per device.
        eval_batch_size: Batch size in validation, test and prediction, per device.
        val_fraction: Fraction of every class that is held out for validation if `val` is not given.
        split_seed: Seed of the split, which is independent of the seed of the run.

    Attributes:
        class_names: The names of all classes, after `setup`.

    Raises:
        ValueError: If a value is out of range. In `setup`, if a column does not exist or a label is not among the
            classes.
        FileNotFoundError: In `setup`, if a file does not exist.

    Example::

        data = TextDataModule("train.csv", test="test.csv", label_column="category")
        backbone = text_backbone("sentence-transformers/all-MiniLM-L6-v2", num_classes=77)
        trainer.fit(Classifier(backbone), datamodule=data)
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

    def preprocessing_in_words(self) -> str:
        """Return a description of the preprocessing: the tokenizer."""
        tokenizer = self._tokenizer()
        limit = token_limit(tokenizer, self.max_length)
        truncation = "" if limit is None else f" at most {limit:,} tokens per text, and"
        return f"The tokenizer {tokenizer.name_or_path}, with{truncation} padding to the longest text of a batch."

    @override
    def setup(self, stage: str) -> None:
        if not self._datasets:
            self._read()
        assert self.class_names is not None
        expected = None if self.trainer is None else getattr(self.trainer.lightning_module, "num_classes", None)
        if expected not in (None, len(self.class_names)):
            raise ValueError(
                f"{self.files['train']} has {len(self.class_names)} classes ({', '.join(self.class_names[:3])}, ...), "
                f"but the model has num_classes={expected}. Set it and that of the backbone to {len(self.class_names)}."
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
            raise ValueError(f"val_fraction={self.val_fraction} leaves no texts for validation, and val is not given.")
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
        order = "as given"
        if self.class_names is None:
            modules = () if self.trainer is None else self.trainer.lightning_module.modules()
            names, order = ordered_labels(set(rows["train"][1]), head_labels(modules))
            self.class_names = categories_of(names)
        check_classes(self.focus, self.class_names)
        labelled = {split: self._labelled(split, *found) for split, found in rows.items()}
        if "val" not in labelled:
            texts, targets = labelled["train"]
            held_out = round(self.val_fraction * len(texts))
            kept_rows, held_out_rows = stratified_split(torch.tensor(targets), held_out, self.split_seed)
            for split, numbers in {"train": kept_rows.tolist(), "val": held_out_rows.tolist()}.items():
                labelled[split] = [texts[row] for row in numbers], [targets[row] for row in numbers]
        tokenizer = self._tokenizer()
        for split, (texts, targets) in labelled.items():
            if texts:
                dropout = self.token_dropout if split == "train" else 0.0
                self._datasets[split] = TextDataset(texts, targets, tokenizer, self.max_length, dropout)
        sizes = ", ".join(f"{len(texts):,} to {split}" for split, (texts, _) in labelled.items())
        rank_zero_info(f"Texts of {len(self.class_names):,} classes ({order}: {some_of(self.class_names)}): {sizes}.")

    def _labelled(self, split: str, texts: list[str], labels: list[str]) -> Labelled:
        assert self.class_names is not None
        index = {name: number for number, name in enumerate(self.class_names)}
        if unknown := Counter(label for label in labels if label not in index):
            label, count = unknown.most_common(1)[0]
            raise ValueError(
                f"{self.files[split]} has {len(unknown)} labels that are not classes, for example {label!r} in {count} "
                f"rows. Expected one of {some_of(self.class_names)}."
            )
        return texts, [index[label] for label in labels]

    def _dataset(self, split: str) -> TextDataset | Any:
        if not self._datasets:
            raise RuntimeError("TextDataModule is not set up: call setup('fit') first, as Trainer does.")
        return self._datasets.get(split, ())

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            import transformers

            return transformers.AutoTokenizer.from_pretrained(self.tokenizer)
        modules = [] if self.trainer is None else self.trainer.lightning_module.modules()
        for module in modules:
            facts = backbone_facts(module)
            if facts is not None and facts.tokenizer is not None:
                return facts.tokenizer
        raise ValueError(
            "The backbone of the model has no tokenizer: set tokenizer of TextDataModule to a hub name or a folder."
        )
