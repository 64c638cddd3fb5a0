"""The browser sample in headless Chromium: its images are Python's, with and without threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_page import RUNTIME, build
from diffusion import GuidedDDIM
from model import FashionDiT
from search_plan import PLAN_FOLDER, STEPS
from serve_page import server
from support.artifacts import shared_artifact
from weights import DIT_WEIGHTS, load_weights

from calicache import Plan, optimize

pytestmark = pytest.mark.slow

OUT = Path(__file__).parents[2] / "out"
READY = "#draw:enabled"
SNEAKER, SEED, GUIDANCE = 7, 11, 2.0


@pytest.fixture(scope="module")
def site() -> Path:
    if not RUNTIME.is_dir():
        pytest.skip("onnxruntime-web is not installed: make packages")
    return shared_artifact("browser", build)


@contextmanager
def served(folder: Path, isolated: bool = True) -> Iterator[str]:
    """The address of a folder while it is served."""
    with server(folder, isolated=isolated) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


Opened = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def opened(browser: Any, site: Path) -> Opened:
    """Opens the page in a tab of its own; nothing may be said on its console."""

    @contextmanager
    def open_page(isolated: bool = True) -> Iterator[Any]:
        said: list[str] = []
        with served(site, isolated) as address:
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.set_default_timeout(120_000)
            tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(address)
            tab.wait_for_selector(READY)
            yield tab
            tab.close()
        assert said == []

    return open_page


@pytest.fixture(scope="module")
def tab(opened: Opened) -> Iterator[Any]:
    """The page after one drawing."""
    with opened() as tab:
        draw(tab)
        yield tab


def draw(tab: Any) -> None:
    tab.click("#classes label:has-text('Sneaker')")
    tab.fill("#seed", str(SEED))
    tab.fill("#guidance", str(GUIDANCE))
    tab.click("#draw")
    tab.wait_for_selector(READY)


def drawn(tab: Any, name: str) -> np.ndarray[Any, Any]:
    """Latents after every step, (T, 1, 1, 28, 28)."""
    script = """async name => (await import("/page.mjs")).seen[name].frames.map(f => [...f])"""
    return np.array(tab.evaluate(script, name), np.float32).reshape(-1, 1, 1, 28, 28)


def noise_of(tab: Any) -> torch.Tensor:
    script = """async seed => [...(await import("/ddim.mjs")).gaussian(seed, 784)]"""
    return torch.tensor(tab.evaluate(script, SEED)).view(1, 1, 28, 28)


@pytest.fixture(scope="module")
def expected(tab: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What Python makes of the page's noise, by run."""
    noise, model = noise_of(tab), load_weights(FashionDiT(), DIT_WEIGHTS)
    models = {"full": model, "searched": optimize(model, Plan.load(PLAN_FOLDER))}
    sampler = GuidedDDIM(STEPS, GUIDANCE, model.null_class)
    return {
        name: sampler.sample(some, noise, torch.tensor([SNEAKER])).numpy()
        for name, some in models.items()
    }


def test_noise_is_normal(tab: Any) -> None:
    noise = noise_of(tab)
    assert abs(float(noise.mean())) < 0.15  # of 784 numbers: 0.036 is usual
    assert abs(float(noise.std()) - 1) < 0.1


@pytest.mark.parametrize("name", ["full", "searched"])
def test_images_are_pythons(tab: Any, expected: dict[str, np.ndarray[Any, Any]], name: str) -> None:
    frames = drawn(tab, name)
    assert len(frames) == STEPS
    # The same float32 operations in two runtimes, over 35 steps.
    np.testing.assert_allclose(frames[-1], expected[name], rtol=0, atol=1e-4)


