"""Terminals that tests look at."""

import os
import re
import sys
import threading


def on_a_terminal(monkeypatch, run, stream="stderr", term="xterm"):
    """What `run()` writes to a stream, when that is a terminal."""
    master, slave = os.openpty()
    shown = bytearray()

    def read():
        # Reading a terminal that nobody has open any more is an error: the end.
        try:
            while part := os.read(master, 4096):
                shown.extend(part)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, stream, terminal)
        patch.setenv("TERM", term)
        patch.setenv("COLUMNS", "200")
        run()
    reader.join(timeout=60)
    os.close(master)
    return shown.decode()


def screen(shown):
    """The lines that a terminal has in the end, of what moves its cursor up and clears lines."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[\??\d*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", shown):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith(("\x1b", "\r")):
            lines[row] += piece
    return lines
