"""`TextDataModule` and `text_backbone`: labelled texts, and a small random transformer."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, TextDataModule, text_backbone
from lora_lightning.data import LengthGroupedSampler
from lora_lightning.data.text_files import read_texts
from lora_lightning.data.text_labels import ordered_labels
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]

WORDS = ["lost", "top", "up", "please", "help", "is", "what", "my", "new", "where", "how"]
ROWS = [
    (f"{' '.join(WORDS[(row * 7 + k) % 11] for k in range(1 + row % 5))} {' '.join([kind] * 4)}", kind)
    for row in range(60)
    for kind in ("card", "money", "rate")
]


@pytest.fixture(autouse=True)
def _one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of samples and the adapters do not depend on the seed that another test has left."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    train, test = tmp_path / "train.csv", tmp_path / "test.jsonl"
    train.write_text("text,category\n" + "\n".join(f'"{text}",{label}' for text, label in ROWS[:150]))
    test.write_text("\n".join(json.dumps({"text": text, "category": label}) for text, label in ROWS[150:]))
    return {"train": train, "test": test}


def data(files: dict[str, Path], **arguments: Any) -> TextDataModule:
    return TextDataModule(**({**files, "label_column": "category", "batch_size": 8, "val_fraction": 0.2} | arguments))


class TestTokenDropout:
    def test_a_share_of_the_tokens_is_masked_in_training_alone_others_in_each_epoch(
        self, tiny_bert: str, files: dict[str, Path]
    ) -> None:
        plain, dropping = data(files, tokenizer=tiny_bert), data(files, tokenizer=tiny_bert, token_dropout=0.4)
        for each in (plain, dropping):
            each.setup("fit")

        def tokens(module: TextDataModule, epoch: int) -> Tensor:
            loader = module.make_train_loader()
            loader.sampler.set_epoch(0)  # one order of the texts
            loader.dataset.set_epoch(epoch)
            rows = loader.dataset.__getitems__(range(120))[0]
            return rows["input_ids"]

        whole, first, again, second = tokens(plain, 0), tokens(dropping, 0), tokens(dropping, 0), tokens(dropping, 1)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        changed = first != whole
        assert (first[changed] == 1).all()  # the unknown token: this tokenizer has no mask
        assert 0.35 < changed.sum() / (whole > 1).sum() < 0.45
        (inputs, _), (expected, _) = (next(iter(each.test_dataloader())) for each in (dropping, plain))
        assert torch.equal(inputs["input_ids"], expected["input_ids"])

    def test_a_share_that_is_none_is_an_error(self, files: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match="token_dropout=1: expected a probability"):
            data(files, token_dropout=1)


class TestTraining:
    def test_adapters_and_a_new_head_learn_and_are_reported_by_class(
        self, tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        module = Classifier(text_backbone(tiny_bert, 3), lambda p: torch.optim.AdamW(p, lr=0.02), num_classes=3)
        trainer = make_trainer(LoRAFinetuning(rank=2), report := ConfusionReport(verbose=False), max_epochs=16)
        trainer.fit(module, datamodule=data(files))
        trainer.test(module, datamodule=data(files), verbose=False)
        assert report.report.adapted.class_names == ("card", "money", "rate")
        assert report.report.adapted.total == 30
        assert report.report.base is not None
        assert report.report.adapted.accuracy > max(0.6, report.report.base.accuracy)
        config = json.loads(next(tmp_path.rglob("adapter_config.json")).read_text())
        assert config["modules_to_save"] == ["classifier"]
        assert config["peft_type"] == "LORA"

    def test_a_stopped_run_goes_on_bitwise(
        self, tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        texts = files

        def run(*callbacks: Callback, ckpt_path: Any = None) -> Classifier:
            torch.manual_seed(5)
            module = Classifier(text_backbone(tiny_bert, 3), num_classes=3)
            files = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
            trainer = make_trainer(LoRAFinetuning(rank=2, dropout=0.2), files, *callbacks, max_epochs=2)
            with suppress(InterruptedError):
                trainer.fit(module, datamodule=data(texts), ckpt_path=ckpt_path)
            return module

        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
                if trainer.global_step == 7:
                    raise InterruptedError

        undisturbed = run()
        run(Stop())
        resumed = run(ckpt_path=tmp_path / "last-v1.ckpt")
        assert same(dict(undisturbed.state_dict()), dict(resumed.state_dict()))

    def test_predicts_texts_without_labels(
        self, tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        (tmp_path / "new.csv").write_text("text\nlost card\nrate please\n")
        module = Classifier(text_backbone(tiny_bert, 3))
        outputs = make_trainer().predict(module, datamodule=data(files, predict=tmp_path / "new.csv"))
        assert [tuple(each.shape) for each in outputs] == [(2, 3)]


class OwnTask(pl.LightningModule):
    """A classifier of transformers on dict batches, as its users write it: the steps return nothing but a loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def test_a_transformers_classifier_on_dict_batches_of_ones_own(
    tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer
) -> None:
    texts = data(files, tokenizer=tiny_bert)
    texts.setup("fit")
    train, test = (
        DataLoader([inputs | {"labels": targets} for inputs, targets in loader], batch_size=None)
        for loader in (texts.train_dataloader(), texts.test_dataloader())
    )
    module = OwnTask(text_backbone(tiny_bert, 3))
    trainer = make_trainer(LoRAFinetuning(rank=2), report := ConfusionReport(verbose=False), max_epochs=8)
    trainer.fit(module, train)
    trainer.test(module, test, verbose=False)
    assert report.report.adapted.total == report.report.base.total == 30
    assert report.report.adapted.accuracy > max(0.5, report.report.base.accuracy)


