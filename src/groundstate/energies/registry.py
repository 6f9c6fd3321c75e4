"""Finds every energy and reads specs such as ``"1e-3*nuclear + 1e-4*path_energy"`` or ``"schatten(p=0.5)@prox"``.

An energy is found because its module lies in this folder, or because a package names its module (or class) in the
entry-point group ``groundstate.energies``. Nothing is registered by hand: a new file is enough.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

from groundstate.energies.base import Energy, Sum, Term
from groundstate.errors import UsageError, nearest

ENTRY_POINT_GROUP = "groundstate.energies"
_extra: list[ModuleType | type[Energy]] = []


def register(source: ModuleType | type[Energy]) -> None:
    """Adds the energies of a module (or one energy class) that is neither in this folder nor an entry point."""
    if source not in _extra:
        _extra.append(source)


def unregister(source: ModuleType | type[Energy]) -> None:
    """Takes back `register`."""
    if source in _extra:
        _extra.remove(source)


def registered() -> dict[str, type[Energy]]:
    """Returns every concrete energy by name, in alphabetical order."""
    import groundstate.energies as package

    sources: list[ModuleType | type[Energy]] = [
        importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
    ]
    sources += [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    sources += _extra
    found: dict[str, type[Energy]] = {}
    for source in sources:
        for cls in _energies_of(source):
            known = found.setdefault(cls.name, cls)
            if known is not cls:
                raise UsageError(
                    f"two energies are named {cls.name!r}: {known.__module__}.{known.__qualname__} and "
                    f"{cls.__module__}.{cls.__qualname__}; rename one of them"
                )
    return dict(sorted(found.items()))


def _energies_of(source: ModuleType | type[Energy]) -> list[type[Energy]]:
    if inspect.isclass(source):
        return [source]
    return [
        c
        for c in vars(source).values()
        if inspect.isclass(c)
        and issubclass(c, Energy)
        and not inspect.isabstract(c)
        and c.__module__ == source.__name__
        and "name" in vars(c)
    ]


def get(name: str) -> type[Energy]:
    """Returns the energy class of a name, a class name or an alias.

    Raises:
        UsageError: no energy is called so; the nearest name is given.
    """
    energies = registered()
    if name in energies:
        return energies[name]
    for cls in energies.values():
        if name == cls.__name__ or name in cls.aliases:
            return cls
    raise UsageError(
        f"unknown energy {name!r}.{nearest(name, energies)} Known: {', '.join(energies)} "
        "(`groundstate energies` explains them)"
    )


def parse(spec: str) -> Sum:
    """Reads a spec into a sum of terms.

    Grammar: terms joined by ``+``; a term is ``[strength*]name[(field=literal, ...)][@coupling]``; ``none`` or an empty
    string is the empty sum.

    Raises:
        UsageError: names what could not be read, and the nearest energy where a name is unknown.

    >>> parse("1e-3*nuclear + 1e-4*schatten(p=0.5)@prox")
    0.001*nuclear + 0.0001*schatten(p=0.5)@prox
    """
    text = spec.strip()
    if text in ("", "none"):
        return Sum()
    try:
        return Sum(tuple(_terms(_syntax(text), spec)))
    except (SyntaxError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else "too deeply nested"
        shown = repr(spec if len(spec) <= 100 else spec[:100] + "...")
        raise UsageError(
            f"cannot read the energy {shown} ({why}): write e.g. '1e-3*nuclear + 1e-4*path_energy'"
        ) from None


def _syntax(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except ValueError as error:  # a null byte, before Python 3.12
        raise SyntaxError(str(error)) from None


def _terms(node: ast.expr, spec: str) -> list[Term]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, spec) + _terms(node.right, spec)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        if not isinstance(node.right, ast.Name):
            raise UsageError(
                f"cannot read {ast.unparse(node)!r} in {spec!r}: after @ comes loss, grad, prox or monitor"
            )
        terms = _terms(node.left, spec)
        if named := [t for t in terms if t.coupling is not None]:
            raise UsageError(
                f"{named[0]!r} names its coupling already, and @{node.right.id} in {spec!r}: leave one out"
            )
        return [t.via(node.right.id) for t in terms]  # pyright: ignore[reportArgumentType]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        strength, energy = (node.left, node.right) if _number(node.left) is not None else (node.right, node.left)
        factor = _number(strength)
        if factor is None:
            raise UsageError(f"cannot read {ast.unparse(node)!r} in {spec!r}: expected number*energy")
        return [_scaled(t, factor) for t in _terms(energy, spec)]
    return [Term(1.0, _energy(node, spec))]


def _scaled(term: Term, factor: float) -> Term:
    return Term(factor * term.strength, term.energy, term.coupling)


def _number(node: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, SyntaxError):
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _energy(node: ast.expr, spec: str) -> Energy:
    if isinstance(node, ast.Name):
        return _build(node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args or any(k.arg is None for k in node.keywords):
            raise UsageError(
                f"cannot read {ast.unparse(node)!r} in {spec!r}: give options by name, e.g. schatten(p=0.5)"
            )
        try:
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (ValueError, SyntaxError):
            raise UsageError(
                f"cannot read {ast.unparse(node)!r} in {spec!r}: options must be plain numbers or strings"
            ) from None
        return _build(node.func.id, options)
    raise UsageError(
        f"cannot read {ast.unparse(node)!r} in the energy {spec!r}: write e.g. '1e-3*nuclear + 1e-4*path_energy'"
    )


def _build(name: str, options: dict[str, object]) -> Energy:
    cls = get(name)
    try:
        return cls(**options)
    except TypeError:
        from dataclasses import fields

        known = [f.name for f in fields(cls)]
        wrong = [o for o in options if o not in known]
        what = (
            f"no option {wrong[0]!r}.{nearest(wrong[0], known)}" if wrong else "an option missing or of a wrong type."
        )
        raise UsageError(f"{name!r} has {what} Options: {', '.join(known) or 'none'}; got {options}") from None