def test_threads_and_shares_are_told(tab: Any) -> None:
    assert tab.evaluate("crossOriginIsolated")
    threads = min(4, tab.evaluate("navigator.hardwareConcurrency"))
    assert tab.inner_text("#status").startswith(f"WebAssembly, {threads} thread")
    computed = tab.locator("#searched .steps .computed").count()
    assert tab.locator("#full .steps .done").count() == STEPS
    share = round(100 * computed / STEPS)
    assert f"took {share} % of the MACs" in tab.inner_text("#verdict")
    full, searched = (float(tab.inner_text(f"#{n} .macs").split()[0]) for n in ("full", "searched"))
    assert searched / full == pytest.approx(computed / STEPS, abs=2e-3)  # two decimals are shown
    assert all(
        float(tab.inner_text(f"#{name} .seconds").split()[0]) > 0 for name in ("full", "searched")
    )


def test_steps_can_be_looked_at_again(tab: Any) -> None:
    pixels = "document.querySelector('#full canvas').getContext('2d').getImageData(0,0,28,28).data"
    last = tab.evaluate(f"[...{pixels}]")
    tab.fill("#step", "1")
    first = tab.evaluate(f"[...{pixels}]")
    tab.fill("#step", str(STEPS))
    assert tab.evaluate(f"[...{pixels}]") == last != first
    assert (
        first[::4] == np.clip(np.rint((drawn(tab, "full")[0] + 1) * 127.5), 0, 255).ravel().tolist()
    )


@pytest.mark.parametrize("width", [1280, 420])
def test_page_fits_the_window(tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    OUT.mkdir(exist_ok=True)
    tab.screenshot(path=OUT / f"browser-{width}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    boxes = [tab.locator(f"#{name} canvas").bounding_box() for name in ("full", "searched")]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side
    assert all(box["width"] > 150 and box["width"] == box["height"] for box in boxes)


def test_without_isolation_there_is_one_thread(
    opened: Opened, expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    with opened(isolated=False) as tab:
        assert tab.inner_text("#status") == "WebAssembly, 1 thread"
        draw(tab)
        np.testing.assert_allclose(drawn(tab, "searched")[-1], expected["searched"], 0, 1e-4)


def test_without_a_graphics_processor_webgpu_falls_back(opened: Opened) -> None:
    with opened() as tab:
        tab.select_option("#provider", "webgpu")
        tab.wait_for_selector(READY)
        assert tab.inner_text("#status").endswith("; the browser offers no graphics processor")


@pytest.mark.parametrize(
    ("fast", "taken", "told"),
    [
        ("image", True, "WebGPU; its images are WebAssembly's to 1e-5"),
        ("image", False, "WebAssembly, as WebGPU's images are 0.16 off here"),
        ("nothing", False, "WebAssembly, as WebGPU's images are NaN off here"),
        ("error", False, "WebAssembly, as WebGPU fails here: no device"),
    ],
)
def test_webgpu_is_taken_only_if_its_images_are_right(
    tab: Any, fast: str, taken: bool, told: str
) -> None:
    """Stand-ins for both providers: what a graphics processor computes is not to be had here."""
    off = {"image": 1e-5 if taken else 0.16, "nothing": "NaN", "error": 0}[fast]
    script = """async ([fast, off]) => {
        const { chosen } = await import("/check.mjs");
        const runs = scale => ({ full: { image: async noise => noise.map(x => x * scale) } });
        const quick = runs(1 + Number(off));
        const open = async () => { if (fast === "error") throw Error("no device"); return quick; };
        const [kept, told] = await chosen(runs(1), open);
        return [kept === quick, told];
    }"""
    assert tab.evaluate(script, [fast, off]) == [taken, told]


def test_missing_file_is_told(browser: Any, site: Path, tmp_path: Path) -> None:
    for path in site.iterdir():
        if path.name != "weights.bin":
            (tmp_path / path.name).symlink_to(path)
    with served(tmp_path) as address:
        tab = browser.new_page()
        tab.goto(address)
        tab.wait_for_selector("#status.failed")
        assert tab.inner_text("#status") == "weights.bin: the server answers 404"
        assert tab.is_disabled("#draw")
        tab.close()
