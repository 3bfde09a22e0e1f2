"""A data set of tokenized texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TextDataset(Dataset[Any]):
    """Hands out full batches of token ids, padded to the longest text of the batch.

    A batch is `(inputs, targets)`: `inputs` has what the tokenizer makes, `input_ids` and `attention_mask` of shape (B, T);
    `targets` has class indices of shape (B,). Without targets, a batch is `inputs` alone.

    Args:
        texts: The texts.
        targets: Class indices, one a text; `None` for texts to predict.
        tokenizer: A tokenizer of the transformers library.
        max_length: Longer texts are cut to this many tokens; `None` for the tokenizer's own limit.
    """

    def __init__(
        self, texts: Sequence[str], targets: Sequence[int] | None, tokenizer: Any, max_length: int | None
    ) -> None:
        self.texts = list(texts)
        self.targets = None if targets is None else torch.tensor(targets, dtype=torch.long)
        self.tokenizer = tokenizer
        limited = max_length is not None or tokenizer.model_max_length < 1_000_000  # a huge number stands for no limit
        encoded = tokenizer(self.texts, truncation=limited, max_length=max_length)
        self._samples = [{key: encoded[key][row] for key in encoded} for row in range(len(self.texts))]
        self.lengths = [len(sample["input_ids"]) for sample in self._samples]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a full batch: `DataLoader` calls this instead of `__getitem__` for each sample."""
        samples = [self._samples[index] for index in indices or [0]]
        padded = self.tokenizer.pad(samples, return_tensors="pt")
        # A device without samples gets a batch of the right shape with none in it.
        inputs: dict[str, Tensor] = {key: value[: len(indices)] for key, value in padded.items()}
        return inputs if self.targets is None else (inputs, self.targets[torch.tensor(indices, dtype=torch.long)])
