"""The HTTP server itself, which has something to end before it waits for its connections."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn


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