class TestBatches:
    def test_every_sample_comes_once_an_epoch_in_batches_of_similar_length(self) -> None:
        lengths = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
        sampler = LengthGroupedSampler(lengths, 8, seed=3)
        orders = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(1003))
        assert orders[0] != orders[1]
        spreads = [max(each) - min(each) for each in torch.tensor(lengths)[orders[0][:1000]].view(-1, 8).tolist()]
        assert sum(spreads) / len(spreads) < 10

    def test_several_devices_share_each_batch(self) -> None:
        lengths = list(range(64))
        alone = list(LengthGroupedSampler(lengths, 8, seed=3))
        shares = [list(LengthGroupedSampler(lengths, 4, seed=3, num_replicas=2, rank=rank)) for rank in (0, 1)]
        assert [each for pair in zip(*shares, strict=True) for each in pair] == alone

    def test_are_padded_to_their_longest_text(self, tiny_bert: str, files: dict[str, Path]) -> None:
        module = data(files, tokenizer=tiny_bert)
        module.setup("fit")
        for inputs, targets in module.train_dataloader():
            assert set(inputs) >= {"input_ids", "attention_mask"}
            assert inputs["attention_mask"].sum(1).max() == inputs["input_ids"].shape[1]
            assert len(targets) == len(inputs["input_ids"])

    def test_show_the_focus_in_its_share(self, tiny_bert: str, files: dict[str, Path]) -> None:
        module = data(files, tokenizer=tiny_bert, focus=["rate"], focus_fraction=0.5)
        module.setup("fit")
        assert all(int((targets == 2).sum()) == 4 for _, targets in module.train_dataloader())

    def test_a_text_is_cut_to_max_length(self, tiny_bert: str, files: dict[str, Path]) -> None:
        module = data(files, tokenizer=tiny_bert, max_length=3)
        module.setup("fit")
        assert {inputs["input_ids"].shape[1] for inputs, _ in module.train_dataloader()} <= {1, 2, 3}
        assert "with at most 3 tokens per text, and padding" in module.preprocessing_in_words()

    def test_a_tokenizer_without_a_limit_is_described_without_one(
        self, tiny_bert: str, files: dict[str, Path], tmp_path: Path
    ) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, model_max_length=int(1e30))
        tokenizer.save_pretrained(tmp_path / "unlimited")
        module = data(files, tokenizer=str(tmp_path / "unlimited"))
        assert module.preprocessing_in_words().endswith("unlimited, with padding to the longest text of a batch.")
        module.setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,kind\nhello,x\n", r"a.csv, row 1, has no 'label'. Its columns: 'text', 'kind'"),
        ("a.csv", "text,label\nhello,x\n  ,y\n", r"a.csv, row 2, has an empty 'text'"),
        ("a.csv", "text,label\n", r"a.csv has no rows"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', r"a.jsonl, line 2, is not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1, is a list; expected an object"),
        ("a.txt", "hello", r"a.txt has an unknown file type; expected one of .csv, .tsv, .jsonl"),
    ],
)
def test_files_that_are_wrong_are_named_with_the_row(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, "text", "label")


