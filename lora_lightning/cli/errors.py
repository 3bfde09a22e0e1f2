"""Extracts one clear message for the command line from nested errors."""

from __future__ import annotations

import difflib
import importlib
import re
import shlex
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from lora_lightning.checkpoints import newest_checkpoint
from lora_lightning.checkpoints.run_record import RunRecord
from lora_lightning.cli.init import how_to_get
from lora_lightning.wording import as_typed

_NO_NAME = '"<unicode string>"'
_UNION = "Does not validate against any of the Union subtypes"


def explain(error: BaseException, words: Sequence[str] = ()) -> str:
    """Return the message of the relevant error on one line.

    jsonargparse wraps an error once per level of the configuration, and each level repeats the others and the whole
    configuration. The first inner error that says more than "none of these types" is the relevant one.

    Args:
        error: The error of a command.
        words: The command-line arguments, which name the configuration files.
    """
    found: BaseException | None = error
    key = ""
    while found is not None and _UNION in str(found):
        if match := re.match(r'Parser key "[^"]+":', str(found)):
            key = f"{match[0]} "
        error, found = found, found.__cause__ or found.__context__
    message = str(found or error)
    if re.match(r"Caught \w+ in DataLoader worker process", message):
        # The message is at the end of the traceback of the worker.
        message = message.rpartition(f"\n{type(found or error).__name__}: ")[2]
    text = " ".join(message.split())
    if text.startswith("Expected"):
        text = key + text
    text = re.sub(rf"{_UNION}.*?Errors: - (.*?) - Expected a <class 'NoneType'>.*", r"\1", text)
    text = _with_file(_with_settings(text + _accepted_options(text)), words)
    return _with_configuration_of_adapters(text, words)


def _with_configuration_of_adapters(text: str, words: Sequence[str]) -> str:
    """Name the configuration of the run in the error for a checkpoint of adapters that a plain model should load."""
    about = re.match(r"This checkpoint contains the adapters of .*?, but not the network\.", text)
    named = [after for word, after in pairwise(words) if word == "--ckpt_path" and Path(after).exists()]
    if about is None or not named or not (saved := _saved_config(str(newest_checkpoint(named[0])))):
        return text
    return (
        f"{about[0]} Use the configuration of that run: --config {saved}; or create a plain checkpoint with "
        "`lora-lightning merge`."
    )


def _with_settings(text: str) -> str:
    """Add the setting that caused the error, or how to get a missing file."""
    if match := re.search(r"`(\w+)Accelerator` can not run on your system.*: (\[.*\])", text):
        kind = match[1].lower()
        return (
            f"trainer.accelerator={kind}: PyTorch finds no such device here. Omit the option to use the available "
            f"devices, or set --trainer.accelerator cpu (available: {match[2]})."
        )
    if match := re.match(r"(logs/(\w+)) (does not exist|contains no checkpoint)", text):
        config = Path("configs") / f"{match[2]}.yaml"
        if config.is_file():
            text += (
                f" `lora-lightning fit --config {config}` creates it; base_checkpoint and --ckpt_path select another."
            )
    if (doubt := re.match(r"(.+?) contains adapters (?:that differ|of another base)", text)) and (
        saved := _saved_config(doubt[1])
    ):
        text = re.sub(r" (Configure|Set base_checkpoint of) LoRAFinetuning.*", "", text)
        text += f" Use the configuration of that run: --config {saved}"
    if (match := re.search(r"File does not exist: '([^']+)'", text)) and (hint := _file_meant(match[1])):
        text += f". {hint}"
    return _with_spelling(text)


def _with_spelling(text: str) -> str:
    """Add how an argument is written."""
    if re.match(r"the following arguments are required: (\w+\.)?model$", text):
        return "There is no model. Name a configuration, --config FILE; `lora-lightning init` writes examples."
    if match := re.match(r"unrecognized arguments: ([^-\s]\S*\.ya?ml)\b", text):
        return f"{text}. Did you mean --config {match[1]}?"
    if match := re.match(r"(.+) is a full checkpoint, but with LoRAFinetuning, ckpt_path is", text):
        option = f"--lora.base_checkpoint {shlex.quote(match[1])}"
        return f"{text} On the command line: {option}; or add --adapter none, which uses the base alone."
    if match := re.search(r"Expected a <class '(?:tuple|list)'>. Got value: ([^\s\[\]]+)$", text):
        return f'{text}. A list is written "[{match[1]}]".'
    if match := re.search(r"\['([\w.]+(?:, ?[\w.]+)+)'\] match no ", text):
        return f'{text} A list of names is written "[{match[1]}]".'
    return text


