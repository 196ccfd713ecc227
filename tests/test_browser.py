"""Crystals turn in a real browser, and are looked at: in the notebook of predictions in JupyterLab, and on pages.

Needs Debian's ``chromium`` and ``chromium-driver``, and ``pip install selenium``; pictures are kept in ``.browser/``.
"""

from __future__ import annotations

import base64
import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from movies import Frame, write_slider
from player import view_static
from pymatgen.core import Lattice, Structure

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".browser"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--enable-unsafe-swiftshader",  # WebGL without a graphics card
    "--use-angle=swiftshader",
    "--window-size=1400,1600",
)
START_S, RUN_S = 60, 400  # a run stops there whatever happens

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer; errors on the way count as false."""
    end, reason = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if answer := condition():
                return answer
        except Exception as error:
            reason = error
        time.sleep(0.5)
    raise AssertionError(f"no {what} within {seconds} s ({reason})")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """Address of a JupyterLab on a copy of the notebooks, with settings and runtime of its own."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    page = tmp_path / "notebooks" / "06_predict.ipynb"
    page.write_text(page.read_text().replace('"n_samples = 60', '"n_samples = 6'))  # enough to look at
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, own = secrets.token_hex(16), {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME")}
    own |= {"CONTSP_OUTPUT_DIR": str(tmp_path / "output"), "PYTHONPATH": str(ROOT)}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind) for kind in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [
        "--LabApp.expose_app_in_browser=True",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={tmp_path / 'notebooks'}",
    ]
    rest = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # Lab shows figures inline
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=rest | own, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/{{}}?token={token}"
    try:
        wait_for(lambda: urllib.request.urlopen(address.format("api"), timeout=5).close() is None, START_S, "server")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(START_S)
    yield driver
    driver.quit()


def run_notebook(browser: Any, address: str) -> None:
    """Open a notebook, run all its cells, and wait for the last one."""
    browser.get(address)
    session = "const session = jupyterapp.shell.currentWidget.context.sessionContext;"
    session += "const kernel = session.session.kernel;"
    ready = "return session.isReady && kernel.connectionStatus == 'connected' && kernel.status == 'idle'"
    wait_for(lambda: browser.execute_script(session + ready), START_S, "kernel")
    time.sleep(3)  # the page starts a kernel, and may then exchange it for the one that the notebook names
    wait_for(lambda: browser.execute_script(session + ready), START_S, "kernel")
    run = "jupyterapp.commands.execute('notebook:run-all-cells').finally(() => {window.hasRun = true}); return null"
    browser.execute_script(run)
    try:
        wait_for(lambda: browser.execute_script("return window.hasRun"), RUN_S, "end of the run")
    finally:
        browser.save_screenshot(str(KEPT / "page.png"))


def picture(canvas: Any, path: Path) -> np.ndarray:
    """Screenshot of an element, kept; (height, width, 3)."""
    from PIL import Image

    canvas.parent.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(2)
    path.write_bytes(canvas.screenshot_as_png)
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), dtype=float)


