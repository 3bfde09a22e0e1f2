"""Packages import one way, and no file imports itself through others."""

from __future__ import annotations

import ast
import importlib
import pydoc
import re
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "lora_lightning"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py") if "sample" not in path.parts}


def imported_by(path: Path) -> set[str]:
    """Return our modules that a file imports, at the top or inside a function, but not for type checking alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name in FILES}


def test_no_file_imports_itself_through_others() -> None:
    # A package's `__init__` collects names of its own files for others, which is no circle.
    graph = {
        name: {other for other in imported_by(path) if not (path.name == "__init__.py" and other.startswith(name))}
        for name, path in FILES.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(order) >= len(FILES) - 1


PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SHARED = {
    "a checkpoint or a folder may hold merged weights, or those of another moment": {
        "lora.merged_state.base_weights",
        "lora.merged_state.merged_weights",
        "lora.merged_state.require_mergeable",
        "lora.state.with_values",
    },
    "a checkpoint holds what the core says is an adapter, and loading compares it": {
        "lora.record.attachment_of",
        "lora.record.config_of",
        "lora.fingerprint.digests",
        "lora.sharding.local",
        "lora.state.adapter_keys",
        "lora.state.saved_keys",
    },
    "the callback prepares, watches and describes adapters in every precision and strategy": {
        "lora.record.active_names",
        "lora.record.trained_names",
        "lora.record.unwrapped",
        "lora.adapter.is_distributed",
        "lora.adapter.is_quantized",
        "lora.fingerprint.base_tensors",
        "lora.freeze.FrozenStatistics",
        "lora.modules_to_save.shared_memory",
        "lora.packed.keep_packing",
        "lora.sharding.distribute_adapters",
        "lora.sharding.full",
        "lora.selection.can_be_name",
    },
    "names in folders and in the callback are matched as in LoRAConfig": {
        "lora.matching.Names",
        "lora.matching.exactly",
        "lora.matching.pattern_of",
    },
    "shapes in PEFT's folders depend on the kind of layer": {
        "lora.layers.Adapted",
        "lora.layers.ConvKind",
        "lora.layers.EmbeddingKind",
        "lora.targets.Target",
        "lora.other_layers.GeometricLinearKind",
        "lora.other_layers.TransposedLinearKind",
        "lora.readers.ParameterKind",
        "lora.registry.kind_of",
    },
    "a folder is attached whole or not at all, to exactly the weights that it names": {
        "lora.adaptation.attach_as_configured",
        "lora.adaptation.attach_to",
        "lora.bypass.bypass_target",
        "lora.modules_to_save.alone",
        "lora.record.record_of",
        "lora.record.require_active_names",
        "lora.selection.bias_keys",
        "lora.selection.candidates",
        "lora.selection.check",
        "lora.adapter.layers_of",
    },
    "a folder says which base it belongs to": {
        "lora.fingerprint.BaseDigests",
        "lora.fingerprint.fingerprint_and_sample",
        "lora.fingerprint.is_in_another_precision",
    },
    "the baselines of repair freeze the network as adapters do": {"lora.freeze.freeze"},
    "Classifier refuses the ratio that lora_plus_param_groups refuses": {"lora.lora_plus.check_lr_ratio"},
    "the callback writes its folder in the format of PEFT, and says if PEFT refuses it": {
        "peft_format.differences.unknown_to_peft",
        "peft_format.folder.AdapterFolder",
    },
    "the callback and the command line write and read checkpoints of adapters": {
        "checkpoints.adapter_checkpoint.AdapterCheckpointIO",
        "checkpoints.adapter_checkpoint.AdapterContent",
        "checkpoints.atomic_checkpoint.write_atomically",
        "checkpoints.checkpoints.ADAPTER_KEY",
        "checkpoints.checkpoints.adapters_in",
        "checkpoints.checkpoints.check_file",
        "checkpoints.checkpoints.explain_damage",
        "checkpoints.checkpoints.holds_adapters_alone",
        "checkpoints.checkpoints.misfits",
        "checkpoints.checkpoints.paths_are_safe",
        "checkpoints.own_states.OwnStates",
        "checkpoints.packed_layers.let_packed_keys_be_missing",
        "checkpoints.random_state.own_random_numbers",
        "checkpoints.sharded_checkpoints.ShardedCheckpoints",
        "checkpoints.started_from.StartedFrom",
        "checkpoints.stop_after_batch.StopAfterBatch",
    },
    "the callbacks count, and write pages and figures": {
        "report.figure.report_figures",
        "report.figure.write_png",
        "report.files.write_report",
        "report.history.History",
        "report.history.curves_figure",
        "report.layers.layer_changes",
        "report.loggers.log_figures",
        "report.page.REPORTS",
        "report.page.page_of",
        "report.terminal.show_sentence",
        "report.verdict.verdict_of",
    },
    "every command prints alike, and overwrites nothing": {
        "report.files.free_name",
        "report.files.free_path",
        "report.files.refuse_to_overwrite",
        "report.files.write_to",
        "report.terminal.show",
    },
    "the command line takes and checks the settings of data modules": {
        "data.focus.check_share",
        "data.mnist_files.Source",
        "data.text_files.read_texts",
    },
    "a sweep leaves random states as they were, and the command has its default": {
        "checkpoints.random_state.random_state",
        "checkpoints.random_state.restore_random_state",
        "find_lr.sweep.RATES",
    },
    "the command line merges, and ends with what the callback knows": {
        "callbacks.lora_arguments.LR_RATIO_IS_OF_THE_OPTIMIZER",
        "callbacks.merging.finetuning_of",
        "callbacks.merging.load_merged",
        "callbacks.merging.save_merged",
        "callbacks.summary.stage_metrics",
    },
    "repair is the program behind the command of this name": {
        "repair.choice.named_classes",
        "repair.comparison.compare",
        "repair.digits.Digits",
        "repair.digits.EXAMPLE",
        "repair.process.Repair",
        "repair.process.Settings",
        "repair.process.say",
        "repair.task.Method",
        "repair.task.Recipe",
        "repair.task.Task",
        "repair.training.Runs",
        "repair.verdict.KEPT",
        "repair.verdict.REPAIRED",
        "repair.verdict.TRADED",
        "repair.verdict.Verdict",
        "repair.verdict.WITHIN_CHANCE",
    },
    "the report of a repair has its verdict, and its output names the machine": {
        "callbacks.run_files.add_facts",
        "callbacks.run_files.machine_in_words",
    },
    "the bars of repair and of the command line fit a narrow terminal": {"callbacks.loss_bar.LossBar"},
    "the run that a folder belongs to is said wherever a folder is accepted or refused": {
        "checkpoints.checkpoints.choice_in_words",
        "checkpoints.checkpoints.doubt_about_choice",
        "checkpoints.run_record.RunRecord",
    },
}
"""Names that are not public and that another package imports, by the reason."""


def test_packages_use_public_names_of_each_other_and_few_others_with_a_reason() -> None:
    used: set[str] = set()
    for path in FILES.values():
        own = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_lightning."):
                package, *inside = node.module.split(".")[1:]
                if package in PACKAGES and package != own and inside and own != "__main__.py":
                    used.update(".".join([package, *inside, alias.name]) for alias in node.names)
    assert used == set().union(*SHARED.values())


def test_a_package_exports_what_the_docs_name() -> None:
    documented: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        package = name.split(".")[1] if name.count(".") == 2 else ""
        found = pydoc.locate(name)
        assert found is not None, name
        documented[package or found.__module__.split(".")[1]].add(name.rpartition(".")[2])
    exported = {package: importlib.import_module(f"lora_lightning.{package}") for package in PACKAGES}
    assert {name: set(getattr(module, "__all__", [])) for name, module in exported.items()} == documented
