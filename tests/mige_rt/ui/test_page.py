"""The page as its users meet it: a server in a process of its own, in a real browser."""

import asyncio
import base64
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from mige_rt.image_output import read_settings, save_image
from mige_rt.pipeline import MigePipeline

pytest.importorskip("gradio", reason="the page needs the extra ui")

ROOT = Path(__file__).parents[3]
SCENE, SUBJECT = ROOT / "docs/scene.png", ROOT / "docs/subject.png"
BLUE = "make the background blue"

T = TypeVar("T")


@dataclass
class Server:
    """The process of `mige-rt ui`."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def metric(self, name: str) -> float:
        text = urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        match = re.search(rf"^mige:diffusion_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])


def wait_for(what: Callable[[], T]) -> T:
    """What a function gives as soon as that is something."""
    deadline = time.monotonic() + 120
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def server() -> Generator[Server]:
    command = [sys.executable, "-m", "mige_rt.cli", "ui", "--port", "0", "--max-steps", "1000", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    server = Server(process)
    for line in process.stderr:
        server.log.append(line)
        if match := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            server.url = match[1]
            break
    reader = threading.Thread(target=lambda: server.log.extend(process.stderr or ()))
    reader.start()
    assert server.url, "".join(server.log)
    yield server
    process.terminate()
    assert process.wait(60) == 0
    reader.join()
    assert "Traceback" not in "".join(server.log), "".join(server.log)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


class Page:
    """The page in the browser, newly loaded."""

    def __init__(self, browser: Chrome, server: Server, width: int = 1280) -> None:
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(f"{server.url}/")
        self.shown("#subject-prompt .mige-editor")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def shown(self, selector: str) -> Any:
        """The element, when it is there to be seen."""
        found = "return [...document.querySelectorAll(arguments[0])].find(each => each.checkVisibility())"
        return wait_for(lambda: self.script(found, selector))

    def open_tab(self, title: str) -> None:
        find = "return [...document.querySelectorAll('button[role=tab]')].find(each => each.innerText === arguments[0])"
        self.script(f"({find.removeprefix('return ')}).click()", title)
        task = {"Make": "subject", "Edit": "edit", "Put into": "compose"}[title]
        self.shown(f"#{task}-prompt .mige-editor")

    def click(self, selector: str) -> None:
        self.shown(selector).click()

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def prompt(self, task: str) -> str:
        """The text that Gradio has of a prompt."""
        return self.script("return document.querySelector(arguments[0]).value", f"#{task}-prompt textarea")

    def set_number(self, selector: str, value: int) -> None:
        box = self.shown(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(value), Keys.TAB)

    def status(self, task: str, pattern: str) -> str:
        """What the tab says, when it matches."""
        match = wait_for(lambda: re.search(f"^.*{pattern}.*$", self.text(f"#{task}-status"), re.MULTILINE))
        assert match is not None
        return match[0]

    def drop(self, file: Path, selector: str) -> None:
        """Drag a file from the desktop onto an element that takes files."""
        self.script(_DROP, self.shown(selector), file.name, base64.b64encode(file.read_bytes()).decode())


_DROP = """
const [target, name, content] = arguments;
const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, {type: "image/png"}));
for (const type of ["dragenter", "dragover", "drop"])
  target.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data}));