def test_the_predicted_crystal_is_drawn_turns_and_has_labels(lab, browser):
    from selenium.webdriver.common.action_chains import ActionChains

    KEPT.mkdir(exist_ok=True)
    run_notebook(browser, lab.format("lab/tree/06_predict.ipynb"))
    text = browser.find_element("css selector", ".jp-Notebook").text
    assert "javascript error" not in text.lower()
    assert "Traceback" not in text
    canvas = wait_for(lambda: browser.find_element("css selector", ".jp-OutputArea canvas"), START_S, "canvas")
    before = picture(canvas, KEPT / "before.png")
    drawn = (before < 240).any(axis=2)
    drawn[-20:, -20:] = False  # the handle to change the size
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    assert 0.15 < drawn.mean() < 0.9  # a crystal that fills its box, and is not the box
    assert max(np.ptp(rows) / before.shape[0], np.ptp(columns) / before.shape[1]) > 0.7
    assert rows.min() > 0 and rows.max() < before.shape[0] - 1  # none of it is cut off
    assert before[drawn].std() > 30
    ActionChains(browser).drag_and_drop_by_offset(canvas, 120, 40).perform()
    after = picture(canvas, KEPT / "after.png")
    assert np.abs(after - before).mean() > 5
    oxygen = np.argwhere((after[..., 0] > 200) & (after[..., 1:] < 60).all(axis=2))
    labels = ""
    hull = np.argwhere((after[..., :3] > 195).all(axis=2) & (after[..., :3] < 240).all(axis=2))
    places = np.concatenate([oxygen[:: len(oxygen) // 8], hull[:: len(hull) // 8]])
    for row, column in places - np.array(after.shape[:2]) // 2:
        ActionChains(browser).move_to_element_with_offset(canvas, int(column), int(row)).pause(1).perform()
        labels += browser.page_source  # of an atom, or of the polyhedron in front of it
    assert re.search(r">O \(atom \d\)<", labels)
    assert re.search(r"Ti \(atom \d\), \d corners at \d\.\d\d – \d\.\d\d Å \(polyhedron\)<", labels)
    browser.save_screenshot(str(KEPT / "turned.png"))
    use_the_form(browser)


def use_the_form(browser: Any) -> None:
    """Type a formula, press Predict; a crystal to turn appears, another one on demand, and an archive to take along."""
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def find(what: str) -> Any:
        return browser.find_element("css selector", f".widget-vbox {what}")

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", find(".widget-text input"))
    time.sleep(1)
    for what, text in ((".widget-text:not(:has([type=number])) input", "NaCl"), ("input[type=number]", "2")):
        find(what).send_keys(Keys.CONTROL, "a")
        find(what).send_keys(text, Keys.TAB)
    Select(find(".widget-dropdown select")).select_by_visible_text("prototypes")
    find("button").click()
    canvas = wait_for(lambda: find("canvas"), RUN_S, "crystal in the form")
    first = picture(canvas, KEPT / "form.png")
    assert 0.15 < (first < 240).any(axis=2).mean() < 0.9
    link = find("a[download='NaCl.zip']").get_attribute("href").removeprefix("data:application/zip;base64,")
    names = zipfile.ZipFile(io.BytesIO(base64.b64decode(link))).namelist()
    assert {"NaCl/candidates.csv", "NaCl/01_NaCl.cif"} <= set(names)
    browser.save_screenshot(str(KEPT / "form_page.png"))


def frames(n_frames: int) -> list[Frame]:
    """Rutile that forms on a straight path from other places."""
    oxygen = 0.305
    places = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [oxygen, oxygen, 0], [-oxygen, -oxygen, 0]])
    places = np.vstack([places, [[0.5 + oxygen, 0.5 - oxygen, 0.5], [0.5 - oxygen, 0.5 + oxygen, 0.5]]])
    away, found = np.random.default_rng(0).uniform(-0.4, 0.4, places.shape), []
    for step, part in enumerate(np.linspace(1, 0, n_frames)):
        lattice = Lattice.tetragonal(4.6 + part, 2.96)
        structure = Structure(lattice, ["Ti"] * 2 + ["O"] * 4, places + part * away)
        found.append(Frame(step, structure, part - 1.6, 0.02 + part, "noise level σ (Å)", None))
    return found


def mean_change(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


def test_the_film_is_drawn_follows_the_slider_plays_turns_and_has_labels(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    KEPT.mkdir(exist_ok=True)
    browser.get(write_slider(frames(9), tmp_path / "film.html").as_uri())
    find = browser.find_element

    def said() -> str:
        return find("css selector", ".crystal").text

    canvas, curve = (find("css selector", f".crystal canvas.{name}") for name in ("turn", "curve"))
    slide = "const s = document.querySelector('input'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    pictures, curves = [], []
    for step in (0, 4, 8):
        browser.execute_script(slide, step)
        pictures.append(picture(canvas, KEPT / f"film_{step}.png"))
        curves.append(picture(curve, KEPT / "film_curve.png"))
        assert f"step {step} of 8" in said()
        drawn = (pictures[-1] < 240).any(axis=2)
        assert 0.03 < drawn.mean() < 0.6 and pictures[-1][drawn].std() > 30
        drawn[2:-2, 2:-2] = False
        assert not drawn.any()  # none of it is cut off
    assert mean_change(*pictures[:2]) > 3 and mean_change(*pictures[1:]) > 3
    assert mean_change(*curves[:2]) > 0.05 and mean_change(*curves[1:]) > 0.05  # the dots have moved
    label = find("css selector", ".crystal .label")
    ActionChains(browser).move_to_element(canvas).pause(0.5).perform()  # titanium in the middle of the cell
    assert label.value_of_css_property("visibility") == "visible"
    assert re.fullmatch(r"(Ti|O) \(atom \d\)( – (Ti|O) \(atom \d\): [12]\.\d\d Å)?", label.text)
    ActionChains(browser).drag_and_drop_by_offset(canvas, 90, 50).perform()
    turned = picture(canvas, KEPT / "film_turned.png")
    assert mean_change(turned, pictures[-1]) > 3
    find("css selector", ".crystal button").click()
    wait_for(lambda: "pause" in said(), 5, "film")
    wait_for(lambda: "play" in said(), 20, "end of the film")
    assert "step 8 of 8" in said()
    assert mean_change(picture(canvas, KEPT / "film_played.png"), turned) < 1
    browser.save_screenshot(str(KEPT / "film.png"))
    assert browser.get_log("browser") == []


def test_static_view_turns_on_a_saved_page_and_is_the_still_without_scripts(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    views = [view_static(frame.structure)._repr_html_() for frame in frames(2)]
    page = tmp_path / "page.html"
    page.write_text("<meta charset='utf-8'>" + views[0] + views[1])
    browser.get(page.as_uri())
    canvases = browser.find_elements("css selector", ".crystal canvas.turn")
    assert len(canvases) == 2 and browser.find_elements("css selector", ".crystal img") == []
    before = [picture(canvas, KEPT / f"static_{index}.png") for index, canvas in enumerate(canvases)]
    ActionChains(browser).drag_and_drop_by_offset(canvases[0], 90, 50).perform()
    after = [picture(canvas, KEPT / f"static_{index}_turned.png") for index, canvas in enumerate(canvases)]
    assert mean_change(before[0], after[0]) > 3 and mean_change(before[1], after[1]) < 1  # each by itself
    page.write_text("<meta charset='utf-8'>" + re.sub("<script.*?</script>", "", views[1], flags=re.DOTALL))
    browser.get(page.as_uri())
    still = picture(browser.find_element("css selector", ".crystal img"), KEPT / "static_still.png")
    assert (still < 240).any(axis=2).mean() > 0.05
