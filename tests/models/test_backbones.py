"""Backbones by name: from torchvision, timm and transformers, with weights from files that are what they say."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, VGG13_Weights

from lora_lightning import Classifier, ImageFolderDataModule, LoRAFinetuning, image_backbone
from lora_lightning.backbone_facts import BackboneFacts, HasBackboneFacts, backbone_facts, set_backbone_facts
from lora_lightning.lora import is_adapted
from lora_lightning.models import weights
from lora_lightning.models.backbones import head_of
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]
EVERY = torchvision.models.list_models(module=torchvision.models)
ONE_OF_EACH_KIND = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11",
    "vit_b_32",
]  # fmt: skip


def random_resnet(num_classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return torchvision.models.resnet18(num_classes=num_classes).state_dict()


def hashed(folder: Path, state: Any, name: str = "resnet18", *, legacy: bool = False) -> Path:
    """A file as torchvision names its own, with the first digits of its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "new.pth", _use_new_zipfile_serialization=not legacy)
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    return (folder / "new.pth").rename(folder / f"{name}-{digest}.pth")


def with_a_flipped_bit(content: bytes) -> bytes:
    """Return other bytes, whatever the last one is: the order in which PyTorch writes storages varies."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision keeps what it downloaded: nothing so far."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the file that torchvision's address of ResNet-18's weights leads to."""
    path = hashed(tmp_path / "published", random_resnet(), legacy=True)
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", path.as_uri())
    return path


class TestTorchvisionsWeights:
    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
    def test_are_downloaded_once_by_name(self, name: str, published: Path, hub: Path) -> None:
        for _ in range(2):
            assert same(dict(image_backbone("resnet18", name).state_dict()), dict(random_resnet()))
            published.unlink(missing_ok=True)
        assert [path.name for path in hub.iterdir()] == [published.name]

    def test_are_refused_if_the_download_has_another_hash(self, published: Path, hub: Path) -> None:
        published.write_bytes(with_a_flipped_bit(published.read_bytes()))
        with pytest.raises(
            ValueError, match=r"resnet18-.*.pth: the downloaded file does not match the checksum in its name"
        ):
            image_backbone("resnet18", "IMAGENET1K_V1")
        assert not list(hub.iterdir())

    def test_are_refused_if_the_file_that_was_downloaded_has_changed(self, published: Path, hub: Path) -> None:
        image_backbone("resnet18", "IMAGENET1K_V1")
        (hub / published.name).write_bytes(with_a_flipped_bit(published.read_bytes()))
        with pytest.raises(ValueError, match=rf"{published.name} is damaged, or another file: its SHA-256"):
            image_backbone("resnet18", "IMAGENET1K_V1")

    def test_are_compared_with_a_hash_without_letters_too(
        self, published: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        named = "vgg13-19584684.pth"  # torchvision's name, which could be a date
        assert any(named in entry.url for entry in VGG13_Weights)
        monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"https://download.pytorch.org/{named}")
        for folder, asked in ((hub, "IMAGENET1K_V1"), (tmp_path / "copy", str(tmp_path / "copy" / named))):
            folder.mkdir(parents=True)
            (folder / named).write_bytes(published.read_bytes())
            with pytest.raises(ValueError, match=rf"{named} is damaged, or another file: .* instead of 19584684"):
                image_backbone("resnet18", asked)

    def test_without_a_network_say_where_the_file_goes(self, published: Path, hub: Path) -> None:
        published.unlink()
        with pytest.raises(
            RuntimeError,
            match=rf"cannot be downloaded .* Save the file as {hub}/{published.name}, set weights to its path",
        ):
            image_backbone("resnet18", "IMAGENET1K_V1")

    def test_are_taken_from_a_copy_as_torchvision_takes_them(self, published: Path, tmp_path: Path, hub: Path) -> None:
        copy = (tmp_path / "usb stick").resolve()
        copy.mkdir()
        published.rename(copy / published.name)
        backbone = image_backbone("resnet18", str(copy / published.name))
        assert same(dict(backbone.state_dict()), dict(random_resnet()))
        assert not hub.exists()
        assert torch.hub.get_dir() == str(hub.parent)

    def test_of_a_copy_with_another_hash_are_refused(self, published: Path) -> None:
        published.write_bytes(with_a_flipped_bit(published.read_bytes()))
        with pytest.raises(ValueError, match=rf"{published} is damaged, or another file"):
            image_backbone("resnet18", str(published))


