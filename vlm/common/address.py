"""Addresses to serve at."""

import socket

from vlm_prune.vlm.common.errors import InputError

MOST_PORT = 65535


def check_address(host: str, port: int) -> None:
    """Finds out before any work whether a server can listen at an address.

    Args:
        host: a name or an address of this machine.
        port: to listen at.

    Raises:
        InputError: if the host is none of this machine's, or another program listens there.
    """
    if not host:
        raise InputError(f"--host {host!r} is no address; give one such as 127.0.0.1")
    if not 0 < port <= MOST_PORT:
        raise InputError(f"--port {port} is out of range; give one from 1 to {MOST_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as server:
            # a port whose last server has just ended is free
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen()
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(
            f"cannot serve at {host}:{port}: {reason}; give another --host or --port"
        ) from error
