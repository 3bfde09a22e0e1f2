"""Runs with several adapters: trained ones of folders stay frozen, and new ones are trained beside them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lora_lightning import (
    Classifier,
    ConfusionReport,
    LoRAConfig,
    LoRAFinetuning,
    MNISTDataModule,
    RichBoyNet,
    load_adapter,
    lora,
    save_adapter,
)
from lora_lightning.report.layers import layer_changes
from tests.helpers import same, state, stir

MakeTrainer = Callable[..., Trainer]


def network() -> RichBoyNet:
    torch.manual_seed(1)
    return RichBoyNet(16, 8)


def data(*digits: int) -> MNISTDataModule:
    return MNISTDataModule(source="sample", batch_size=100, digits=list(digits) or None)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Adapters of two earlier trainings."""
    found = []
    for name, config in {"seven": LoRAConfig(rank=2), "eight": LoRAConfig(rank=1, target_modules=["linear1"])}.items():
        net = network()
        lora.attach(net, config)
        stir(net, 0.2)
        save_adapter(net, tmp_path / name)
        found.append(tmp_path / name)
    return found


def summed(folders: list[Path]) -> RichBoyNet:
    net = network()
    for folder in folders:
        load_adapter(net, folder, folder.name)
    lora.set_adapter(net, [folder.name for folder in folders])
    return net


def fit(make_trainer: MakeTrainer, callback: LoRAFinetuning, **arguments: Any) -> tuple[Trainer, Classifier]:
    torch.manual_seed(2)
    trainer, model = make_trainer(callback, **({"max_epochs": 1} | arguments)), Classifier(network())
    trainer.fit(model, datamodule=data(9), ckpt_path=arguments.get("ckpt_path"))
    return trainer, model