class TestAFile:
    def test_with_a_hash_in_its_name(self, tmp_path: Path) -> None:
        path = hashed(tmp_path, random_resnet(), "mine")
        assert same(dict(image_backbone("resnet18", str(path)).state_dict()), dict(random_resnet()))
        wrong = path.rename(tmp_path / "mine-0123abcd.pth")
        with pytest.raises(ValueError, match=r"mine-0123abcd.pth is damaged, or .* instead of 0123abcd"):
            image_backbone("resnet18", str(wrong))

    def test_with_a_date_in_its_name(self, tmp_path: Path) -> None:
        path = hashed(tmp_path, random_resnet()).rename(tmp_path / "resnet18-20261122.pth")
        assert same(dict(image_backbone("resnet18", str(path)).state_dict()), dict(random_resnet()))

    def test_of_safetensors(self, tmp_path: Path) -> None:
        save_file(random_resnet(), tmp_path / "mine.safetensors")
        backbone = image_backbone("resnet18", str(tmp_path / "mine.safetensors"))
        assert same(dict(backbone.state_dict()), dict(random_resnet()))

    def test_of_another_number_of_classes_brings_its_head(self, tmp_path: Path) -> None:
        path = str(hashed(tmp_path, random_resnet(3)))
        for num_classes in (None, 3):
            backbone = image_backbone("resnet18", path, num_classes)
            assert same(dict(backbone.state_dict()), dict(random_resnet(3)))
            assert backbone.backbone_facts.new_head == ()
        assert image_backbone("resnet18", path, 5).fc.out_features == 5

    def test_of_a_network_that_needs_numbers_to_be_built(self, tmp_path: Path) -> None:
        state = torchvision.models.regnet_x_400mf(num_classes=3).state_dict()
        path = str(hashed(tmp_path, state, "mine"))
        assert same(dict(image_backbone("regnet_x_400mf", path).state_dict()), dict(state))

    def test_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        state = random_resnet()
        state["conv1.weight"] = state["conv1.weight"][:, :1]
        torch.save(state, tmp_path / "grey.pth")
        with pytest.raises(
            ValueError,
            match=r"grey.pth does not fit this ResNet: conv1.weight is \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)",
        ):
            image_backbone("resnet18", str(tmp_path / "grey.pth"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"state_dict": {}}, "contains a dictionary of state_dict; expected a state dict"),
            ([1], "contains <class 'list'>; expected"),
        ],
    )
    def test_that_holds_something_else_is_refused(self, content: Any, message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            image_backbone("resnet18", str(tmp_path / "other.pth"))

    @pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
    def test_that_ends_too_early_is_refused(self, name: str, tmp_path: Path) -> None:
        hashed(tmp_path, random_resnet()).rename(tmp_path / "cut.pth")
        save_file(random_resnet(), tmp_path / "cut.safetensors")
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        with pytest.raises(ValueError, match=f"{name} is damaged or no"):
            image_backbone("resnet18", str(tmp_path / name))

    def test_that_is_missing_may_be_a_misspelt_name(self) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"weights='IMAGENET_V1' is not a file. Did you mean IMAGENET1K_V1\?"
        ):
            image_backbone("resnet18", "IMAGENET_V1")


