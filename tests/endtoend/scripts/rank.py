"""Says what this rank sees. Usage: rank.py QUESTION [ARGUMENT…]."""

import json
import multiprocessing
import os
import sys

import beside

question = sys.argv[1]

if question == "start method":
    multiprocessing.set_start_method("spawn")


def answer():
    if question == "argv":
        return [sys.argv, sys.path[0], __name__, os.path.basename(__file__), os.getcwd()]
    if question == "beside":
        return beside.VALUE
    if question == "start method":
        return [
            multiprocessing.get_start_method(),
            multiprocessing.current_process().name,
            multiprocessing.parent_process() is None,
        ]
    if question == "stdin":
        return sys.stdin.read()
    if question == "threads":
        import torch

        return [torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")]
    if question == "environment":
        return {
            name: os.environ[name]
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        }
    if question == "spawned":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.map(beside.double, [21])
    raise KeyError(question)


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    said = json.dumps([rank, answer()])
    # One write, so that the lines of two ranks do not mix.
    os.write(1, (said + "\n").encode())
    if question == "exit":
        sys.exit(3)
