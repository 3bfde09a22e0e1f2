"""`LoRAConfig`: which layers, at which rank and scale."""

from __future__ import annotations

import pytest

from lora_lightning import LoRAConfig


def test_alpha_follows_the_rank_so_that_the_scale_is_one() -> None:
    config = LoRAConfig(rank=4, rank_pattern={"wide": 16})
    assert config.scaling_of("narrow") == config.scaling_of("wide") == 1


def test_alpha_over_rank_is_the_scale_and_over_its_root_with_rslora() -> None:
    assert LoRAConfig(rank=4, alpha=8).scaling_of("x") == 2
    assert LoRAConfig(rank=4, alpha=8, use_rslora=True).scaling_of("x") == 4


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        ("all", {"linear1", "block.linear1", "block.linear12"}),
        (["linear1"], {"linear1", "block.linear1"}),
        (["block.linear1"], {"block.linear1"}),
        (r".*linear1\d?", {"linear1", "block.linear1", "block.linear12"}),
        ("linear1", {"linear1"}),
    ],
)
def test_targets_are_names_endings_after_a_dot_or_an_expression(targets: str | list[str], selected: set[str]) -> None:
    config = LoRAConfig(target_modules=targets)
    assert {name for name in ("linear1", "block.linear1", "block.linear12") if config.selects(name)} == selected


def test_excluded_layers_are_left_out() -> None:
    config = LoRAConfig(exclude_modules=["head"])
    assert config.selects("body")
    assert not config.selects("head")
    assert not config.selects("model.head")


def test_the_first_pattern_that_matches_counts() -> None:
    config = LoRAConfig(rank=1, alpha=2, rank_pattern={"a": 3, ".*": 5}, alpha_pattern={"b": 7})
    assert [config.rank_of(name) for name in ("a", "x.a", "b")] == [3, 3, 5]
    assert [config.alpha_of(name) for name in ("a", "b", "x.b")] == [2, 7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0: a LoRA rank is a whole number of at least 1, for example rank=8."),
        ({"rank": -3}, "rank=-3: a LoRA rank"),
        ({"rank": True}, "rank=True: a LoRA rank"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\]=0: a LoRA rank"),
        ({"alpha": 0}, "alpha=0: alpha is a finite number above 0"),
        ({"alpha": float("nan")}, "alpha=nan: alpha is a finite number"),
        ({"alpha_pattern": {"a": -1.0}}, r"alpha_pattern\['a'\]=-1.0: alpha"),
        ({"dropout": 1.0}, "dropout=1.0: expected a probability of at least 0 and below 1"),
        ({"init": "zeros"}, "init='zeros': expected one of kaiming, gaussian, pissa"),
        ({"target_modules": []}, "target_modules=.*selects nothing"),
        ({"target_modules": "(("}, r"target_modules='\(\(' is not a regular expression"),
        ({"exclude_modules": "["}, r"exclude_modules='\[' is not a regular expression"),
    ],
)
def test_a_value_out_of_range_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**arguments)
