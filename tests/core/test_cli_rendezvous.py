from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.cli.rendezvous import split_endpoint
from torchweft.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("node0", ("node0", None)),
        ("node0:29400", ("node0", 29400)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]", ("::1", None)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
    ],
)
def test_the_parts_of_an_endpoint(text: str, parts: tuple[str, int | None]) -> None:
    assert split_endpoint(text) == parts


@given(
    st.from_regex(r"[a-z0-9.-]{1,20}|[0-9a-f]{0,4}::[0-9a-f]{1,4}", fullmatch=True),
    st.integers(1, 65535),
)
def test_what_is_put_together_is_taken_apart(host: str, port: int) -> None:
    written = f"[{host}]" if ":" in host else host
    assert split_endpoint(written) == (host, None)
    assert split_endpoint(f"{written}:{port}") == (host, port)


@given(st.text(max_size=12))
def test_any_text_is_taken_apart_or_refused(text: str) -> None:
    refused = False
    try:
        host, port = split_endpoint(text)
    except InvalidRequest:
        refused = True
    assert refused or (host and (port is None or 0 < port < 65536))


def test_a_port_is_written_in_ascii() -> None:
    with pytest.raises(InvalidRequest):
        split_endpoint("node0:\u0663\u0663")


def test_what_is_said_of_no_endpoint() -> None:
    with pytest.raises(InvalidRequest) as caught:
        split_endpoint("node0:70000")
    assert str(caught.value) == (
        "--rdzv-endpoint takes HOST:PORT, with a port from 1 to 65535, and [HOST]:PORT for an "
        "address of IPv6; it was given 'node0:70000'"
    )
