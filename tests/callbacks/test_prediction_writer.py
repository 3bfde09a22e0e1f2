"""What a model takes each sample for: a line each, and a table on disk."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import Classifier, MNISTDataModule, PredictionWriter, RichBoyNet

MakeTrainer = Callable[..., Trainer]
LOGITS = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, 5.0]])


class Data(LightningDataModule):
    """Three samples whose logits are their values."""

    predict_files = (Path("a/one.png"), Path("a/b/two.png"), Path("a/three.png"))
    class_names = ("cat", "dog", "sea [red]eel")

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(list(LOGITS), batch_size=2)


def predicted(trainer: Trainer, model: Any = None, data: Any = None) -> list[dict[str, str]]:
    trainer.predict(model or Classifier(nn.Identity(), num_classes=3), datamodule=data or Data())
    with (Path(trainer.log_dir) / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_file_gets_a_line_with_its_likeliest_classes(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predicted(make_trainer(PredictionWriter(top_k=2)))
    *lines, where = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert where.endswith("version_0/predictions.csv")
    assert lines == [
        "one.png    dog 84.4 %  (sea [red]eel 11.4 %)",
        "b/two.png  cat 66.5 %  (dog 24.5 %)",
        "three.png  sea [red]eel 97.6 %  (cat 1.8 %)",
    ]
    assert [row["file"] for row in rows] == ["a/one.png", "a/b/two.png", "a/three.png"]
    assert [row["category"] for row in rows] == ["dog", "cat", "sea [red]eel"]
    assert [row["class"] for row in rows] == ["1", "0", "2"]
    assert [float(row["probability"]) for row in rows] == pytest.approx(LOGITS.softmax(1).amax(1).tolist())
    assert list(rows[0]) == ["file", "class", "category", "probability", "category_2", "probability_2"]
    assert rows[0]["category_2"] == "sea [red]eel"


@pytest.mark.parametrize("has_file", [True, False])
def test_of_many_samples_ten_are_printed_and_the_file_has_all(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], has_file: bool
) -> None:
    trainer = make_trainer(PredictionWriter(), **({} if has_file else {"logger": False}))
    model, data = Classifier(nn.Identity(), num_classes=3), DataLoader(torch.randn(200, 3), batch_size=32)
    trainer.predict(model, data)
    lines = capsys.readouterr().out.splitlines()
    if has_file:
        assert [line.split()[0] for line in lines[:10]] == [str(number) for number in range(10)]
        assert lines[10] == "and 190 more"
        assert len(lines) == 12
        with Path(lines[11].partition(" ")[2]).open() as file:
            assert len(list(csv.DictReader(file))) == 200
    else:
        assert len(lines) == 200, "nothing else has them"


def test_more_classes_than_there_are_is_all_of_them(make_trainer: MakeTrainer) -> None:
    assert "probability_3" in predicted(make_trainer(PredictionWriter(top_k=9)))[0]


def test_without_files_and_names_there_are_numbers(make_trainer: MakeTrainer) -> None:
    class Bare(Data):
        predict_files = ()
        class_names = None

    rows = predicted(make_trainer(PredictionWriter()), data=Bare())
    assert [(row["file"], row["category"]) for row in rows] == [("0", "1"), ("1", "0"), ("2", "2")]


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # Lightning's, of every iterable data set
def test_samples_of_an_iterable_data_set_are_numbered_in_their_order(make_trainer: MakeTrainer) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from LOGITS

    class Streamed(Data):
        predict_files = ()

        def predict_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Stream(), batch_size=2)

    rows = predicted(make_trainer(PredictionWriter()), data=Streamed())
    assert [(row["file"], row["class"]) for row in rows] == [("0", "1"), ("1", "0"), ("2", "2")]


def test_digits_are_predicted_too(make_trainer: MakeTrainer) -> None:
    rows = predicted(make_trainer(PredictionWriter()), Classifier(RichBoyNet(8, 8)), MNISTDataModule(source="sample"))
    assert len(rows) == 2000
    assert {row["category"] for row in rows} <= set("0123456789")


def test_a_second_prediction_does_not_overwrite_the_first(make_trainer: MakeTrainer) -> None:
    for _ in range(2):
        trainer = make_trainer(PredictionWriter())
        trainer.logger._version = 0
        predicted(trainer)
    assert {path.name for path in Path(trainer.log_dir).glob("*.csv")} == {"predictions.csv", "predictions-v1.csv"}


def test_what_was_predicted_before_an_error_is_written(make_trainer: MakeTrainer) -> None:
    class Failing(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx:
                raise RuntimeError("out of memory")
            return super().predict_step(batch, batch_idx)

    trainer = make_trainer(PredictionWriter())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.predict(Failing(nn.Identity(), num_classes=3), datamodule=Data())
    with (Path(trainer.log_dir) / "predictions.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a/one.png", "a/b/two.png"]


def test_other_outputs_are_named_and_not_guessed_at(make_trainer: MakeTrainer) -> None:
    class Other(LightningModule):
        def predict_step(self, batch: Tensor, batch_idx: int) -> str:
            return "a cat"

    with pytest.warns(
        UserWarning, match=r"predict_step of Other returns str; expected logits of shape \(batch, classes\)"
    ):
        make_trainer(PredictionWriter()).predict(Other(), datamodule=Data())


def test_names_that_do_not_fit_do_not_end_the_run_and_the_classes_are_numbered(make_trainer: MakeTrainer) -> None:
    class Named(Data):
        class_names = ("cat", "dog")

    with pytest.warns(UserWarning, match=r"2 class names \(cat, dog\) do not fit a model of 3 classes"):
        rows = predicted(make_trainer(PredictionWriter()), data=Named())
    assert {row["category"] for row in rows} <= {"0", "1", "2"}


@pytest.mark.parametrize("form", ["dict", "object", "tuple"])
def test_logits_inside_the_output_of_a_model_are_found(make_trainer: MakeTrainer, form: str) -> None:
    class Wrapped(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            logits = super().predict_step(batch, batch_idx)
            return {
                "dict": {"features": logits.flatten(), "logits": logits},
                "object": SimpleNamespace(logits=logits),
            }.get(form, (logits,))

    wrapped = predicted(make_trainer(PredictionWriter()), Wrapped(nn.Identity(), num_classes=3))
    assert wrapped == predicted(make_trainer(PredictionWriter()))


def test_samples_of_several_loaders_are_told_apart(make_trainer: MakeTrainer) -> None:
    class Two(Data):
        def predict_dataloader(self) -> Any:
            return [DataLoader(list(LOGITS), batch_size=2), DataLoader(list(LOGITS.flip(0)), batch_size=2)]

    rows = predicted(make_trainer(PredictionWriter()), data=Two())
    assert [row["file"] for row in rows] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [row["class"] for row in rows] == ["1", "0", "2", "2", "0", "1"]


def test_one_class_at_least() -> None:
    with pytest.raises(ValueError, match="top_k=0: expected at least 1"):
        PredictionWriter(top_k=0)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "probabilities": lambda logits: logits.softmax(1),
    "log-probabilities": lambda logits: logits.log_softmax(1),
    "probabilities in bfloat16": lambda logits: logits.softmax(1).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_are_written_as_they_are(form: str, make_trainer: MakeTrainer) -> None:
    class Model(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return FORMS[form](super().predict_step(batch, batch_idx))

    rows = predicted(make_trainer(PredictionWriter()), Model(nn.Identity(), num_classes=3))
    expected = LOGITS.softmax(1).max(1).values.tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected, abs=0.004)
