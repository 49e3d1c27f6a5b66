"""Lines of ranks on one terminal."""

from __future__ import annotations

import pytest

from torchweft_ray.voices import Voices


def test_lines_that_arrive_in_pieces(capfd: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    voices.hear(0, 1, b"one\ntw")
    voices.hear(1, 1, b"other\n")
    voices.hear(0, 2, b"error\n")
    voices.hear(0, 1, "o: ü".encode()[:-1])
    assert capfd.readouterr() == ("[rank 0] one\n[rank 1] other\n", "[rank 0] error\n")
    voices.hear(0, 1, "ü".encode()[1:] + b"\nno end")
    assert capfd.readouterr().out == "[rank 0] two: ü\n"
    voices.close()
    voices.close()
    assert capfd.readouterr().out == "[rank 0] no end\n"


def test_a_progress_bar(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    voices = Voices()
    voices.hear(3, 2, b"\r 10%\r 20%\r")
    voices.hear(3, 2, b" 30%\r")
    voices.hear(3, 2, b"\nend\r\n")
    assert capfdbinary.readouterr().err == (
        b"[rank 3] \r[rank 3]  10%\r[rank 3]  20%\r[rank 3]  30%\r\n[rank 3] end\r\n"
    )
