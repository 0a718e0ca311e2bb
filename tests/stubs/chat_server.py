"""A server on this machine with OpenAI's chat API, whose answers the test writes."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Asked:
    """What a request asks."""

    text: str
    image: Image.Image | None
    body: dict[str, Any]


@dataclass
class ChatServer:
    """Answers by `answer`; what it gives is the model's text, or a status and a raw body."""

    answer: Callable[[Asked], str | tuple[int, str]]
    url: str = ""
    delay: float = 0.0
    requests: list[Asked] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def chat_server(answer: Callable[[Asked], str | tuple[int, str]]) -> Iterator[ChatServer]:
    """A server while the block runs."""
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = _asked(body)
            server.requests.append(asked)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            time.sleep(server.delay)
            reply = server.answer(asked)
            status, text = (200, _completion(reply)) if isinstance(reply, str) else reply
            content = text.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # who asked has gone

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def _asked(body: dict[str, Any]) -> Asked:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return Asked(content, None, body)
    texts = [part["text"] for part in content if part["type"] == "text"]
    (url,) = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return Asked(texts[0], image, body)


def _completion(text: str) -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in", "choices": [choice]})