class TestHead:
    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("resnet18", "fc"),
            ("squeezenet1_1", "classifier.1"),
            ("mobilenet_v3_small", "classifier.3"),
            ("shufflenet_v2_x0_5", "fc"),
            ("timm/test_vit", "head"),
            ("timm/test_resnet", "fc"),
        ],
    )
    def test_of_another_number_of_classes_is_a_new_layer(self, name: str, head: str) -> None:
        backbone = image_backbone(name, num_classes=3)
        assert backbone.backbone_facts.new_head == (head,)
        assert backbone.eval()(torch.randn(2, 3, *_size(backbone))).shape == (2, 3)
        assert image_backbone(name).backbone_facts.new_head == ()

    @pytest.mark.parametrize(
        "names", [ONE_OF_EACH_KIND, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["one of each kind", "all"]
    )
    def test_is_the_last_layer_of_every_network_of_torchvision(self, names: list[str]) -> None:
        for name in names:
            options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
            # RegNets can't be built without numbers; the small ones stand for all.
            if name.startswith("regnet") and not name.endswith("400mf"):
                continue
            with torch.device("cpu" if name.startswith("regnet") else "meta"):
                network = torchvision.models.get_model(name, **options)
            layers = {key: layer for key, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
            main = [
                key for key, layer in layers.items() if len(layer.weight) == 1000 and not key.startswith(("aux", "Aux"))
            ]
            assert main == [head_of(network)], name

    def test_is_trained_whole_beside_the_adapters(self, tmp_path: Path, make_trainer: MakeTrainer) -> None:
        model = Classifier(image_backbone("timm/test_resnet", num_classes=2), num_classes=2)
        before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1, limit_val_batches=0)
        trainer.fit(model, datamodule=ImageFolderDataModule(images(tmp_path), num_workers=0))
        after = model.backbone.state_dict()
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == {"fc.weight", "fc.bias"}
        assert is_adapted(model)

    def test_has_two_classes_at_least(self) -> None:
        with pytest.raises(ValueError, match="num_classes=1: expected at least 2"):
            image_backbone("resnet18", num_classes=1)


def images(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            noise = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(folder / "images" / name / f"{number}.png")
    return folder / "images"


def _size(backbone: nn.Module) -> tuple[int, int]:
    tensor = backbone.backbone_facts.preprocessing(Image.new("RGB", (300, 300)))
    return tensor.shape[1], tensor.shape[2]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    backbone = image_backbone(name, num_classes=3)
    assert backbone.backbone_facts.new_head == ("fc",)
    assert backbone.train()(torch.randn(2, 3, *_size(backbone))).shape == (2, 3)


def test_norm_layers_of_random_backbones_pass_a_signal() -> None:
    backbone = image_backbone("efficientnet_b0").eval()
    with torch.no_grad():
        assert backbone(torch.randn(4, 3, 224, 224)).std() > 0.05
        assert torchvision.models.efficientnet_b0().eval()(torch.randn(4, 3, 224, 224)).std() < 1e-6
    assert all(
        norm.momentum == 0.1 or norm.momentum == 0.01 for norm in backbone.modules() if isinstance(norm, nn.BatchNorm2d)
    )
    assert all(module.training for module in image_backbone("resnet18").modules())


def test_random_backbones_depend_on_the_seed_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(dict(image_backbone("resnet18").state_dict()))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


class TestTransformers:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        import transformers

        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, num_labels=4,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
        return f"transformers/{tmp_path / 'vit'}"

    def test_a_folder_is_a_backbone(self, folder: str, tmp_path: Path, make_trainer: MakeTrainer) -> None:
        model = Classifier(image_backbone(folder, "pretrained", num_classes=2), num_classes=2)
        before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2, limit_val_batches=0)
        trainer.fit(model, datamodule=ImageFolderDataModule(images(tmp_path), num_workers=0))
        after = model.backbone.state_dict()
        assert {key for key in before if not torch.equal(before[key], after[key])} == {
            "classifier.weight",
            "classifier.bias",
        }
        assert trainer.callback_metrics["train/loss"] > 0

    def test_weights_are_those_of_the_folder_or_random(self, folder: str) -> None:
        first, second = (dict(image_backbone(folder, "pretrained").state_dict()) for _ in range(2))
        assert same(first, second)
        assert not same(first, dict(image_backbone(folder).state_dict()))
        with pytest.raises(ValueError, match=r"weights='IMAGENET1K_V1': expected null or 'pretrained'"):
            image_backbone(folder, "IMAGENET1K_V1")


class TestTimm:
    def test_weights_come_from_a_file(self, tmp_path: Path) -> None:
        state = image_backbone("timm/test_resnet").state_dict()
        path = hashed(tmp_path, dict(state), "test")
        assert same(dict(image_backbone("timm/test_resnet", str(path)).state_dict()), dict(state))

    def test_an_unknown_name_is_refused_with_others(self) -> None:
        with pytest.raises(
            ValueError, match=r"timm has no network 'vit_bas_patch16_224'. Did you mean .*vit_base_patch16_224"
        ):
            image_backbone("timm/vit_bas_patch16_224")


def test_an_unknown_name_is_refused_with_close_matches() -> None:
    with pytest.raises(
        ValueError, match=r"torchvision has no classification network 'resnet81'. Did you mean resnet18"
    ):
        image_backbone("resnet81")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/resnet18 needs the package timm: pip install timm"):
        image_backbone("timm/resnet18")


def test_a_wrong_hash_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hashed(tmp_path, random_resnet()).rename(tmp_path / "resnet18-0123abcd.pth")
    monkeypatch.setattr(weights.torch, "load", lambda *args, **kwargs: pytest.fail("it is read"))
    with pytest.raises(ValueError, match="is damaged"):
        image_backbone("resnet18", str(path))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_facts_travel_with_a_network_and_are_no_part_of_it(copied: Callable[[nn.Module], nn.Module]) -> None:
    backbone = image_backbone("resnet18", num_classes=3)
    assert isinstance(backbone, HasBackboneFacts)
    preprocessing = backbone.backbone_facts.preprocessing
    assert isinstance(preprocessing, nn.Module)
    assert preprocessing not in set(backbone.modules())
    assert backbone.state_dict().keys() == random_resnet(3).keys()
    facts = backbone_facts(copied(backbone))
    assert facts is not None
    assert facts.new_head == ("fc",)
    assert repr(facts.preprocessing) == repr(preprocessing)


def test_a_plain_network_has_no_facts_until_they_are_set() -> None:
    network = nn.Linear(2, 2)
    assert backbone_facts(network) is None
    assert backbone_facts(None) is None
    set_backbone_facts(network, BackboneFacts(("",)))
    assert backbone_facts(network) == BackboneFacts(("",))
