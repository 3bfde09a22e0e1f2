"""Defines a data set of tokenized texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.augmentation import drop_tokens, seed_of_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextBatch = dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]
"""Inputs, with class indices if there are any."""


class TextDataset(Dataset[TextBatch]):
    """Returns full batches of token ids, padded to the longest text of the batch.

    A batch is `(inputs, targets)`. `inputs` contains the outputs of the tokenizer, such as `input_ids` and
    `attention_mask` of shape (B, T). `targets` contains class indices of shape (B,). Without targets, a batch is
    `inputs`.

    Args:
        texts: The texts.
        targets: Class index of each text, or `None` for texts to predict.
        tokenizer: A tokenizer of the transformers library.
        max_length: Maximum number of tokens, to which longer texts are truncated. `None` uses the limit of the
            tokenizer.
        token_dropout: Share of the tokens that are replaced with the mask token, chosen again in every epoch.

    Raises:
        ValueError: If `token_dropout` is not 0 and the tokenizer has neither a mask token nor an unknown token.
    """

    def __init__(
        self,
        texts: Sequence[str],
        targets: Sequence[int] | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        token_dropout: float = 0.0,
    ) -> None:
        self.texts = list(texts)
        self.targets = None if targets is None else torch.tensor(targets, dtype=torch.long)
        self.tokenizer = tokenizer
        limited = token_limit(tokenizer, max_length) is not None
        encoded = tokenizer(self.texts, truncation=limited, max_length=max_length)
        self._samples = [{key: encoded[key][row] for key in encoded} for row in range(len(self.texts))]
        self.token_dropout = token_dropout
        self.epoch = 0
        self.dropped = _replacement_token(tokenizer, token_dropout) if token_dropout else 0
        self.lengths = [len(sample["input_ids"]) for sample in self._samples]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> TextBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        """Return a full batch. `DataLoader` calls this once instead of `__getitem__` for each sample."""
        samples = [self._sample(index) for index in indices or [0]]
        padded = self.tokenizer.pad(samples, return_tensors="pt")
        # A device without samples gets an empty batch of the right shape.
        inputs: dict[str, Tensor] = {key: value[: len(indices)] for key, value in padded.items()}
        return inputs if self.targets is None else (inputs, self.targets[torch.tensor(indices, dtype=torch.long)])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the dropped tokens."""
        self.epoch = epoch

    def _sample(self, index: int) -> dict[str, Any]:
        sample = self._samples[index]
        if not self.token_dropout:
            return sample
        ids = sample["input_ids"]
        special = torch.tensor(
            self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True), dtype=torch.bool
        )
        seed = seed_of_sample(self.epoch, index)
        kept = drop_tokens(torch.tensor(ids), special, self.token_dropout, self.dropped, seed)
        return sample | {"input_ids": kept.tolist()}


def token_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """Return the maximum number of tokens of a text, or `None` if there is no limit."""
    if max_length is not None:
        return max_length
    limit = int(tokenizer.model_max_length)
    return limit if limit < 1_000_000 else None  # a huge number means that there is no limit


def _replacement_token(tokenizer: PreTrainedTokenizerBase, token_dropout: float) -> int:
    """Return the token that replaces dropped ones: the mask token, or else the unknown token."""
    found = tokenizer.unk_token_id if tokenizer.mask_token is None else tokenizer.mask_token_id
    if found is None:
        raise ValueError(
            f"token_dropout={token_dropout}: {type(tokenizer).__name__} has neither a mask token nor an unknown token "
            "to insert. Set it to 0."
        )
    return int(found)