def test_files_have_quotes_tabs_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"one, ""two""\nthree",x\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text("text\tlabel\none, two\t7\n")
    assert read_texts(tmp_path / "a.csv", "text", "label") == (['one, "two"\nthree'], ["x"])
    assert read_texts(tmp_path / "a.tsv", "text", "label") == (["one, two"], ["7"])
    (tmp_path / "b.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not in UTF-8"):
        read_texts(tmp_path / "b.csv", "text", "label")


def test_labels_and_sizes_that_do_not_fit_are_named(
    tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=r"has 1 labels that are not classes, for example 'rate' in \d+ rows"):
        data(files, tokenizer=tiny_bert, classes=["card", "money"]).setup("fit")
    with pytest.raises(ValueError, match=r"focus=\['rat'\]: 'rat' is not one of the classes \(card, money, rate\)"):
        data(files, tokenizer=tiny_bert, focus=["rat"]).setup("fit")
    with pytest.raises(ValueError, match=r"has 3 classes \(card, money, rate, ...\), but the model has num_classes=4"):
        make_trainer().test(Classifier(text_backbone(tiny_bert, 4), num_classes=4), datamodule=data(files))
    with pytest.raises(ValueError, match="has no tokenizer: set tokenizer of TextDataModule"):
        data(files).setup("fit")
    with pytest.raises(FileNotFoundError, match="is not a file; expected texts"):
        data(files, train="missing.csv").setup("fit")


def test_the_shipped_configuration_trains_and_tests(
    tiny_bert: str, files: dict[str, Path], run: Callable[..., tuple[int, str]]
) -> None:
    words = [
        "--config=configs/text.yaml",
        f"--model.backbone.name={tiny_bert}",
        "--model.backbone.num_classes=3",
        "--model.num_classes=3",
        f"--data.train={files['train']}",
        f"--data.test={files['test']}",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
    ]
    code, output = run("fit", *words, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")
    assert code == 0, output
    code, output = run("test", *words, "--ckpt_path=logs/text")
    assert code == 0, output
    assert "money" in output
    Path("new.csv").write_text("text\nlost card\nrate please\n")
    code, output = run("predict", *words, "--data.predict=new.csv", "--ckpt_path=logs/text")
    assert code == 0, output
    (path,) = Path("logs").rglob("predictions.csv")
    assert len(path.read_text().splitlines()) == 3


class TestTheOrderOfTheClasses:
    @pytest.mark.parametrize(
        ("labels", "head", "expected", "order"),
        [
            (["0", "1", "10", "11", "2"], [], ["0", "1", "2", "10", "11"], "in numeric order"),
            (["-1", "1", "0"], [], ["-1", "0", "1"], "in numeric order"),
            (["b", "a"], [], ["a", "b"], "sorted"),
            (["negative", "positive"], ["positive", "neutral", "negative"], None, "in the order of the head"),
            (["negative", "positive"], ["POSITIVE", "NEGATIVE"], ["positive", "negative"], "in the order of the head"),
        ],
    )
    def test_is_that_of_the_head_or_sorted(
        self, labels: list[str], head: list[str], expected: list[str] | None, order: str
    ) -> None:
        assert ordered_labels(set(labels), head) == (expected or head, order)

    def test_a_head_of_other_classes_is_named(self) -> None:
        with pytest.warns(
            UserWarning, match=r"The classes of the head \(x, y\) are not the labels of the data \(a, b\)"
        ):
            assert ordered_labels({"a", "b"}, ["x", "y"]) == (["a", "b"], "sorted")

    def test_a_trained_head_keeps_its_order(
        self, tiny_bert: str, files: dict[str, Path], make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        names = ["rate", "card", "money"]
        config = transformers.BertConfig.from_pretrained(tiny_bert, id2label=dict(enumerate(names)))
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "head")
        transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "head")
        module, texts = Classifier(text_backbone(str(tmp_path / "head"))), data(files)
        make_trainer(ConfusionReport(verbose=False)).test(module, datamodule=texts, verbose=False)
        assert list(texts.class_names) == names
        new, texts = Classifier(text_backbone(tiny_bert, 3)), data(files)
        make_trainer().test(new, datamodule=texts, verbose=False)
        assert list(texts.class_names) == sorted(names)
