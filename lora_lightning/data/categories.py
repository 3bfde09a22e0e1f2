"""Maps the names of folders to classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torchvision.models import get_weight


def categories_of(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of all classes in the order of their indices.

    Args:
        classes: The names, or the name of torchvision's weights that were trained on them
            (`VGG19_Weights.IMAGENET1K_V1`, ImageNet's 1,000).

    Raises:
        ValueError: If the weights do not exist, or if a name is duplicated.
    """
    if isinstance(classes, str):
        try:
            return tuple(get_weight(classes).meta["categories"])
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f"classes={classes!r}: expected a list of names, or the name of torchvision's weights that have "
                "categories, for example VGG19_Weights.IMAGENET1K_V1."
            ) from None
    repeated = sorted({name for name in classes if list(classes).count(name) > 1})
    if repeated or len(classes) < 2:
        problem = f"repeats {', '.join(repeated)}" if repeated else f"has {len(classes)} names"
        raise ValueError(f"classes {problem}; expected two or more, each once.")
    return tuple(classes)


def indices_of(folders: Sequence[str], categories: Sequence[str], parent: str) -> list[int]:
    """Return the class indices for the names of folders, where underscores can replace spaces.

    Args:
        folders: Names of the folders.
        categories: The classes, see `categories_of`.
        parent: Parent of the folders, for the message.

    Raises:
        ValueError: If a folder does not match any class. The message lists similar names.
    """
    index = {name: number for number, name in enumerate(categories)}
    found = {folder: index.get(folder, index.get(folder.replace("_", " "))) for folder in folders}
    unknown = [folder for folder, number in found.items() if number is None]
    if unknown:
        raise ValueError(
            f"{parent} has {len(unknown)} folder{'s that match' if len(unknown) > 1 else ' that matches'} no class: "
            + "; ".join(_with_close_matches(folder, categories) for folder in unknown[:5])
            + (f"; and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + f". Expected names of the {len(categories):,} classes ({', '.join(categories[:3])}, ...)."
        )
    return [number for number in found.values() if number is not None]


def _with_close_matches(folder: str, categories: Sequence[str]) -> str:
    plain = {name.casefold(): name for name in categories}
    spelled = folder.replace("_", " ").casefold()
    close = [name for name in plain if spelled in name][:3] or difflib.get_close_matches(spelled, plain, n=3)
    return repr(folder) + (f" (close: {', '.join(plain[name] for name in close)})" if close else "")
