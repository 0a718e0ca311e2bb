"""The annotation page in a real browser, killed in the middle: nothing that was decided is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from benchmarks.annotation.decisions import Standing, read_decisions
from benchmarks.annotation.pairs import open_pairs
from benchmarks.evaluation.layouts import open_benchmark
from mige_rt.cli import main
from trainer.data.manifest import MANIFEST
from trainer.synthetic.concepts import Concept
from trainer.synthetic.manifest import write_manifest

pytest.importorskip("gradio", reason="the page needs the extra annotate")
PATIENCE = 300  # seconds; a loaded machine draws WebGL slowly


@pytest.fixture(scope="module")
def manifest(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that bring a subject in, 22 of them."""
    folder = tmp_path_factory.mktemp("annotation-page") / "world"
    write_manifest(folder, concepts, 75, 5, 64)
    with_subject = {pair.id for pair in open_pairs(folder / MANIFEST) if pair.row != "edit"}
    lines = [line for line in (folder / MANIFEST).read_text().splitlines() if json.loads(line)["id"] in with_subject]
    path = folder / "subjects.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines[:22]))
    assert len(lines) >= 22
    return path


class Page:
    """The page's process, and a browser that looks at it."""

    def __init__(self, browser: Chrome, manifest: Path, decisions: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.browser = browser
        self._arguments = ["page", manifest, "--decisions", decisions, "--port", self.port]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        command = [sys.executable, "-m", "mige_rt.cli", "annotate", *map(str, self._arguments)]
        self._process = subprocess.Popen(command, start_new_session=True)
        wait(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            assert self._process.wait() == -signal.SIGKILL
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None
        try:
            with urlopen(self.address) as response:
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
                return True
        except URLError:
            return False

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def begin(self, annotator: str) -> str:
        """Open the page and give a name; returns the pair that is shown."""
        self.browser.get(self.address)
        self.write("name", annotator)
        wait(lambda: self.one("#begin").click() is None)
        wait(lambda: self.one("#editor canvas"))
        return wait(self.pair)

    def pair(self) -> str:
        """The pair that is shown: what the buttons send."""
        return str(self.one("#pair :is(input, textarea)").get_property("value"))

    def press(self, key: str) -> str:
        """Press a key of the page, and wait until its pair changes; returns the new one."""
        before = self.pair()
        self.one("body").send_keys(key)

        def changed() -> bool:
            for error in self.browser.find_elements(By.CSS_SELECTOR, ".toast-close"):
                error.click()  # the editor did not have its image yet
                self.one("body").send_keys(key)
            return self.pair() != before

        wait(changed)
        return self.pair()

    def draw(self) -> None:
        """A stroke across the upper left of the target."""

        def drawn() -> bool:  # before the editor has its image, a stroke is lost
            stroke = ActionChains(self.browser).move_to_element_with_offset(self.one("#editor canvas"), -150, -150)
            stroke.click_and_hold().move_by_offset(30, 10).move_by_offset(30, 10).release().perform()
            return self.one("#editor button[aria-label=Undo]").is_enabled()

        wait(drawn)

    def write(self, field: str, text: str) -> None:
        """Fill in a field, once the page lets it be: it draws its fields anew while it loads."""

        def written() -> bool:
            box = self.one(f"#{field} :is(input, textarea)")
            box.clear()
            box.send_keys(text)
            return box.get_property("value") == text

        wait(written)


def wait(condition: Callable[[], Any]) -> Any:
    """What a condition comes to, as soon as it is true of a page that changes meanwhile."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            value = condition()
        except WebDriverException:
            value = None
        if value:
            return value
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.2)


@pytest.fixture
def page(browser: Chrome, manifest: Path, tmp_path: Path) -> Iterator[Page]:
    size = {"width": 1280, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = Page(browser, manifest, tmp_path / "decisions.jsonl")
    page.start()
    yield page
    page.kill()
    browser.get("about:blank")


def test_what_was_decided_before_a_crash_is_there_after_it(page: Page, manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    pairs = {pair.id: pair for pair in open_pairs(manifest)}
    first, second, *_ = pairs
    page.browser.get_log("browser")
    assert page.begin("Ann") == first
    page.draw()
    page.write("subject", "a thing")
    page.write("caption", "a scene with k, d, s and u")  # keys that are typed decide nothing
    assert page.press("k") == second
    page.kill()
    (decision,) = read_decisions([path])
    annotation = decision.annotation
    assert annotation is not None and (decision.pair, decision.annotator) == (first, "Ann")
    assert (annotation.name, annotation.caption) == ("a thing", "a scene with k, d, s and u")
    assert annotation.mask != pairs[first].proposal.mask  # the stroke
    page.start()
    assert page.begin("Ann") == second
    assert "1 of 22 decided: 1 kept, 0 dropped" in page.one("#line").text
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert {name.split("/")[2] for name in names if name.startswith("http")} == {f"127.0.0.1:{page.port}"}
    severe = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "Content Security Policy" in message] == []


def test_the_command_says_where_its_page_is_and_refuses_a_port_that_is_taken(manifest: Path, tmp_path: Path) -> None:
    command = ["annotate", "page", str(manifest), "--decisions", str(tmp_path / "decisions.jsonl"), "--port"]
    process = subprocess.Popen([sys.executable, "-m", "mige_rt.cli", *command, "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().rstrip("\n").partition("; the page is at ")[2]
        assert address.startswith("http://127.0.0.1:") and urlopen(address).status == 200
        refused = CliRunner().invoke(main, [*command, address.rpartition(":")[2]])
        assert refused.exit_code == 2 and "(address already in use); give a --host" in refused.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.long
def test_twenty_samples_become_a_benchmark_that_is_evaluated(page: Page, manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    pairs = [pair.id for pair in open_pairs(manifest)]
    shown, dropped = page.begin("Ann"), set[str]()
    for number, pair in enumerate(pairs):
        assert shown == pair
        if number == 11:
            page.kill()
            assert [decision.pair for decision in read_decisions([path])] == pairs[:11]
            page.start()
            assert page.begin("Ann") == pair
        if number == 13:
            page.press("d")
            assert page.press("u") == pair
        if number in (4, 21):
            dropped.add(pair)
        if pair != pairs[-1]:
            shown = page.press("d" if pair in dropped else "k")
    page.one("body").send_keys("d")
    wait(lambda: "That was all" in page.one("#line").text)
    decisions = Standing(read_decisions([path])).by_pair("Ann").values()
    assert [(d.pair, d.action) for d in decisions] == [(p, "drop" if p in dropped else "keep") for p in pairs]
    out = tmp_path / "benchmark"
    result = CliRunner().invoke(main, ["annotate", "export", str(manifest), str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    benchmark = f"migebench:{out}"
    assert len(open_benchmark(benchmark).samples) == 20
    arguments = ["--benchmark", benchmark, "--stand-in", "--steps", "2", "--out", str(tmp_path / "evaluation")]
    result = CliRunner().invoke(main, ["eval", "run", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "evaluation" / "report" / "report.json").read_text())
    assert report["images"] == {"expected": 20, "judged": 20, "unreadable": {}}
    assert {"EfficientNet-Lite0", "L1", "background shift"} <= set(report["rows"][0]["metrics"])
