"""Checks that the default tier catches faults of the product: applies mutations to a copy of the tree and runs tests.

A mutation is a patch ``NAME.patch`` beside this script. Its header says which area it is of, what is wrong with it, and
which tests must fail; the rest is a unified diff of one fault:

    area: EMA
    fault: validation uses the raw weights
    test: tests/unit/trainer/test_task.py::test_evaluation_shows_ema_weights

The tests of all mutations first run on an unchanged copy, where they must pass. ``python tests/mutations/run.py`` runs
all mutations and writes the table in README.md. The exit status is 1 if a mutation is not caught, 2 if a patch does
not apply or the tests cannot run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TABLE = FOLDER / "README.md"
NOT_CAUGHT = "**NOT CAUGHT**"
TIMEOUT_SECONDS = 1200.0
PASSED, FAILED = 0, 1  # pytest's exit statuses; any other means that it could not run the tests


class MutationError(Exception):
    """A patch does not apply, or the tests cannot run."""


class Mutation(NamedTuple):
    """One fault. tests: pytest's node ids, or files."""

    name: str
    area: str
    fault: str
    tests: list[str]
    patch: Path


class Hunk(NamedTuple):
    """A change of a file, as lines before and after it with their line ends."""

    file: str
    before: str
    after: str


class Outcome(NamedTuple):
    """caught_by: the first test that failed, or None."""

    caught_by: str | None
    seconds: float


def load_mutations() -> list[Mutation]:
    """All mutations, by area and name."""
    found = []
    for patch in FOLDER.glob("*.patch"):
        lines = patch.read_text(encoding="utf-8").split("\n--- ", 1)[0].splitlines()
        header = [line.split(": ", 1) for line in lines if ": " in line]
        (area,), (fault,) = ([value for key, value in header if key == name] for name in ("area", "fault"))
        tests = [value for key, value in header if key == "test"]
        found.append(Mutation(patch.stem, area, fault, tests, patch))
    return sorted(found, key=lambda mutation: (mutation.area.lower(), mutation.name))


def hunks(patch: Path) -> list[Hunk]:
    """The changes of a unified diff."""
    found = []
    for line in patch.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/").strip()
        elif line.startswith("@@ "):
            found.append(Hunk(file, "", ""))
        elif found and not line.startswith("--- "):
            last = found[-1]
            before, after = line[1:] * (line[0] in " -"), line[1:] * (line[0] in " +")
            found[-1] = last._replace(before=last.before + before, after=last.after + after)
    return found


def copy_tree(folder: Path) -> None:
    """Copies the files that git tracks, and new ones that it does not ignore, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def mutated(mutation: Mutation, tree: Path) -> dict[str, str]:
    """The files of the tree that a mutation changes, with their new texts. Raises MutationError."""
    texts = {}
    for hunk in hunks(mutation.patch):
        text = texts.get(hunk.file) or (tree / hunk.file).read_text(encoding="utf-8")
        if text.count(hunk.before) != 1:
            raise MutationError(f"{mutation.patch.name} does not apply to {hunk.file}:\n{hunk.before}")
        texts[hunk.file] = text.replace(hunk.before, hunk.after)
    return texts


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests of the default tier in a copy of the tree until one fails; returns pytest's exit status and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-rfE", "-m", "not full", *tests]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(tree)}  # wins over an editable install
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise MutationError(f"{' '.join(tests)} took more than {TIMEOUT_SECONDS:g} s") from error
    return done.returncode, done.stdout + done.stderr


def run(mutation: Mutation, unchanged: Path, tree: Path) -> Outcome:
    """Runs one mutation's tests in ``tree``, a new copy of ``unchanged``. Raises MutationError."""
    shutil.copytree(unchanged, tree)
    try:
        for file, text in mutated(mutation, tree).items():
            (tree / file).write_text(text, encoding="utf-8")
        start = time.monotonic()
        status, output = run_tests(tree, mutation.tests)
        seconds = time.monotonic() - start
    finally:
        shutil.rmtree(tree)
    if status not in (PASSED, FAILED):
        raise MutationError(f"{mutation.name}: pytest ended with status {status}\n{output}")
    # Without parameters that contain spaces.
    failed = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+(?:\[\S+\])?)", output, re.MULTILINE)
    return Outcome(failed[0] if status == FAILED else None, seconds)


def update_table(mutations: list[Mutation], outcomes: dict[str, Outcome]) -> None:
    """Writes the outcomes into README.md, which keeps what it says before the rows and of the other mutations."""
    text = TABLE.read_text(encoding="utf-8")
    caught = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    for name, outcome in outcomes.items():
        caught[name] = f"`{outcome.caught_by.removeprefix('tests/')}`" if outcome.caught_by else NOT_CAUGHT
    rows = [f"| `{name}` | {area} | {fault} | {caught.get(name, 'not run')} |\n" for name, area, fault, *_ in mutations]
    TABLE.write_text(text[: text.index("| `")] + "".join(rows), encoding="utf-8")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--only", metavar="NAME", action="append", help="run this mutation only; may be repeated")
    arguments = parser.parse_args()
    mutations = load_mutations()
    if unknown := set(arguments.only or []) - {mutation.name for mutation in mutations}:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}: see --list")
    chosen = [mutation for mutation in mutations if not arguments.only or mutation.name in arguments.only]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name}: {mutation.area}: {mutation.fault}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ibq-mutations-") as folder:
        unchanged = Path(folder, "unchanged")
        copy_tree(unchanged)
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        print(f"unchanged tree: {len(tests)} selections of tests ...", flush=True)
        status, output = run_tests(unchanged, tests)
        if status != PASSED:
            raise MutationError(f"the tests do not pass without a mutation:\n{output}")
        outcomes = {}
        for mutation in chosen:
            outcome = outcomes[mutation.name] = run(mutation, unchanged, Path(folder, "mutated"))
            print(f"{mutation.name}: {outcome.caught_by or 'NOT CAUGHT'} ({outcome.seconds:.0f} s)", flush=True)
            update_table(mutations, outcomes)
    missed = [name for name, outcome in outcomes.items() if outcome.caught_by is None]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} mutations are caught")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
