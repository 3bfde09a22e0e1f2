"""Adapter folders of others, and folders on another base than they were trained on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import attach, is_adapted, merge, merged
from tests.helpers import stir
from tests.lora.architectures import inputs, make


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class TestAnotherBase:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        torch.manual_seed(1)
        base = net()
        attach(base, LoRAConfig(rank=2))
        stir(base, 0.05)
        save_adapter(base, tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_is_a_warning_that_names_both_fingerprints(self, folder: Path) -> None:
        torch.manual_seed(2)
        with pytest.warns(
            UserWarning, match=r"was trained on another base: its fingerprint is \w{12}, that of this base \w{12}"
        ):
            load_adapter(net(), folder)

    def test_is_refused_if_asked_to_and_nothing_changes(self, folder: Path) -> None:
        torch.manual_seed(2)
        other = net()
        with pytest.raises(ValueError, match="was trained on another base"):
            load_adapter(other, folder, strict=True)
        assert not is_adapted(other)

    def test_the_same_base_is_neither(self, folder: Path) -> None:
        torch.manual_seed(1)
        load_adapter(net(), folder, strict=True)

    def test_a_base_that_was_trained_on_is_another_one(self, folder: Path) -> None:
        torch.manual_seed(1)
        other = net()
        with torch.no_grad():
            other[2].weight[0, 0] += 1e-6
        with pytest.raises(ValueError, match="was trained on another base"):
            load_adapter(other, folder, strict=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_another_precision_is_told_from_another_base(self, folder: Path, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="was trained on this base in another precision"):
            load_adapter(net().to(dtype), folder, strict=True)
        torch.manual_seed(2)
        with pytest.raises(ValueError, match="was trained on another base"):
            load_adapter(net().to(dtype), folder, strict=True)

    def test_heads_that_come_with_the_adapters_are_no_part_of_the_base(self, tmp_path: Path) -> None:
        base = net()
        adapted = copy.deepcopy(base)
        attach(adapted, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"]))
        stir(adapted, 0.05)
        save_adapter(adapted, tmp_path)
        with torch.no_grad():
            base[2].weight.zero_()
        load_adapter(base, tmp_path, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_quantized_base_loads_adapters_and_is_told_from_another_one(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    adapted = copy.deepcopy(base)
    attach(adapted, LoRAConfig(rank=2))
    stir(adapted, 0.05)
    save_adapter(adapted, tmp_path)
    torchao.quantization.quantize_(base, torchao.quantization.Int8WeightOnlyConfig())
    with pytest.warns(UserWarning, match="was trained on this base in another precision"):
        load_adapter(base, tmp_path, strict=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(base(x), adapted(x), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
class TestTransformers:
    """Both ways with PEFT, on layers that the transformers library has classes of its own for."""

    @pytest.fixture(autouse=True)
    def _libraries(self) -> None:
        pytest.importorskip("transformers")
        pytest.importorskip("peft")

    def from_peft(self, name: str, folder: Path, **arguments: object) -> None:
        import peft

        base, batch = make(name, tie_word_embeddings=False).eval(), inputs(name)
        other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **arguments))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
        with torch.no_grad():
            logits = other.eval()(**batch).logits
            other.save_pretrained(folder)
            here = copy.deepcopy(base)
            load_adapter(here, folder)
            torch.testing.assert_close(here(**batch).logits, logits, rtol=1e-4, atol=1e-5)
            with merged(here):
                torch.testing.assert_close(here(**batch).logits, logits, rtol=1e-4, atol=1e-5)

    def to_peft(self, name: str, folder: Path, **arguments: object) -> None:
        import peft

        base, batch = make(name, tie_word_embeddings=False).eval(), inputs(name)
        here = copy.deepcopy(base)
        with torch.no_grad():
            plain = here(**batch).logits
            attach(here, LoRAConfig(rank=4, **arguments))
            assert torch.equal(here.eval()(**batch).logits, plain)  # a fresh adapter changes no bit
        stir(here, 0.05)
        save_adapter(here, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        with torch.no_grad():
            logits = here(**batch).logits
            torch.testing.assert_close(other.eval()(**batch).logits, logits, rtol=1e-4, atol=1e-5)
            merge(here)
            torch.testing.assert_close(here(**batch).logits, logits, rtol=1e-4, atol=1e-5)

    def test_peft_saves_a_pre_classifier_with_the_classifier(self, tmp_path: Path) -> None:
        arguments = {"target_modules": ["q_lin", "v_lin"], "modules_to_save": ["classifier"]}
        self.from_peft("distilbert", tmp_path, **arguments)
        assert "pre_classifier.weight" in (tmp_path / "adapter_model.safetensors").read_bytes()[:4000].decode(
            errors="ignore"
        )

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
    def test_peft_saves_the_base_weight_of_an_adapted_embedding(self, tmp_path: Path) -> None:
        self.from_peft("opt", tmp_path, target_modules=["embed_tokens", "q_proj"])
        assert b"embed_tokens.base_layer.weight" in (tmp_path / "adapter_model.safetensors").read_bytes()[:8000]

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
    def test_which_tells_another_base(self, tmp_path: Path) -> None:
        import peft

        base = make("opt", tie_word_embeddings=False)
        other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
        other.save_pretrained(tmp_path)
        with torch.no_grad():
            base.get_input_embeddings().weight += 1
        with pytest.warns(UserWarning, match=r"another base: .*embed_tokens.weight in the folder differs"):
            load_adapter(copy.deepcopy(base), tmp_path)
        with pytest.raises(ValueError, match="another base"):
            load_adapter(base, tmp_path, strict=True)

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
    def test_falcon_and_gemma(self, tmp_path: Path) -> None:
        self.from_peft("falcon", tmp_path / "1", target_modules=["query_key_value", "dense"])
        self.to_peft("falcon", tmp_path / "2", target_modules=["query_key_value", "dense"], dropout=0.1)
        self.from_peft("gemma3_text", tmp_path / "3", target_modules=["embed_tokens", "q_proj"])
        self.to_peft("gemma3_text", tmp_path / "4", target_modules=["embed_tokens", "q_proj"])

    def test_layers_that_peft_would_drop_are_kept_from_it(self, tmp_path: Path) -> None:
        import peft

        base, batch = make("deepseek_v3").eval(), inputs("deepseek_v3")
        here = copy.deepcopy(base)
        attach(here, LoRAConfig(rank=4, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"]))
        stir(here, 0.05)
        save_adapter(here, tmp_path)
        with pytest.raises((ValueError, KeyError), match="LORA_LIGHTNING"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, here(**batch).logits)


class Regularized(nn.Module):
    """A module that reads a weight for something else than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)

    def l2(self) -> torch.Tensor:
        return self.fc.weight.norm()


def test_a_module_that_reads_a_weight_for_a_penalty_writes_a_folder_of_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, x = Regularized(), torch.randn(3, 8)
    net = copy.deepcopy(base)
    attach(net, LoRAConfig(rank=2))
    stir(net)
    save_adapter(net, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), net(x))
    with merged(net):
        dense = net.l2()
    torch.testing.assert_close(net.l2(), dense)
    assert not torch.allclose(dense, base.l2())
