"""Recognizes the classes of Lightning from both of its packages.

`lightning` and `pytorch_lightning` contain copies of the same classes, which are different for `isinstance`. The
callbacks work with trainers and modules of both.
"""

from __future__ import annotations

from typing import Any, TypeVar

from typing_extensions import TypeIs

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")
Class = TypeVar("Class")


def is_a(thing: object, cls: type[Class]) -> TypeIs[Class]:
    """Return whether an object is an instance of this class of `lightning`, or of its copy in `pytorch_lightning`."""
    return isinstance(thing, cls) or _own(thing, cls.__name__) is not None


def own_class(thing: object, cls: type) -> Any:
    """Return this class of `lightning`, or its copy in `pytorch_lightning` if the object is an instance of that."""
    return _own(thing, cls.__name__) or cls


def _own(thing: object, name: str) -> type | None:
    found = (each for each in type(thing).__mro__ if each.__name__ == name)
    return next((each for each in found if each.__module__.partition(".")[0] in _PACKAGES), None)
