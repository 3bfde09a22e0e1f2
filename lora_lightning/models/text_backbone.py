"""Defines `text_backbone`, which builds a sequence classifier of the transformers library by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.backbone_facts import BackboneFacts, set_backbone_facts
from lora_lightning.models.backbones import library
from lora_lightning.models.weights import none_of_words


def text_backbone(
    name: str, num_classes: int | None = None, weights: str | None = "pretrained", pooling: str | None = None
) -> nn.Module:
    """Build a text classifier for `Classifier(backbone=...)`.

    The network is that of the library with an additional attribute, `backbone_facts`: its `tokenizer`, which
    `TextDataModule` uses, and its `new_head`, the names of the last layers that are not in the weights, which
    `LoRAFinetuning` trains in full.

    Args:
        name: Hub name or folder of a model of the transformers library, for example
            `sentence-transformers/all-MiniLM-L6-v2`.
        num_classes: Number of classes. `None` keeps the classes of the weights.
        weights: `"pretrained"`, or `None` for random weights with the same configuration.
        pooling: `"mean"` classifies the mean of the last hidden states of all tokens with a new linear layer, which
            suits models of the sentence-transformers library. `None` uses the classifier of the library.

    Raises:
        ValueError: If a value is out of range, or if the package transformers is not installed.
        OSError: If the model does not exist.
    """
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: expected at least 2.")
    weights = none_of_words(weights)
    if weights not in (None, "pretrained"):
        raise ValueError(f"weights={weights!r}: expected 'pretrained', or null for random ones.")
    if pooling not in (None, "mean") or (pooling and num_classes is None):
        raise ValueError(f"pooling={pooling!r}: expected null, or 'mean' with num_classes.")
    transformers = library("transformers", f"text_backbone({name!r})")
    options: dict[str, Any] = {} if num_classes is None else {"num_labels": num_classes}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model_class = transformers.AutoModel if pooling else transformers.AutoModelForSequenceClassification
    new_head: list[str] = []
    if weights is None:
        network = model_class.from_config(transformers.AutoConfig.from_pretrained(name, **options))
    else:
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        network, found = model_class.from_pretrained(name, **options)
        missing = set(found["missing_keys"]) | {key for key, *_ in found["mismatched_keys"]}
        new_head = sorted({key.partition(".")[0] for key in missing} - {network.base_model_prefix})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.config.pad_token_id = network.config.pad_token_id or tokenizer.pad_token_id
    if pooling:
        assert num_classes is not None
        network, new_head = MeanPooling(network, num_classes), ["classifier"]
    set_backbone_facts(network, BackboneFacts(tuple(new_head), tokenizer=tokenizer))
    network.train()  # the library returns it in evaluation mode
    return network  # type: ignore[no-any-return]


class MeanPooling(nn.Module):
    """Classifies the mean of the last hidden states of all tokens except padding.

    Args:
        encoder: A model of the transformers library that returns `last_hidden_state` of shape (B, T, H).
        num_classes: Number of classes C.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes)  # type: ignore[union-attr, arg-type]

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return logits of shape (B, C)."""
        states = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.classifier((states * weights).sum(1) / weights.sum(1).clamp(min=1))
        return logits
