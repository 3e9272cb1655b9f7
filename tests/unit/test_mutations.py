"""The mutations of tests/mutations still fit the code that they change; run.py there shows that tests catch them."""

import ast

import pytest
from mutations.run import ROOT, Mutation, load_mutations, mutated

MUTATIONS = {mutation.name: mutation for mutation in load_mutations()}
mutations = pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)


@mutations
def test_a_patch_applies_and_gives_valid_python(mutation: Mutation):
    texts = mutated(mutation, ROOT)
    assert texts
    for file, text in texts.items():
        assert text != (ROOT / file).read_text(encoding="utf-8")
        ast.parse(text)


@mutations
def test_its_tests_exist(mutation: Mutation):
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not function or function.partition("[")[0] in names, test


def test_each_area_has_two_mutations():
    areas = [mutation.area for mutation in MUTATIONS.values()]
    assert len(areas) >= 26 and all(areas.count(area) >= 2 for area in areas)
