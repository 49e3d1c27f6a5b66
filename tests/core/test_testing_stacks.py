"""What faulthandler wrote, read again."""

from __future__ import annotations

import torch

import torchweft
from torchweft.testing.stacks import Frame, main_frames, standing

TORCH = torch.__path__[0]
HERE = torchweft.__path__[0]

TEXT = f"""Timeout (0:00:02)!
Thread 0x00007f0000000002 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Thread 0x00007f0000000001 (most recent call first):
  File "{TORCH}/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "{HERE}/fabric.py", line 613 in barrier
  File "/home/me/train.py", line 8 in <module>
"""


def test_the_main_thread_is_the_one_that_is_read():
    frames = main_frames(TEXT, 0x7F0000000001)
    assert [frame.function for frame in frames] == ["all_reduce", "barrier", "<module>"]
    assert frames[2] == Frame(file="/home/me/train.py", line="8", function="<module>")


def test_the_line_is_that_of_the_user_s_own_code():
    frames = main_frames(TEXT, 0x7F0000000001)
    assert standing(frames) == "train.py, line 8 in <module>, in barrier()"
    assert standing(frames[2:]) == "train.py, line 8 in <module>"


def test_before_any_code_of_the_user_s():
    frames = main_frames(TEXT, 0x7F0000000001)[:2]
    words = "in all_reduce() of distributed_c10d.py, before any code of yours"
    assert standing(frames) == words
    assert standing([]) == "nothing is known of it"


def test_the_kit_s_own_loops_count_as_the_user_s():
    frame = Frame(file=f"{HERE}/testing/failing.py", line="3", function="leaves_out")
    assert standing([frame]) == "failing.py, line 3 in leaves_out"
