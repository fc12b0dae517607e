"""The last lines of a model's output: bounded, whatever it writes."""

from llmstudiod.launchers.log_buffer import MAX_BYTES, MAX_LINE_CHARS, MAX_LINES, LogBuffer, PipeDrain


def test_lines_are_bounded_in_number() -> None:
    """The oldest give way; those of a run are counted from its beginning."""
    log = LogBuffer()
    for number in range(MAX_LINES + 5):
        log.add(b"%d" % number)
    assert log.last(MAX_LINES + 5)[0] == "5"
    log.begin_run()
    log.add(b"new\r")
    assert log.last_of_run(10) == ["new"]


def test_lines_are_bounded_in_length_and_in_all() -> None:
    """A client can have long ones written; a short one is there after any number of them."""
    log = LogBuffer()
    for _ in range(MAX_LINES):
        log.add(b"x" * 48_000)
    log.add(b"last")
    lines = log.last(MAX_LINES)
    assert lines[-1] == "last"
    assert lines[0] == "x" * MAX_LINE_CHARS + "…"
    assert MAX_BYTES / 8 < sum(map(len, lines)) < MAX_BYTES


def test_line_that_comes_in_pieces_is_one() -> None:
    """Cut as if it had come in one piece, with nothing left of it in the next."""
    log = LogBuffer()
    drain = PipeDrain(log)
    for _ in range(100):
        drain.data_received(b"x" * 5000)
    drain.data_received(b"end\nnext\nrest")
    assert log.last(9) == ["x" * MAX_LINE_CHARS + "…", "next"]
    drain.connection_lost(None)
    assert log.last(1) == ["rest"]
