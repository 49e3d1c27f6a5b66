from __future__ import annotations

from pathlib import Path

from torchweft.process import Marks


def test_how_ranks_ended_is_read_back(tmp_path: Path) -> None:
    Marks(str(tmp_path)).tell(3, 0)
    Marks(str(tmp_path)).tell(12, -9)
    assert Marks(str(tmp_path)).read() == {3: 0, 12: -9}
    assert [file.name for file in tmp_path.glob("part*")] == []


def test_a_restart_begins_anew(tmp_path: Path) -> None:
    Marks(str(tmp_path)).tell(0, 1)
    Marks(str(tmp_path)).clear()
    assert Marks(str(tmp_path)).read() == {}


def test_whether_anybody_failed(tmp_path: Path) -> None:
    marks = Marks(str(tmp_path))
    marks.tell(0, 0)
    assert not marks.anybody_failed()
    marks.tell(1, 3)
    assert marks.anybody_failed()


def test_a_folder_that_went_with_the_command(tmp_path: Path) -> None:
    marks = Marks(str(tmp_path / "gone"))
    marks.tell(0, 1)
    assert marks.read() == {}