def test_a_new_adapter_is_trained_beside_frozen_ones(
    make_trainer: MakeTrainer, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    callback = LoRAFinetuning(adapter=folders, rank=3, target_modules=["linear2"])
    before = state(summed(folders))
    with caplog.at_level("INFO"):
        _, model = fit(make_trainer, callback)
    net = model.backbone
    assert lora.adapter_names(net) == ["seven", "eight", "default"]
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert {key.split(".")[-2] for key, value in net.named_parameters() if value.requires_grad} == {"default"}
    assert bool(net.linear2.lora_weight.default.lora_B.any())
    assert f"Adapter seven: {folders[0]}" in caplog.text
    assert "linear1 (eight): " in caplog.text
    assert "rank 1, scale 1, 800 parameters, frozen" in caplog.text
    assert "linear2 (default): 16 -> 8, rank 3, scale 1, 72 parameters\n" in caplog.text
    base = sum(value.numel() for value in network().parameters())
    assert f"Trained: 72 parameters, {72 / base:.3%} of the {base:,} that are frozen" in caplog.text
    rows = {row["name"] for row in layer_changes(net)}
    assert {"linear1 (seven)", "linear1 (eight)", "linear2 (default)"} <= rows

    whole = summed(folders)  # the folder of the run holds what it trained
    load_adapter(whole, Path(str(callback.adapter_folder)), "new", strict=True)
    lora.set_adapter(whole, ["seven", "eight", "new"])
    x = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(whole(x), net.eval()(x))
    lora.merge(whole)
    torch.testing.assert_close(whole(x), net(x))


def test_a_stopped_run_goes_on_to_the_same_bits(make_trainer: MakeTrainer, folders: list[Path], tmp_path: Path) -> None:
    def callback() -> LoRAFinetuning:
        return LoRAFinetuning(adapter=folders, rank=2, use_dora=True)

    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    torch.manual_seed(2)
    trainer, whole = make_trainer(callback(), files, max_epochs=2), Classifier(network())
    trainer.fit(whole, datamodule=data(9))
    half = tmp_path / "files" / "epoch=0.ckpt"
    trainer, resumed = make_trainer(callback(), max_epochs=2), Classifier(network())
    trainer.fit(resumed, datamodule=data(9), ckpt_path=half)
    assert same(state(resumed), state(whole))

    saved = torch.load(half, weights_only=True)
    description = saved["lora_lightning"]
    assert description["active"] == ["seven", "eight", "default"]
    assert description["trained"] == ["default"]
    assert description["adapters"]["backbone.linear1 (seven)"] == "rank 2, scale 1, frozen"
    assert description["adapters"]["backbone.linear1 (default)"] == "rank 2, scale 1, DoRA"
    assert not any(key.endswith("linear1.weight") for key in saved["state_dict"])  # which is the base

    with pytest.raises(ValueError, match="contains adapters that differ from those of the model"):
        make_trainer(LoRAFinetuning(adapter=folders[:1], rank=2, use_dora=True)).test(
            Classifier(network()), data(), ckpt_path=half, verbose=False
        )


def test_each_adapter_of_a_checkpoint_can_be_loaded_by_its_name(
    make_trainer: MakeTrainer, folders: list[Path], tmp_path: Path
) -> None:
    trainer, model = fit(make_trainer, LoRAFinetuning(adapter=folders, rank=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    net, x = network().eval(), torch.rand(4, 1, 28, 28)
    with pytest.raises(
        ValueError, match=r"contains the adapters 'seven', 'eight', 'default', which were active together"
    ):
        load_adapter(net, tmp_path / "run.ckpt", "other")
    assert not lora.is_adapted(net)
    for name in ("seven", "eight", "default"):
        load_adapter(net, tmp_path / "run.ckpt", name, strict=True)
    lora.set_adapter(net, ["seven", "eight", "default"])
    torch.testing.assert_close(net(x), model.backbone.eval()(x))


def test_without_settings_of_new_ones_they_are_tested_and_trained_themselves(
    make_trainer: MakeTrainer, folders: list[Path]
) -> None:
    model = Classifier(network())
    make_trainer(LoRAFinetuning(adapter=folders), ConfusionReport()).test(model, data(), verbose=False)
    assert lora.adapter_names(model.backbone) == ["seven", "eight"]
    assert same(state(model.backbone), state(summed(folders)))

    callback = LoRAFinetuning(adapter=folders)
    _, trained = fit(make_trainer, callback)
    assert all(value.requires_grad for value in lora.adapter_parameters(trained.backbone))
    assert len(lora.adapter_parameters(trained.backbone)) == 8
    again = network()
    for name in ("seven", "eight"):  # several were trained, and each has its folder
        load_adapter(again, Path(str(callback.adapter_folder)) / name, name)
    lora.set_adapter(again, ["seven", "eight"])
    x = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(again.eval()(x), trained.backbone.eval()(x))


def test_the_best_checkpoint_holds_the_new_ones(make_trainer: MakeTrainer, folders: list[Path], tmp_path: Path) -> None:
    callback = LoRAFinetuning(adapter=folders, rank=1)
    files = ModelCheckpoint(tmp_path / "files", monitor="val/loss")
    torch.manual_seed(2)
    trainer, model = make_trainer(callback, files, max_epochs=2), Classifier(network())
    trainer.fit(model, datamodule=data(9))
    beside = Path(files.best_model_path.removesuffix(".ckpt") + ".adapter")
    best = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    net = network()
    load_adapter(net, Path(str(callback.adapter_folder)))
    values = lora.adapter_state_dict(net)
    assert all(torch.equal(value, best[f"backbone.{key}"]) for key, value in values.items())
    assert (beside / "adapter_config.json").exists()


class InParts(Classifier):
    """A step that calls two children, so that the input of the second one depends on the adapters of the first."""

    def __init__(self) -> None:
        super().__init__(network())
        self.last = torch.nn.Linear(10, 10)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.last(self.backbone(batch[0]))


class TestAReportAgainstSomeOfThem:
    """The base of a report may have the frozen adapters, so that the report tells what training on them changed."""

    @staticmethod
    def matrix(net: RichBoyNet) -> torch.Tensor:
        module = data()
        module.setup("test")
        counts = torch.zeros(10, 10, dtype=torch.long)
        for batch in module.test_dataloader():
            images, digits = module.on_after_batch_transfer(batch, 0)
            for digit, predicted in zip(digits, net.eval()(images).argmax(1), strict=True):
                counts[digit, predicted] += 1
        return counts

    @pytest.fixture
    def model(self, folders: list[Path]) -> Classifier:
        net = summed(folders)
        lora.attach(net, LoRAConfig(rank=2), "new")
        stir(net, 0.2)
        lora.set_adapter(net, ["seven", "eight", "new"], trained=["new"])
        return Classifier(net)

    def report(self, make_trainer: MakeTrainer, model: Classifier, **arguments: Any) -> ConfusionReport:
        callback = ConfusionReport(**arguments)
        make_trainer(callback).test(model, data(), verbose=False)
        return callback

    @pytest.mark.parametrize(
        ("against", "kept"), [("frozen", ["seven", "eight"]), (["seven"], ["seven"]), (None, []), ("new", ["new"])]
    )
    def test_its_base_has_these_adapters(
        self, make_trainer: MakeTrainer, model: Classifier, against: str | list[str] | None, kept: list[str]
    ) -> None:
        report = self.report(make_trainer, model, against=against, verbose=False).report
        assert report is not None
        assert report.against == tuple(kept)
        assert torch.equal(report.adapted.matrix, self.matrix(model.backbone))
        other = copy.deepcopy(model.backbone)
        lora.set_adapter(other, kept) if kept else lora.detach(other)
        assert torch.equal(report.base.matrix, self.matrix(other))
        assert report.adapted.matrix.equal(report.base.matrix) is False

    def test_terminal_files_and_page_say_so(
        self, make_trainer: MakeTrainer, model: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = make_trainer(ConfusionReport(against="frozen"), logger=CSVLogger(tmp_path))
        trainer.test(model, data(), verbose=False)
        assert "; the base has the adapters 'seven', 'eight'" in capsys.readouterr().out.replace("\n", " ")
        found = json.loads((Path(trainer.log_dir) / "confusion.json").read_text())
        assert found["against"] == ["seven", "eight"]
        page = next(Path(trainer.log_dir).glob("report*.html")).read_text()
        assert "base with seven and eight" in page
        assert "The other adapters" in page

    def test_names_that_are_not_active_are_told_and_the_test_goes_on(
        self, make_trainer: MakeTrainer, model: Classifier
    ) -> None:
        with pytest.warns(UserWarning, match="none of the active adapters, seven, eight, new, is 'nine'"):
            callback = self.report(make_trainer, model, against=["seven", "nine"])
        assert callback.reports == []

    def test_without_frozen_ones_it_is_against_the_base(self, make_trainer: MakeTrainer, model: Classifier) -> None:
        lora.set_adapter(model.backbone, ["seven", "new"])
        with pytest.warns(UserWarning, match="reports the base without adapters: none of the active ones is frozen"):
            report = self.report(make_trainer, model, against="frozen").report
        lora.detach(model.backbone)
        assert report is not None
        assert torch.equal(report.base.matrix, self.matrix(model.backbone))

    def test_a_step_of_several_calls_has_a_base_only_if_its_inputs_do_not_depend_on_the_others(
        self, make_trainer: MakeTrainer
    ) -> None:
        model = InParts()
        lora.attach(model, LoRAConfig(rank=1, target_modules=["backbone.linear1"]), "first")
        stir(model, 0.2)
        lora.attach(model, LoRAConfig(rank=1, target_modules=["last"]), "second")
        stir(model, 0.2)
        lora.set_adapter(model, ["first", "second"], trained=["second"])
        with pytest.warns(UserWarning, match="cannot report the base: the step of InParts calls several"):
            report = self.report(make_trainer, model).report
        assert report is not None
        assert report.base is None
        report = self.report(make_trainer, model, against="frozen").report
        assert report is not None
        assert report.base is not None
        assert report.against == ("first",)


@pytest.mark.parametrize("names", [("a/adapter", "b/adapter"), ("v0.1", "other"), ("default", "other")])
def test_folders_whose_names_do_not_do_are_numbered(
    make_trainer: MakeTrainer, folders: list[Path], names: tuple[str, str], tmp_path: Path
) -> None:
    moved = []
    for folder, name in zip(folders, names, strict=True):
        (tmp_path / "moved" / name).parent.mkdir(parents=True, exist_ok=True)
        moved.append(folder.rename(tmp_path / "moved" / name))
    _, model = fit(make_trainer, LoRAFinetuning(adapter=moved, rank=1), fast_dev_run=True)
    assert lora.adapter_names(model.backbone) == ["adapter_1", "adapter_2", "default"]


def test_what_cannot_start_is_refused(make_trainer: MakeTrainer, folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter=\[\] names no folder"):
        fit(make_trainer, LoRAFinetuning(adapter=[], rank=2))
    with pytest.raises(FileNotFoundError, match="nowhere is not an adapter folder"):
        fit(make_trainer, LoRAFinetuning(adapter=[folders[0], tmp_path / "nowhere"], rank=2))
    in_full = []
    for name in ("one", "two"):
        net = network()
        lora.attach(net, LoRAConfig(rank=1, target_modules=["linear1"], modules_to_save=["linear3"]))
        save_adapter(net, tmp_path / name)
        in_full.append(tmp_path / name)
    with pytest.raises(ValueError, match=r"'one', 'two' cannot be active together: .* linear3.weight, linear3.bias"):
        fit(make_trainer, LoRAFinetuning(adapter=in_full))


def test_settings_in_a_configuration_count_as_those_of_new_ones() -> None:
    """A command line passes every argument with its default."""
    from dataclasses import asdict

    from lora_lightning.callbacks.lora_arguments import describes_new_adapters

    defaults = {name: value for name, value in asdict(LoRAConfig()).items() if value is not None}
    assert not describes_new_adapters({})
    assert not describes_new_adapters(copy.deepcopy(defaults))
    assert describes_new_adapters(defaults | {"rank": 4})
    assert describes_new_adapters({"rank": LoRAConfig().rank})


def test_an_average_of_weights_holds_frozen_ones_as_they_were(make_trainer: MakeTrainer, folders: list[Path]) -> None:
    """And those that are trained as their average, which is tested and written."""
    before = state(summed(folders))
    torch.manual_seed(2)
    callback, average = LoRAFinetuning(adapter=folders, rank=2), EMAWeightAveraging(decay=0.5)
    trainer, model = make_trainer(callback, average, max_epochs=2), Classifier(network())
    trainer.fit(model, datamodule=data(9))
    averaged = average._average_model.module.backbone.state_dict()
    assert all(torch.equal(averaged[key], value) for key, value in before.items())
    assert all(torch.equal(model.backbone.state_dict()[key], value) for key, value in before.items())
    net = summed(folders)
    load_adapter(net, Path(str(callback.adapter_folder)), "new")
    lora.set_adapter(net, ["seven", "eight", "new"])
    x = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(net.eval()(x), average._average_model.module.backbone.eval()(x))


@pytest.mark.parametrize("arguments", [{"rank": 2}, {"rank": 2, "lora_bias": True}, {"rank": 1, "bias": "all"}])
def test_a_full_checkpoint_holds_all_of_them_merged_and_resumes(
    make_trainer: MakeTrainer, folders: list[Path], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    def callback() -> LoRAFinetuning:
        return LoRAFinetuning(adapter=folders, checkpoints="full", **arguments)

    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    torch.manual_seed(2)
    trainer, whole = make_trainer(callback(), files, max_epochs=2), Classifier(network())
    trainer.fit(whole, datamodule=data(9))
    plain, x = Classifier(network()).eval(), torch.rand(4, 1, 28, 28)
    plain.load_state_dict(torch.load(tmp_path / "files" / "epoch=1.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(plain(x), whole.eval()(x))
    trainer, resumed = make_trainer(callback(), max_epochs=2), Classifier(network())
    trainer.fit(resumed, datamodule=data(9), ckpt_path=tmp_path / "files" / "epoch=0.ckpt")
    assert same(state(resumed), state(whole))


def test_what_was_trained_and_on_what_is_told_in_a_notebook_and_in_the_folder(
    make_trainer: MakeTrainer, folders: list[Path]
) -> None:
    callback, report = LoRAFinetuning(adapter=folders, rank=2), ConfusionReport(verbose=False)
    torch.manual_seed(2)
    make_trainer(callback, report, max_epochs=1).fit(Classifier(network()), datamodule=data(9))
    assert report.trained is not None
    found = report.trained.facts()["adapters"].replace("backbone.", "")
    assert found == "seven (frozen), eight (frozen), default on 3 weights: linear1, linear2, linear3"
    base = sum(value.numel() for value in network().parameters())
    assert report.trained.facts()["trained"] == f"1,684 parameters, {1684 / base:.3%} of the {base:,} that are frozen"
    card = (Path(str(callback.adapter_folder)) / "README.md").read_text()
    assert "Trained beside the adapters `seven` and `eight`, which stayed frozen: use it together with them." in card


def test_an_adapter_that_should_stay_frozen_and_does_not_ends_the_run_with_its_name(
    make_trainer: MakeTrainer, folders: list[Path]
) -> None:
    class Writing(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.backbone.linear1.lora_weight.seven.lora_A.mul_(1.01)

    callback = LoRAFinetuning(adapter=folders, rank=2)
    with pytest.raises(RuntimeError, match=r"frozen .* changed during training: 'linear1.lora_weight.seven.lora_A'"):
        make_trainer(callback, max_epochs=1, limit_train_batches=2).fit(Writing(network()), datamodule=data(9))
