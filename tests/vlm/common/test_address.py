"""An address that cannot be served at is one line, before a server starts."""

import socket

import pytest

from vlm_prune.vlm.common.address import check_address
from vlm_prune.vlm.common.errors import InputError


@pytest.fixture
def taken():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_free_port_stays_free(host):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        check_address(host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_refused(taken, host):
    with pytest.raises(InputError, match=f"cannot serve at {host}:{taken}: address already in use"):
        check_address(host, taken)


@pytest.mark.parametrize(
    "host, port, message",
    [
        ("", 7860, "--host '' is no address"),
        ("nowhere.invalid", 7860, "cannot serve at nowhere.invalid:7860"),
        ("256.1.1.1", 7860, "give another --host"),
        ("192.0.2.1", 7860, "cannot assign requested address"),
        ("[::", 7860, "give another --host"),
        ("a" * 300, 7860, "give another --host"),
        ("a\0b", 7860, "give another --host"),
        ("127.0.0.1", 0, "--port 0 is out of range"),
        ("127.0.0.1", 65536, "--port 65536 is out of range"),
    ],
)
def test_a_wrong_address_is_one_line(host, port, message):
    with pytest.raises(InputError) as refused:
        check_address(host, port)
    assert message in str(refused.value) and "\n" not in str(refused.value)
