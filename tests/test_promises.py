"""Each promise names tests that exist, and each change that breaks one can be made."""

import ast
from collections import Counter

import pytest

from tests.promises import ROOT, Mutation, Promise, promises

PROMISES = promises()
MUTATIONS = [mutation for promise in PROMISES for mutation in promise.mutations]


def missing(test: str) -> bool:
    """Whether there is no such test: a folder or a file with tests, or one of its functions."""
    path, _, name = test.partition("::")
    files = sorted((ROOT / path).rglob("test_*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    if not files or not all(file.is_file() for file in files):
        return True
    found = {
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # A state machine's tests are its rules.
    machine = any("RuleBasedStateMachine" in file.read_text() for file in files)
    return name not in found if name else not (machine or any(each.startswith("test_") for each in found))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.says)
def test_a_promise_is_held_by_tests_that_exist(promise: Promise) -> None:
    assert promise.tests
    assert [] == [test for test in promise.tests if missing(test)]


def test_each_promise_is_made_once() -> None:
    assert {} == {says: count for says, count in Counter(each.says for each in PROMISES).items() if count > 1}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.text.strip()}")
def test_a_mutation_can_be_made_and_names_tests_that_exist(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert source != mutation.applied(source)
    ast.parse(mutation.applied(source))
    assert mutation.fails
    assert [] == [test for test in mutation.fails if missing(test)]


def test_a_test_that_is_not_there_is_found_out() -> None:
    assert missing("tests/test_nowhere.py")
    assert missing("tests/test_promises.py::test_nothing")
    assert missing("tests/vectors")
    assert not missing("tests/test_promises.py::test_each_promise_is_made_once")
    assert not missing("tests/e2e/test_session_machine.py")
