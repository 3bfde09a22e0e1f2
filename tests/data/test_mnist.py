"""`MNISTDataModule`: what it trains, validates and tests on, and where it gets that from."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from lora_lightning import Classifier, MNISTDataModule, RichBoyNet
from lora_lightning.data import mnist_files
from lora_lightning.data.augmentation import _grid


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirrors are a port of this machine on which nobody listens."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


def ready(**arguments: object) -> MNISTDataModule:
    data = MNISTDataModule(**({"source": "sample"} | arguments))
    data.prepare_data()
    data.setup("fit")
    return data


def counts(loader: object) -> list[int]:
    targets = torch.cat([targets for _, targets in loader])
    return torch.bincount(targets, minlength=10).tolist()


def write_mnist(folder: Path, train: int = 40, test: int = 20) -> Path:
    """A database in MNIST's format, of random pixels."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", train), ("t10k", test)):
        pixels = torch.randint(256, (size, 28, 28), dtype=torch.uint8)
        labels = torch.arange(size, dtype=torch.uint8) % 10
        images_header, labels_header = struct.pack(">4I", 2051, size, 28, 28), struct.pack(">2I", 2049, size)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images_header + pixels.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels_header + labels.numpy().tobytes())
    return raw


class TestWhatItServes:
    def test_the_sample_has_3000_and_2000_digits_as_many_of_each(self) -> None:
        data = ready(val_fraction=0)
        assert counts(data.train_dataloader()) == [300] * 10
        assert counts(data.test_dataloader()) == [200] * 10
        assert data.val_dataloader() == []

    def test_a_stratified_tenth_is_held_out_the_same_for_every_run(self) -> None:
        data = ready()
        assert counts(data.train_dataloader()) == [270] * 10
        assert counts(data.val_dataloader()) == [30] * 10
        held = [images for images, _ in data.val_dataloader()]
        assert torch.equal(torch.cat(held), torch.cat([images for images, _ in ready().val_dataloader()]))
        other = ready(split_seed=1)
        assert not torch.equal(torch.cat(held), torch.cat([images for images, _ in other.val_dataloader()]))

    def test_digits_filters_training_alone(self) -> None:
        data = ready(digits=[9, 2])
        assert counts(data.train_dataloader()) == [0, 0, 270, 0, 0, 0, 0, 0, 0, 270]
        assert counts(data.val_dataloader()) == [30] * 10
        assert counts(data.test_dataloader()) == [200] * 10

    def test_eval_digits_filters_validation_test_and_prediction_alone(self) -> None:
        data = ready(eval_digits=[3])
        assert counts(data.train_dataloader()) == [270] * 10
        assert counts(data.val_dataloader()) == [0, 0, 0, 30, 0, 0, 0, 0, 0, 0]
        for loader in (data.test_dataloader(), data.predict_dataloader()):
            assert counts(loader) == [0, 0, 0, 200, 0, 0, 0, 0, 0, 0]

    def test_focus_mixes_35_percent_into_every_batch(self) -> None:
        data = ready(focus=[9], batch_size=100)
        batches = [targets for _, targets in data.train_dataloader()]
        assert [int((targets == 9).sum()) for targets in batches] == [35] * len(batches)
        assert len(batches) == 2430 // 65

    def test_batches_are_normalized_images_and_their_digits(self) -> None:
        data = ready(batch_size=7)
        batch = next(iter(data.train_dataloader()))
        assert batch[0].dtype == torch.uint8
        images, targets = data.on_after_batch_transfer(batch, 0)
        assert (images.shape, images.dtype) == ((7, 1, 28, 28), torch.float32)
        assert (targets.shape, targets.dtype) == ((7,), torch.int64)
        torch.testing.assert_close(images[:, 0], (batch[0] / 255 - 0.1307) / 0.3081)
        assert data.on_after_batch_transfer((images, targets), 0)[0] is images

    def test_the_order_follows_the_run_seed_and_the_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            loader = ready(batch_size=100).train_dataloader()
            loader.sampler.set_epoch(epoch)
            return torch.cat([targets for _, targets in loader]).tolist()

        assert order(0, 0) == order(0, 0)
        assert order(0, 0) != order(1, 0)
        assert order(0, 0) != order(0, 1)

    def test_setting_up_twice_reads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = ready()
        monkeypatch.setattr(mnist_files, "_read_sample", lambda part: pytest.fail("read again"))
        data.setup("test")