def _file_meant(path: str) -> str:
    """Return a sentence that names a YAML file of a similar name beside a missing one, or that says how to get it."""
    missing = Path(path)
    beside = {file.stem: file for file in sorted(missing.parent.glob("*.y*ml"))}
    if alike := difflib.get_close_matches(missing.stem, beside, n=1, cutoff=0.75):
        return f"Did you mean {as_typed(beside[alike[0]])}?"
    return how_to_get(path)


def _saved_config(checkpoint: str) -> str:
    """Return the configuration of the run that wrote a checkpoint, or an empty string if there is none."""
    record = RunRecord.of(Path(checkpoint))
    config = None if record is None else record.folder / "config.yaml"
    return shlex.quote(str(config)) if config is not None and config.is_file() else ""


@contextmanager
def unknown_options_explained(parser: ArgumentParser) -> Iterator[None]:
    """Name the nearest option of a parser in the error for an option that does not exist."""
    try:
        yield
    except ArgumentError as error:
        if match := re.match(r"unrecognized arguments: --([\w.-]+)", str(error)):
            raise ArgumentError(None, _unknown_option(match[1], parser)) from error
        raise


def _unknown_option(option: str, parser: ArgumentParser) -> str:
    options = [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]
    text = f"There is no option --{option}."
    if nearest := _nearest(option, [name for name in options if not name.endswith("help")]):
        return f"{text} Did you mean --{nearest}?"
    if "." not in option and "model" in options:
        text += f" Settings have the name of their part in front, for example --model.{option} or --data.{option}."
    return text


def _nearest(option: str, options: Collection[str]) -> str:
    """Return the option that is meant, or an empty string: one of this name, a similar one, or one of another part."""
    part, _, name = option.rpartition(".")
    everywhere = {other.rpartition(".")[2]: other for other in options}
    beside = {other.rpartition(".")[2]: other for other in options if other.rpartition(".")[0] == part}
    if name in everywhere:
        return everywhere[name]
    for among, cutoff in ((beside, 0.6), (everywhere, 0.8)):
        if alike := difflib.get_close_matches(name, among, n=1, cutoff=cutoff):
            return among[alike[0]]
    first, dot, rest = option.partition(".")
    alike = difflib.get_close_matches(first, {other.partition(".")[0] for other in options}, n=1) if dot else []
    return f"{alike[0]}.{rest}" if alike and alike[0] != first else ""


def _with_file(text: str, words: Sequence[str]) -> str:
    """Add the configuration file that the YAML library could not read."""
    if _NO_NAME not in text:
        return text
    for before, word in pairwise(["", *words]):
        name = word.partition("=")[2] if word.startswith(("--config=", "-c=")) else word
        if name is not word or before in ("--config", "-c"):
            try:
                yaml.safe_load(Path(name).read_text(encoding="utf-8"))
            except yaml.YAMLError:
                return text.replace(_NO_NAME, name)
            except (OSError, ValueError):
                continue  # it is YAML instead of a file name
    return text


def _accepted_options(text: str) -> str:
    """Return the options of a class for an unknown option, sorted by similarity."""
    unknown = r"class_path '([\w.]+)': (?:Option '|unrecognized arguments: --)([\w]+)"
    if match := re.search(unknown, text):
        owner, option = named_class(match[1]), match[2]
    elif match := re.search(r"does not accept option 'trainer\.(\w+)'", text):
        owner, option = Trainer, match[1]
    else:
        return ""
    names = ArgumentParser().add_class_arguments(owner, fail_untyped=False)
    alike = difflib.get_close_matches(option, names, n=1)
    guess = f" Did you mean {alike[0]!r}?" if alike else ""
    return f".{guess} It takes: {', '.join(names)}."


def named_class(path: str) -> Any:
    """Return the class with this import path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
