"""Progress of long work: on a terminal, and nowhere else."""

import contextlib
import os
import pty
import sys
import termios
import threading
import time

import keras
import numpy as np
import pytest
from helpers import once
from keras import layers
from rich.console import Console
from rich.live import Live

import keras_lora
from keras_lora import reports
from keras_lora.interop import from_peft, to_peft

pytestmark = once

#: What a terminal is sent when a bar begins, to erase a line of it, and when it ends.
HIDE_CURSOR, ERASE_LINE, SHOW_CURSOR = "\x1b[?25l", "\x1b[2K", "\x1b[?25h"


class Terminal:
    """A pseudo-terminal as stderr, in a `with` statement: pytest has its own until a test begins.

    Attributes:
        text: Everything that was written to it.
    """

    def __init__(self, monkeypatch):
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        self.monkeypatch, self.text = monkeypatch, ""

    def __enter__(self):
        self.reader, writer = pty.openpty()
        termios.tcsetwinsize(writer, (24, 100))
        self.file = os.fdopen(writer, "w")
        self.before, self.attributes = sys.stderr, termios.tcgetattr(self.file)
        self.monkeypatch.setattr(sys, "stderr", self.file)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        return self

    def read(self):
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self.reader, 4096):
                self.text += data.decode()

    def __exit__(self, *_):
        left, attributes = sys.stderr, termios.tcgetattr(self.file)
        self.monkeypatch.setattr(sys, "stderr", self.before)
        self.file.close()
        self.thread.join()
        os.close(self.reader)
        # It is left as it was found.
        assert left is self.file
        assert attributes == self.attributes
        assert reports._OPEN == []


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(reports, "LONG", 0)  # all work takes long
    return Terminal(monkeypatch)


def adapted():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="hidden"), layers.Dense(2, name="head")])
    return keras_lora.apply_lora(model, rank=2, name="french")


def combine(model, folder):
    keras_lora.combine_adapters(model, ["french"], name="small", method="svd", rank=1)


def write(model, folder):
    to_peft(model, folder / "peft", names={"hidden": "model.hidden"})


def read(model, folder):
    write(model, folder)
    from_peft(model, folder / "peft", names={"hidden": "model.hidden"})


#: Long work, and the name of its last step.
WORK = {
    "merge_lora": (lambda model, folder: keras_lora.merge_lora(model), "merging layers/0"),
    "combine_adapters": (combine, "combining layers/0"),
    "compress_adapter": (lambda model, folder: keras_lora.compress_adapter(model, rank=1), "compressing layers/0"),
    "to_peft": (write, "writing the files"),
    "from_peft": (read, "loading the adapter"),
}


@pytest.mark.parametrize("name", WORK)
def test_long_work_shows_a_bar_on_a_terminal_and_removes_it(name, terminal, tmp_path):
    work, last = WORK[name]
    with terminal:
        work(adapted(), tmp_path)
    before, _, after = terminal.text.rpartition(last)
    assert HIDE_CURSOR in before
    _, percent, end = after.rpartition("%")
    assert percent
    assert ERASE_LINE in end
    assert end.count(SHOW_CURSOR) == 1


@pytest.mark.parametrize("name", WORK)
def test_nothing_is_shown_if_interactive_logging_is_off(name, terminal, tmp_path):
    keras.config.disable_interactive_logging()
    try:
        with terminal:
            WORK[name][0](adapted(), tmp_path)
    finally:
        keras.config.enable_interactive_logging()
    assert terminal.text == ""


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1"}], ids=str)
def test_nothing_is_shown_in_a_pipe(variables, monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "LONG", 0)
    for key, text in variables.items():
        monkeypatch.setenv(key, text)
    with (tmp_path / "file").open("w") as file, monkeypatch.context() as inside:
        inside.setattr(sys, "stderr", file)
        keras_lora.merge_lora(adapted())
    assert (tmp_path / "file").read_text() == ""


def test_nothing_is_shown_without_stderr(terminal, monkeypatch):
    with terminal, monkeypatch.context() as inside:
        inside.setattr(sys, "stderr", None)
        keras_lora.merge_lora(adapted())
    assert terminal.text == ""


def test_nothing_is_shown_on_a_terminal_that_cannot_erase(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal:
        keras_lora.merge_lora(adapted())
    assert terminal.text == ""


def test_work_that_is_short_shows_nothing(monkeypatch):
    with Terminal(monkeypatch) as terminal:
        keras_lora.merge_lora(adapted())
    assert terminal.text == ""


def test_a_bar_appears_while_a_step_takes_long(terminal, monkeypatch):
    monkeypatch.setattr(reports, "LONG", 0.02)
    with terminal, reports.progress(2) as step:
        step("a step")
        until = time.monotonic() + 10
        while "a step" not in terminal.text and time.monotonic() < until:
            time.sleep(0.01)
        assert "a step" in terminal.text
        assert SHOW_CURSOR not in terminal.text
    assert SHOW_CURSOR in terminal.text


def test_an_error_inside_leaves_the_terminal_as_it_was(terminal):
    model, out = adapted(), sys.stdout
    model.layers[0].adapter.lora_b.assign(np.full((2, 5), np.nan))
    with terminal, pytest.raises(ValueError, match="not finite"):
        keras_lora.merge_lora(model)
    assert sys.stdout is out
    before, _, after = terminal.text.rpartition("checking layers/0")
    assert HIDE_CURSOR in before
    assert SHOW_CURSOR in after
    assert ERASE_LINE in after


def test_work_inside_work_is_a_line_below(terminal):
    with terminal, reports.progress(2) as outer:
        outer("outer")
        with reports.progress(3) as inner:
            inner("inner")
            assert [task.description for task in reports._OPEN[0].tasks] == ["outer", "inner"]
        assert [task.description for task in reports._OPEN[0].tasks] == ["outer"]
        outer("last")
    assert terminal.text.count(HIDE_CURSOR) == 1
    assert "last" in terminal.text


def test_what_is_printed_meanwhile_goes_where_it_would(terminal, capsys):
    with terminal, reports.progress(1) as step:
        step("a step")
        print("to stdout")
        print("to stderr", file=sys.stderr)
    assert capsys.readouterr().out == "to stdout\n"
    assert "to stderr" in terminal.text


def test_a_name_cannot_command_the_terminal(terminal):
    with terminal, reports.progress(1) as step:
        step("\x1b[31m[red]\x07name")
    assert "?[31m[red]?name" in terminal.text
    assert "\x1b[31m[" not in terminal.text


def test_a_display_of_rich_that_is_there_already_stays_alone(terminal):
    with terminal, Live("theirs", console=Console(stderr=True), auto_refresh=False):
        keras_lora.merge_lora(adapted())
    assert "theirs" in terminal.text
    assert "merging" not in terminal.text