class TestWhereItComesFrom:
    def test_full_reads_the_files_on_disk(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        data = ready(source="full", data_dir=tmp_path, val_fraction=0)
        assert counts(data.train_dataloader()) == [4] * 10
        assert ready(source="auto", data_dir=tmp_path).source == "full"

    def test_auto_takes_the_sample_without_a_network_and_says_why(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        began = time.monotonic()
        with caplog.at_level("INFO"):
            data = ready(source="auto", data_dir=tmp_path)
        assert time.monotonic() - began < 10
        assert data.source == "sample"
        assert f"the embedded sample (the full MNIST is not in {tmp_path}" in caplog.text
        assert "could not be downloaded: http://127.0.0.1:9/: [Errno 111] Connection refused" in caplog.text

    def test_a_terminal_gets_one_reason_for_the_sample_wrapped_between_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", "http://127.0.0.1:10/"])
        with caplog.at_level("INFO"):
            data = ready(source="auto", data_dir=Path("data"))
        (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("MNIST: ")]
        assert max(map(len, said.splitlines())) <= 60
        assert data.description() in said.replace("\n", " "), "no word is broken"
        assert said.count("http://") == 1

    def test_auto_does_not_wait_for_a_network_that_does_not_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def silence(*_: object, timeout: float) -> None:
            time.sleep(timeout)
            raise TimeoutError

        monkeypatch.setattr(mnist_files, "_PROBE_SECONDS", 0.2)
        monkeypatch.setattr(mnist_files.urllib.request, "urlopen", silence)
        data = ready(source="auto", data_dir=tmp_path)
        assert data.source == "sample"
        assert "no answer within" in data.description()

    def test_full_without_a_network_is_an_error_that_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"source=full: the full MNIST is not in .* Copy its four files there"):
            ready(source="full", data_dir=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_full_can_be_told_not_to_download(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="download is switched off"):
            ready(source="full", data_dir=tmp_path, download=False)

    @pytest.fixture
    def mirror(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A mirror of MNIST on this machine, with checksums of its own."""
        raw = write_mnist(tmp_path / "origin")
        resources = []
        for name, _ in MNIST.resources:
            packed = gzip.compress((raw / name.removesuffix(".gz")).read_bytes())
            (raw / name).write_bytes(packed)
            resources.append((name, hashlib.md5(packed).hexdigest()))
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=raw)
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
            monkeypatch.setattr(MNIST, "resources", resources)
            yield raw
            server.shutdown()

    @pytest.mark.parametrize("source", ["auto", "full"])
    def test_what_is_missing_is_downloaded_by_torchvision(self, mirror: Path, tmp_path: Path, source: str) -> None:
        data = ready(source=source, data_dir=tmp_path / "here", val_fraction=0)
        assert data.source == "full"
        assert counts(data.train_dataloader()) == [4] * 10

    def test_a_download_with_a_wrong_checksum_is_refused(self, mirror: Path, tmp_path: Path) -> None:
        for name, _ in MNIST.resources:
            (mirror / name).write_bytes(b"something else")
        with pytest.raises(RuntimeError, match=r"could not be downloaded .*File not found or corrupted"):
            ready(source="full", data_dir=tmp_path / "here")


class TestDamagedFiles:
    """torchvision looks at names alone; a damaged file is refused by name before it trains anything."""

    @pytest.mark.parametrize("source", ["auto", "full"])
    def test_a_truncated_file(self, tmp_path: Path, source: str) -> None:
        path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            ValueError, match=rf"{path} has 31375 bytes, and 31376 according to its header: it is truncated"
        ):
            ready(source=source, data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train-images-idx3-ubyte", b"", "is not an IDX file of 3 dimension"),
            ("t10k-labels-idx1-ubyte", b"<html>404</html>", "is not an IDX file of 1 dimension.* starts with b'<htm'"),
            ("t10k-images-idx3-ubyte", struct.pack(">4I", 2051, 1, 14, 14), r"items of shape \(14, 14\); expected"),
            ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 0, 28, 28), "contains 0 items"),
            ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 2**32 - 1), "and 4294967303 according to its header"),
            (
                "train-labels-idx1-ubyte",
                struct.pack(">2I", 2049, 3) + b"123",
                "contains 40 images, but .* contains 3 labels",
            ),
            (
                "t10k-labels-idx1-ubyte",
                struct.pack(">2I", 2049, 20) + b"\x0b" * 20,
                "contains the label 11; expected digits",
            ),
        ],
    )
    def test_a_file_that_is_not_what_its_name_says(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (write_mnist(tmp_path) / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ready(source="full", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": [12]}, r"digits=\[12\]: 12 is not a digit; expected whole numbers from 0 to 9"),
        ({"digits": [-1]}, "-1 is not a digit"),
        ({"digits": []}, r"digits=\[\] selects nothing: name digits from 0 to 9"),
        ({"digits": [3, 3]}, r"digits=\[3, 3\] repeats a digit; name each once"),
        ({"focus": [True]}, "True is not a digit"),
        ({"eval_digits": [10]}, r"eval_digits=\[10\]: 10 is not a digit"),
        ({"digits": [1], "focus": [2]}, r"digits=\[1\] and focus=\[2\] cannot be combined"),
        ({"focus": list(range(10))}, "leaves no other digit to mix in"),
        ({"focus_fraction": 0.0}, "focus_fraction=0.0: expected a share above 0 and below 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1: expected at least 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: expected a share of at least 0 and below 1"),
        ({"source": "all"}, "source='all': expected 'auto', 'full' or 'sample'"),
    ],
)
def test_a_value_out_of_range_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**arguments)


def test_it_says_when_it_was_not_set_up() -> None:
    with pytest.raises(RuntimeError, match="is not set up: call prepare_data"):
        MNISTDataModule().train_dataloader()


def test_the_whole_database_has_70000_digits(mnist_dir: Path) -> None:
    data = ready(source="full", data_dir=mnist_dir, val_fraction=0)
    assert counts(data.train_dataloader())[9] == 5949
    assert sum(counts(data.test_dataloader())) == 10_000


def test_the_sample_is_part_of_the_whole_training_set(mnist_dir: Path) -> None:
    whole = {image.numpy().tobytes() for image in MNIST(mnist_dir, train=True).data}
    data = ready(val_fraction=0)
    sample = [
        image
        for loader in (data.train_dataloader(), data.test_dataloader())
        for images, _ in loader
        for image in images
    ]
    assert len(sample) == 5000
    assert all(image.numpy().tobytes() in whole for image in sample)


class Seen(pl.Callback):
    """Keeps the last batches."""

    def __init__(self) -> None:
        self.batches: dict[str, list[Tensor]] = {}
        self.accuracies: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches["train"] = batch
        self.accuracies.append(float(trainer.callback_metrics["train/accuracy"]))

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.batches["val"] = batch


def seen_in_one_step(**options: Any) -> Seen:
    pl.seed_everything(3)
    seen = Seen()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[seen],
        max_steps=1,
        log_every_n_steps=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(RichBoyNet()), datamodule=MNISTDataModule(source="sample", batch_size=32, **options))
    return seen


def test_augmentation_changes_training_images_a_little_and_no_others() -> None:
    def images(augment: bool) -> dict[str, Tensor]:
        return {name: batch[0] for name, batch in seen_in_one_step(augment=augment).batches.items()}

    plain, augmented, again = images(False), images(True), images(True)
    assert torch.equal(plain["val"], augmented["val"])
    assert torch.equal(again["train"], augmented["train"])
    changed = [(a - b).abs().mean() for a, b in zip(plain["train"], augmented["train"], strict=True)]
    assert all(0 < change < 0.5 for change in changed)
    pairs = zip(plain["train"], augmented["train"], strict=True)
    alike = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]
    assert torch.stack(alike).median() > 0.8


@pytest.mark.parametrize("size", [(28, 28), (17, 40)])
def test_the_grid_of_an_augmentation_is_pytorchs(size: tuple[int, int]) -> None:
    matrices = torch.randn(5, 2, 3)
    expected = torch.nn.functional.affine_grid(matrices, [5, 1, *size], align_corners=False)
    torch.testing.assert_close(_grid(matrices, *size), expected, rtol=1e-6, atol=1e-6)


def test_one_digit_needs_no_list() -> None:
    data = ready(focus=9, eval_digits=3)
    assert (data.focus, data.eval_digits) == ([9], [3])
    with pytest.raises(ValueError, match="12 is not a digit"):
        MNISTDataModule(digits=12)
