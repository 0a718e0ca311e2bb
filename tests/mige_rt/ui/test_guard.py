"""Who may see the page."""

import base64

import pytest

pytest.importorskip("gradio", reason="the page needs the extra ui")

from fastapi import FastAPI
from starlette.testclient import TestClient

from mige_rt.serve.options import ServerOptions
from mige_rt.ui.mount import PageGuard

KEY = "the key"


def client(options: ServerOptions) -> TestClient:
    app = FastAPI()
    app.add_middleware(PageGuard, options=options)

    @app.post("/ui/upload")
    @app.get("/ui/")
    async def page() -> str:
        return "page"

    @app.get("/health")
    async def health() -> str:
        return "ok"

    del page, health  # the application has them
    return TestClient(app, base_url="http://127.0.0.1:7860")


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()}


def test_the_page_is_for_this_host_and_its_own_pages() -> None:
    guarded = client(ServerOptions(model_names=("tiny",)))
    answer = guarded.get("/ui/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert guarded.get("/ui/", headers={"Host": "elsewhere.example"}).status_code == 403
    assert guarded.get("/ui/", headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert guarded.get("/ui/", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200


def test_a_key_is_asked_for_as_a_password() -> None:
    guarded = client(ServerOptions(model_names=("tiny",), api_key=KEY))
    answer = guarded.get("/ui/")
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert "API key as the password" in answer.json()["error"]["message"]
    assert guarded.get("/ui/", headers=basic(KEY)).status_code == 200
    assert guarded.get("/ui/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for wrong in (basic("another"), basic(""), {"Authorization": "Basic ==="}, {"Authorization": "Bearer no"}):
        assert guarded.get("/ui/", headers=wrong).status_code == 401, wrong
    assert guarded.get("/health").status_code == 200  # not the page's


def test_a_large_upload_is_refused_unread() -> None:
    guarded = client(ServerOptions(model_names=("tiny",), max_body=1000))
    assert guarded.post("/ui/upload", content=b"x" * 1000).status_code == 200
    assert guarded.post("/ui/upload", content=b"x" * (2**20 + 1001)).status_code == 413
