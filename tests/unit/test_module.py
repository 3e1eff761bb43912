"""The module: rules that no linter checks."""

from __future__ import annotations

import ast
from collections import Counter

from laboratory import NETWEAVER


def test_no_constant_is_bound_twice() -> None:
    """Sections far apart may use the same name, and the later one would win in both."""
    with open(NETWEAVER, encoding="utf-8") as file:
        module = ast.parse(file.read())
    names: Counter[str] = Counter()
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            names.update(target.id for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names[statement.target.id] += 1
    assert [name for name, count in names.items() if count > 1] == []