"""


@pytest.fixture
def page(browser: Chrome, server: Server, downloads: Path) -> Page:
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    return Page(browser, server)


def test_an_image_is_dropped_edited_and_downloaded(page: Page, pipe: MigePipeline, downloads: Path) -> None:
    page.open_tab("Edit")
    page.drop(SCENE, "#edit-source button")
    page.shown("#edit-source img")
    page.click("#edit-prompt .mige-editor")
    page.browser.switch_to.active_element.send_keys(BLUE)
    page.click("#edit-settings button")
    page.set_number("#edit-steps input[type=number]", 6)
    page.set_number("#edit-seed input", 5)
    page.script(_WATCH)
    page.click("#edit-run")
    assert page.status("edit", "Done") == "Done. Seed 5."
    statuses, images = page.script("return [window.statuses, window.images]")
    assert any(re.match(r"Step [1-6] of 6", status) for status in statuses)
    assert len(set(images)) >= 2  # on the way
    page.shown("#edit-comparison img")
    page.click("#edit-download")
    (file,) = wait_for(lambda: [*downloads.glob("*.png")])
    assert file.name == "mige-rt-edit-5.png"
    expected = pipe(BLUE, source=Image.open(SCENE), seed=5, num_inference_steps=6).images[0]
    with Image.open(file) as image:
        assert image.tobytes() == expected.tobytes()
    settings = read_settings(file)
    expected_settings = {"prompt": BLUE, "task": "edit", "seed": "5", "num_inference_steps": "6", "size": "64x64"}
    assert expected_settings.items() <= settings.items() and settings["engine"] == pipe.engine.name


_WATCH = """
window.statuses = []; window.images = [];
new MutationObserver(() => {
  window.statuses.push(document.querySelector("#edit-status").innerText);
  const image = document.querySelector("#edit-result img");
  if (image) window.images.push(image.src);
}).observe(document.body, {childList: true, subtree: true, attributes: true, characterData: true});
"""


def test_errors_are_said_in_words(page: Page, tmp_path: Path) -> None:
    page.open_tab("Edit")
    page.click("#edit-run")
    assert page.status("edit", "drop") == "There is no image to edit; drop one above."
    (tmp_path / "broken.png").write_bytes(SCENE.read_bytes()[:2000])
    page.drop(tmp_path / "broken.png", "#edit-source button")
    wait_for(lambda: page.script("return document.querySelector('#edit-source img[src$=\"broken.png\"]')"))
    page.click("#edit-prompt .mige-editor")
    page.browser.switch_to.active_element.send_keys(BLUE)
    page.click("#edit-run")
    assert page.status("edit", "Image 1").startswith("Image 1 cannot be decoded: it is damaged or incomplete")
    page.open_tab("Make")
    page.click("#subject-prompt .mige-editor")
    page.browser.switch_to.active_element.send_keys("a <imagehere> in the sky")
    page.click("#subject-run")
    sentence = page.status("subject", "imagehere")
    assert sentence.startswith("The prompt has 1 <imagehere> and 0 images were given")
    assert page.shown("#subject-status .mige-error p").is_displayed()
    page.shown("#subject-run")  # and it may be tried again


def test_cancel_stops_the_work(page: Page, server: Server) -> None:
    page.open_tab("Edit")
    page.click("#edit-example")
    page.shown("#edit-source img")
    page.click("#edit-settings button")
    page.set_number("#edit-steps input[type=number]", 1000)
    page.click("#edit-run")
    page.status("edit", "Step")
    assert server.metric("num_running_reqs") == 1
    page.click("#edit-cancel")
    assert page.status("edit", "Cancelled") == "Cancelled."
    assert server.metric("num_running_reqs") == 0
    steps = server.metric("steps_total")
    assert steps < 1000
    page.shown("#edit-run")
    assert server.metric("steps_total") <= steps + 1


def test_closing_the_window_stops_the_work(page: Page, server: Server) -> None:
    page.open_tab("Edit")
    page.click("#edit-example")
    page.shown("#edit-source img")
    page.click("#edit-settings button")
    page.set_number("#edit-steps input[type=number]", 1000)
    page.click("#edit-run")
    page.status("edit", "Step")
    page.browser.get("about:blank")
    wait_for(lambda: server.metric("num_running_reqs") == 0)


def test_a_chip_is_inserted_where_the_cursor_is(page: Page) -> None:
    page.drop(SUBJECT, "#subject-references button")
    page.shown("#subject-references img")
    page.click("#subject-prompt .mige-editor")
    page.browser.switch_to.active_element.send_keys("a on a hill", *[Keys.LEFT] * len(" on a hill"))
    page.click("#subject-prompt .mige-insert")
    assert page.prompt("subject") == "a <imagehere> on a hill"
    assert page.text("#subject-prompt .mige-chip") == "image 1"
    assert page.shown("#subject-prompt .mige-chip img").get_attribute("src").endswith("subject.png")
    page.browser.switch_to.active_element.send_keys("big ")
    assert page.prompt("subject") == "a <imagehere> big on a hill"
    page.browser.switch_to.active_element.send_keys(*[Keys.BACKSPACE] * len(" big "))
    page.browser.switch_to.active_element.send_keys(Keys.BACKSPACE, "<ImageHere>")
    assert page.prompt("subject") == "a <imagehere>on a hill"


def test_settings_come_back_from_an_image(page: Page, tmp_path: Path) -> None:
    info = {"prompt": "put <imagehere> into <imagehere>", "task": "compose", "seed": "77", "num_inference_steps": "9"}
    save_image(Image.new("RGB", (64, 64)), tmp_path / "made.png", info | {"guidance_scale": "3.5", "size": "96x64"})
    page.drop(tmp_path / "made.png", "#mige-settings-file button")
    page.shown("#compose-prompt .mige-editor")
    wait_for(lambda: page.prompt("compose") == info["prompt"])
    page.click("#compose-settings button")
    page.shown("#compose-steps input[type=number]")
    value = "return document.querySelector(arguments[0]).value"
    assert page.script(value, "#compose-seed input") == "77"
    assert page.script(value, "#compose-steps input[type=number]") == "9"
    wait_for(lambda: "Drop File" in page.text("#mige-settings-file"))  # there is room for the next
    page.drop(SCENE, "#mige-settings-file button")
    assert "holds no settings" in wait_for(lambda: page.text("#mige-details .mige-error"))


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_examples_work_and_nothing_is_asked_of_others(browser: Chrome, server: Server, width: int) -> None:
    browser.get_log("browser")
    page = Page(browser, server, width)
    assert "tiny" in page.text("#mige-header") and "fp32" in page.text("#mige-header")
    for title, task in (("Make", "subject"), ("Put into", "compose")):
        page.open_tab(title)
        page.click(f"#{task}-example")
        page.shown(f"#{task}-references img")
        page.click(f"#{task}-run")
        assert page.status(task, "Done") == "Done. Seed 4."
    wait_for(lambda: page.script("return document.querySelectorAll('#mige-gallery img').length") == 2)
    assert page.script("return document.documentElement.scrollWidth") <= width
    broken = "return [...document.images].filter(i => i.src && i.complete && !i.naturalWidth).map(i => i.src)"
    assert page.script(broken) == []
    hosts = page.script(
        "return [...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).origin))]"
    )
    assert hosts == [server.url]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_programs_make_images_over_mcp(server: Server, pipe: MigePipeline) -> None:
    pytest.importorskip("mcp")
    url = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()

    async def call() -> tuple[set[str], Any, Any]:
        from mcp import ClientSession
        from mcp.client.streamable_http import streamablehttp_client

        async with (
            streamablehttp_client(f"{server.url}/ui/gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            made = await session.call_tool("edit_image", {"prompt": BLUE, "image": url, "seed": 3})
            refused = await session.call_tool("edit_image", {"prompt": BLUE, "image": "http://127.0.0.1/a.png"})
            return names, made, refused

    names, made, refused = asyncio.run(call())
    assert names == {"make_image", "edit_image", "put_into_image"}
    image = Image.open(BytesIO(base64.b64decode(made.content[0].data)))
    assert image.tobytes() == pipe(BLUE, source=Image.open(SCENE), seed=3).images[0].tobytes()
    assert refused.isError and "links are not followed" in refused.content[0].text
