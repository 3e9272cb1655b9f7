"""Names in messages: shown as they are, and obeyed by nothing."""

import io
import sys

import pytest
from field.odd_names import CONTROL, MARKDOWN, MARKUP
from rich.console import Console

from data.text import UNPRINTABLE, accept_all_names, printable
from tools.console import echo, print_table, progress
from trainer.reports.measures import plain_markdown
from trainer.telemetry import RunTelemetry


@pytest.mark.parametrize("name", [*MARKUP, *CONTROL])
def test_messages_show_names_and_obey_none_of_them(name, tmp_path, capfd, refused_by_ibq):
    shown = ascii(name)[1:-1] if name in CONTROL else name
    telemetry = RunTelemetry(tmp_path, 0, 10)
    telemetry.console = Console(file=sys.stderr, force_terminal=True, width=200)
    telemetry.say(f"{name}: steps 1 to 2")
    assert capfd.readouterr().err == f"{shown}: steps 1 to 2\n".replace("\\n", "\n" if "\n" in name else "\\n")
    echo(f"report: {name}")
    print_table(name, [["", name], [name, "1"]])
    with progress(name) as show:
        show(1, 2, name)
    out = capfd.readouterr().out
    assert shown in out and not set(UNPRINTABLE.findall(out)) - {"\n"}
    message = refused_by_ibq("checkpoint", "info", tmp_path / name)
    assert shown in message and UNPRINTABLE.findall(message) == ["\n"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_of_a_terminal_refuses_a_name(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    accept_all_names()
    for name in (*MARKUP, *CONTROL, "Ωé猫.png"):
        echo(name)
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert len(lines) == len(MARKUP) + len(CONTROL) + 2  # one name has two lines
    assert "猫" in lines[-1] or "\\u732b" in lines[-1]


def test_names_of_other_scripts_are_left_alone():
    for name in ("é猫Ω.png", "क्‍ष.png", "👩‍👩‍👧.jpg", "a b\\c.png"):
        assert printable(name) == name


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown_of_reports_shows_names(name):
    escaped = plain_markdown(name)
    assert escaped != name and escaped.replace("\\", "") == name
    assert plain_markdown("images/train_00-of_10 (1).tar") == "images/train_00-of_10 (1).tar"
