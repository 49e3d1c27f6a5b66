"""What of the environment ranks get, and paths in a folder that is elsewhere."""

from __future__ import annotations

import pytest

from torchweft_ray.environment import moved, shipped, without_ray


def test_what_belongs_to_a_node_stays_there() -> None:
    environ = {"LR": "0.1", "NCCL_DEBUG": "INFO", "PYTHONPATH": "src", "TORCHWEFT_TRACE": "1"}
    own = {
        "PATH": "/bin",
        "HOME": "/root",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_VISIBLE_DEVICES": "1",
        "RANK": "3",
        "TORCHWEFT_RUN": "{}",
        "TORCHELASTIC_RUN_ID": "x",
        "RAY_ADDRESS": "there:1",
        "CONDA_PREFIX": "/opt",
    }
    assert shipped({**environ, **own}) == environ


def test_what_ray_tells_an_actor() -> None:
    environ = {"PATH": "/bin", "RAY_AUTH_MODE": "token", "CUDA_VISIBLE_DEVICES": "0"}
    rays = {"RAY_JOB_ID": "1", "RAY_RAYLET_PID": "2", "OMP_NUM_THREADS": "1"}
    assert without_ray({**environ, **rays}) == environ


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/here/train.py", "/copy/train.py"),
        ("/here", "/copy"),
        ("/here/../here/a", "/copy/a"),
        ("train.py", "train.py"),
        ("/hereafter/train.py", "/hereafter/train.py"),
        ("", ""),
    ],
)
def test_a_path_in_a_folder_that_is_elsewhere(path: str, there: str) -> None:
    assert moved(path, "/here", "/copy") == there
    assert moved(path, "/here", "/here") == path
