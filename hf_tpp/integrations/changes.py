"""Changed methods of somebody else's class: put into the class itself, or into a mixin for subclasses.

    def save_model(original, trainer, *args, **kwargs):    a change: gets the method it stands for, bound
        ...
    patch(Trainer, {"save_model": save_model}, concerns)   Trainer.save_model is changed for objects that concern us
    mixin(Trainer, {"save_model": save_model}, concerns)   a class to put before Trainer, which does the same

So both ways run the same code. A property is changed in the same way; `original` is then a function that gives its
value.
"""

import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from hf_tpp.errors import ConfigurationError

__all__ = ["Change", "Changes", "check_names", "mixin", "patch"]

Change = Callable[..., Any]
"""(bound original, object, *arguments) -> result."""
Changes = Mapping[str, Change]

_ORIGINAL = "_hf_tpp_original"
_IS_MIXED_IN = "_hf_tpp_is_mixed_in"


def check_names(owner: type, changes: Changes) -> None:
    """Raise unless a class has every method that is to be changed.

    Raises:
        ConfigurationError: It has not: its package is of a version that is not supported.
    """
    missing = [name for name in changes if not hasattr(owner, name)]
    if missing:
        package = owner.__module__.partition(".")[0]
        raise ConfigurationError(
            f"{owner.__name__} of {package} {metadata.version(package)} has no {', '.join(missing)}, which "
            f"parallelize() changes for parallel models: use a version that hf_tpp supports, or "
            f"parallelize(patch=False), with which neither Accelerator nor Trainer can be used"
        )


def patch(owner: type, changes: Changes, concerns: Callable[[Any], bool]) -> None:
    """Put changes into a class; those that it has already stay as they are.

    Args:
        owner: The class.
        changes: Name of a method that it has -> what to do in its place.
        concerns: Whether an object is to be treated differently at all.
    """
    for name, change in changes.items():
        found = getattr(owner, name)
        is_property = isinstance(found, property)
        original: Any = found.fget if is_property else found
        if not hasattr(original, _ORIGINAL):
            method = _changed(original, change, concerns)
            setattr(owner, name, property(method) if is_property else method)


def mixin(owner: type, changes: Changes, concerns: Callable[[Any], bool]) -> type:
    """A class that changes what comes after it in the order of bases.

    Args:
        owner: What comes after it, or a base of that.
        changes: Name of a method that `owner` has -> what to do in its place.
        concerns: Whether an object is to be treated differently at all.
    """
    body: dict[str, Any] = {"__doc__": mixin.__doc__, _IS_MIXED_IN: True}
    created = type(f"_{owner.__name__}Changes", (), body)
    for name, change in changes.items():
        method = _inherited(created, name, change, concerns, is_property=isinstance(getattr(owner, name), property))
        setattr(created, name, method)
    return created


def _changed(original: Callable[..., Any], change: Change, concerns: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, _IS_MIXED_IN, False) or not concerns(self):
            return original(self, *args, **kwargs)
        return change(functools.partial(original, self), self, *args, **kwargs)

    setattr(method, _ORIGINAL, original)
    return method


def _inherited(owner: type, name: str, change: Change, concerns: Callable[[Any], bool], *, is_property: bool) -> Any:
    def original_of(self: Any) -> Callable[..., Any]:
        if is_property:
            return lambda: getattr(super(owner, self), name)
        return getattr(super(owner, self), name)  # type: ignore[no-any-return]

    @functools.wraps(change)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = original_of(self)
        return change(original, self, *args, **kwargs) if concerns(self) else original(*args, **kwargs)

    method.__name__ = name
    return property(method) if is_property else method
