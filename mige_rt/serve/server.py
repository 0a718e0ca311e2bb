"""The HTTP server itself: the sockets that it listens on, and what it ends before it waits for its connections."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mige_rt.errors import InputError, reason
from mige_rt.terminal import report

_BACKLOG = 2048  # connections that wait to be accepted; uvicorn's own number


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """A socket for each of a host's addresses, which refuses connections until `listen`; the caller closes them.

    Args:
        host: A name, or an IPv4 or IPv6 address; 0.0.0.0 and ::, all of this machine's.
        port: 0: a free one, the same for all of them.

    Raises:
        InputError: The host is not this machine's, or the port is taken or may not be used.
    """
    sockets: list[socket.socket] = []
    not_here: OSError | None = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bound_socket(family, (address[0], chosen, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                not_here = error  # localhost has an IPv6 address even on a machine without IPv6
        if not_here is not None and not sockets:
            raise not_here
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name
        for sock in sockets:
            sock.close()
        raise _cannot_listen(host, port, error) from error
    return sockets


def listen(sockets: Sequence[socket.socket], host: str) -> None:
    """Let bound sockets take connections, which wait for the server. Raises InputError when one was overtaken."""
    for sock in sockets:
        try:
            sock.listen(_BACKLOG)
        except OSError as error:  # another server bound the same port meanwhile, and was faster
            raise _cannot_listen(host, sock.getsockname()[1], error) from error


def address_of(sockets: Sequence[socket.socket], host: str) -> str:
    """What a browser takes, with the port that was chosen for 0. host: as it was given to `bind_sockets`."""
    shown_host = f"[{host}]" if ":" in host else host
    return f"http://{shown_host}:{sockets[0].getsockname()[1]}"


def serve_page(app: ASGIApp, host: str, port: int, what: str) -> None:
    """Serve a page until it is told to end, and say on stderr what it is and where.

    Args:
        app: The page.
        host: See `bind_sockets`.
        port: The same.
        what: Begins the line.

    Raises:
        InputError: See `bind_sockets`.
    """
    with ExitStack() as opened, suppress(KeyboardInterrupt):  # which is how it is ended
        sockets = [opened.enter_context(sock) for sock in bind_sockets(host, port)]
        listen(sockets, host)
        report(f"{what}; the page is at {address_of(sockets, host)}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets)


def _bound_socket(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let several servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _cannot_listen(host: str, port: int, error: OSError | ValueError) -> InputError:
    return InputError(
        f"the server cannot listen on the host {host!r} and the port {port} ({reason(error)}); give a --host that is "
        "an address of this machine, and a --port that is free (0 chooses one)"
    )


class Server(uvicorn.Server):
    """Calls a function when it has been told to end, beside waiting for the connections that are open then."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        task = asyncio.create_task(self._on_shutdown())
        await super().shutdown(sockets)
        task.cancel()
