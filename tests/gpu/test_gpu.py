"""What holds on the CPU holds on a GPU: `pytest -m gpu tests/gpu` on a machine with CUDA."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn

from lora_lightning import Classifier, ConfusionReport, LoRAConfig, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.lora import (
    adapter_parameters,
    adapter_state_dict,
    attach,
    base_fingerprint,
    detach,
    disabled,
    merge,
)
from lora_lightning.lora.state import adapter_keys
from lora_lightning.peft_format import load_adapter, save_adapter
from tests.helpers import same, state, stir

MakeTrainer = Callable[..., Trainer]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that CUDA sees"),
    pytest.mark.filterwarnings(
        # Small data in the process of the test:
        # https://github.com/Lightning-AI/pytorch-lightning/issues/19223 and pull/7734
        "ignore:.*does not have many workers.*",
        "ignore:The number of training batches",
        # The sizes in Lightning's summary, which this test does not read
        "ignore:Precision .*-mixed is not supported by the model summary",
        # Runs on the CPU for comparison: https://github.com/Lightning-AI/pytorch-lightning/pull/11909
        "ignore:GPU available but not used",
        # Inductor of PyTorch 2.11: https://github.com/pytorch/pytorch/pull/173015
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
        # Inductor on float32, whose precision stays as it is: https://github.com/pytorch/pytorch/issues/175484
        "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
        # PyTorch's CUDA graph trees start with an empty graph, whose warning they only record:
        # https://github.com/pytorch/pytorch/pull/88754
        "ignore:The CUDA Graph is empty",
        # Layers narrower than 64: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2027
        "ignore:inner dimension .* is not aligned for fast kernel",
    ),
]


def adam(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=3e-3, **options)


def classifier(optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(RichBoyNet(), optimizer or adam(fused=True))


def digits() -> MNISTDataModule:
    return MNISTDataModule("sample", batch_size=64)


@pytest.fixture
def gpu_trainer(make_trainer: MakeTrainer) -> MakeTrainer:
    """Makes a quiet trainer on one GPU, whose results repeat."""

    def make(*callbacks: Any, **options: Any) -> Trainer:
        return make_trainer(*callbacks, **{"accelerator": "cuda", "devices": 1, "max_epochs": 2} | options)

    return make


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_adapters_train_the_base_stays_and_the_test_counts_every_digit(
    gpu_trainer: MakeTrainer, precision: str
) -> None:
    module, report = classifier(), ConfusionReport()
    trainer = gpu_trainer(LoRAFinetuning(rank=4), report, precision=precision)
    trainer.fit(module, digits())
    before = base_fingerprint(module)
    assert all(value.any() for value in adapter_state_dict(module).values())
    trainer.test(module, digits(), verbose=False)
    assert base_fingerprint(module) == before
    (written,) = Path(trainer.log_dir).rglob("confusion.json")
    assert json.loads(written.read_text())["samples"] == 2000


def test_the_gpu_counts_what_the_cpu_counts(gpu_trainer: MakeTrainer, make_trainer: MakeTrainer) -> None:
    module = classifier()
    trainer = gpu_trainer(LoRAFinetuning(rank=4), ConfusionReport(), max_epochs=1)
    trainer.fit(module, digits())
    trainer.test(module, digits(), verbose=False)
    on_cpu = make_trainer(ConfusionReport())
    on_cpu.test(module.cpu(), digits(), verbose=False)
    counted = [
        json.loads(path.read_text())
        for each in (trainer, on_cpu)
        for path in Path(each.log_dir).rglob("confusion.json")
    ]
    assert len(counted) == 2
    assert counted[0] == counted[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_stopped_run_goes_on_bitwise(gpu_trainer: MakeTrainer, precision: str) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[Classifier, Trainer]:
        module = classifier()
        trainer = gpu_trainer(LoRAFinetuning(rank=4, dropout=0.1), max_epochs=epochs, precision=precision)
        trainer.fit(module, digits(), ckpt_path=ckpt_path)
        return module, trainer

    undisturbed, _ = run(3)
    _, stopped = run(1)
    resumed, _ = run(3, stopped.checkpoint_callback.best_model_path)
    assert same(adapter_state_dict(resumed), adapter_state_dict(undisturbed))


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_adam_s_kernels_give_what_its_plain_loop_gives(gpu_trainer: MakeTrainer, kernel: str) -> None:
    trained = []
    for options in ({kernel: True}, {"foreach": False, "fused": False}):
        module = classifier(adam(**options))
        gpu_trainer(LoRAFinetuning(rank=4), max_epochs=1).fit(module, digits())
        trained.append(adapter_state_dict(module))
    for key, value in trained[0].items():
        # Where a gradient is almost zero, rounding decides the direction of a step.
        assert (value - trained[1][key]).norm() < 1e-2 * value.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_adapters_are_not_rounded_to_the_base_s_precision(dtype: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(64, 48)).to("cuda", dtype)
    attach(layer, LoRAConfig(rank=8, alpha=4))
    stir(layer)
    x, g = (torch.randn(4, 100, width, device="cuda", dtype=dtype) for width in (64, 48))
    layer(x).backward(g)
    for name, value in layer.named_parameters():
        if value.requires_grad:
            assert value.grad is not None
            assert value.grad.dtype == torch.float32
            assert (value.grad != value.grad.to(dtype)).float().mean() > 0.9, name


@pytest.mark.parametrize("shape", [(2048, 256), (256, 2048), (256, 256)])
@pytest.mark.parametrize("scaling", [1, 1.5])
def test_a_large_batch_in_half_precision_agrees_with_float64(shape: tuple[int, int], scaling: float) -> None:
    layer = nn.Sequential(nn.Linear(*shape)).to("cuda", torch.bfloat16)
    attach(layer, LoRAConfig(rank=8, alpha=8 * scaling))
    stir(layer)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(4, 4096, shape[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(4, 4096, shape[1], device="cuda", dtype=torch.bfloat16)
    wide = x.detach().double().requires_grad_()
    found = (layer(x), *torch.autograd.grad(layer(x), (x, *adapter_parameters(layer)), g))
    expected = (exact(wide), *torch.autograd.grad(exact(wide), (wide, *adapter_parameters(exact)), g.double()))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()


def test_an_empty_batch_has_no_gradient() -> None:
    layer = nn.Sequential(nn.Linear(64, 48)).to("cuda", torch.bfloat16)
    attach(layer, LoRAConfig(rank=8))
    stir(layer)
    layer(torch.randn(0, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    gradients = [each.grad for each in layer.parameters() if each.requires_grad]
    assert len(gradients) == 2
    assert not any(each is None or each.any() for each in gradients)


def test_a_captured_step_trains_like_an_eager_one() -> None:
    def trained(captures: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
        attach(net, LoRAConfig(rank=4))
        optimizer = torch.optim.AdamW(
            [each for each in net.parameters() if each.requires_grad], lr=1e-2, capturable=True
        )
        x, y = torch.randn(32, 64, device="cuda"), torch.randint(8, (32,), device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # as CUDA graphs want it: https://docs.pytorch.org/docs/stable/notes/cuda.html
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(5):
            step()
        return adapter_state_dict(net)

    eager, captured = trained(False), trained(True)
    for key, value in eager.items():
        torch.testing.assert_close(captured[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_computes_the_same(mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
    attach(net, LoRAConfig(rank=4))
    stir(net)
    compiled, x = torch.compile(net, mode=mode), torch.randn(32, 64, device="cuda")
    for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
        net.zero_grad()
        net(x).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
        net.zero_grad()
        compiled(x).square().mean().backward()
        found = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    with disabled(net):
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-3, atol=1e-4)


def test_batches_are_pinned_and_arrive_on_the_gpu(gpu_trainer: MakeTrainer) -> None:
    class Watching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert all(each.is_cuda for each in batch)
            return super().training_step(batch, batch_idx)

    module, data = Watching(RichBoyNet(), adam(fused=True)), digits()
    gpu_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(module, data)
    images, _ = next(iter(data.val_dataloader()))
    assert images.is_pinned()


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_attached_moved_switched_merged_and_detached_it_is_what_it_is_on_the_cpu(variant: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(4, 3, 8, 8)
    net(x)
    plain = state(net)
    attach(net, LoRAConfig(rank=2, **variant))
    stir(net)
    expected, digest = net(x), base_fingerprint(net)
    net.cuda()
    assert {each.device.type for each in net.parameters()} == {"cuda"}
    assert base_fingerprint(net) == digest
    torch.testing.assert_close(net(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
    folded = copy.deepcopy(net)
    merge(folded)
    torch.testing.assert_close(folded(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
    detach(net)
    assert same(state(net.cpu()), plain)


def test_attached_on_the_gpu_its_folder_loads_on_the_cpu(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    on_gpu = copy.deepcopy(net).cuda()
    attach(on_gpu, LoRAConfig(rank=2))
    stir(on_gpu)
    save_adapter(on_gpu, tmp_path / "adapter")
    load_adapter(net, tmp_path / "adapter")
    assert same(adapter_state_dict(net), {key: value.cpu() for key, value in adapter_state_dict(on_gpu).items()})


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_lightning_s_quantized_base_trains_resumes_and_merges(gpu_trainer: MakeTrainer, mode: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")

    def run(epochs: int, ckpt_path: Any = None) -> tuple[Classifier, Trainer]:
        module = classifier(adam())
        dtype = torch.float16 if mode == "int8" else torch.bfloat16
        trainer = gpu_trainer(
            LoRAFinetuning(rank=4), plugins=BitsandbytesPrecision(mode, dtype=dtype), max_epochs=epochs
        )
        trainer.fit(module, digits(), ckpt_path=ckpt_path)
        return module, trainer

    undisturbed, trainer = run(2)
    assert all(value.any() for value in adapter_state_dict(undisturbed).values())
    kept = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert kept.keys() <= adapter_keys(undisturbed)
    _, stopped = run(1)
    resumed, _ = run(2, stopped.checkpoint_callback.best_model_path)
    assert same(adapter_state_dict(resumed), adapter_state_dict(undisturbed))
    with pytest.warns(UserWarning, match="are dense after merging"):
        merge(resumed.backbone)


def test_fsdp1_is_refused_with_the_reason(gpu_trainer: MakeTrainer) -> None:
    trainer = gpu_trainer(LoRAFinetuning(rank=2), strategy="fsdp", max_epochs=1)
    with pytest.raises(ValueError, match="FSDP"):
        trainer.fit(classifier(), digits())
