"""Outputs that another implementation publishes: torchtune's, with the weights and inputs of its own tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import lora


@pytest.mark.parametrize(("use_dora", "bias", "mean"), [(False, True, 1.1252), (True, False, 0.05201)])
def test_mean_output_is_that_of_torchtune(use_dora: bool, bias: bool, mean: float) -> None:
    """Means and tolerance are those in tests/torchtune/modules/peft/test_lora.py and test_dora.py of torchtune."""
    torch.manual_seed(16)
    inputs = torch.randn(2, 32, 64)
    net = nn.Sequential(nn.Linear(64, 128, bias=bias))
    lora.attach(net, lora.LoRAConfig(rank=4, alpha=1, target_modules=["0"], use_dora=use_dora))
    with torch.no_grad():
        for parameter in net.parameters():  # the magnitude of DoRA as well
            parameter.copy_(torch.arange(0.0, 1.0, 1 / parameter.numel()).reshape(parameter.shape))
    torch.testing.assert_close(net(inputs).mean(), torch.tensor(mean), atol=1e-4, rtol=1e-6)
