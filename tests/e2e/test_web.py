"""The page at / in a real browser, with a microphone that plays a file."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
import srt
from playwright.sync_api import expect, sync_playwright

KEY = "a-key-of-this-test"
WAIT_MS = 120_000
SENTENCES = ["Where did you find that apple?", "Move these files into the pictures folder."]

# What every control and picture is called, as far as a screen reader can tell.
NAMELESS = """() => [...document.querySelectorAll("button, input, select, audio, [role=img], a")]
  .filter((e) => e.checkVisibility() && !(
    e.getAttribute("aria-label") || e.textContent.trim() || [...(e.labels ?? [])].length))
  .map((e) => e.outerHTML)"""
DOUBLE_IDS = """() => { const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i); }"""
# Texts whose contrast is below 4.5, the least that WCAG 2.2 takes for text of this size.
FAINT = """() => {
  const channels = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour; } return [255, 255, 255]; };
  const contrast = (e) => { const [a, b] = [channels(getComputedStyle(e).color), behind(e)]
    .map(luminance).sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())
      && contrast(e) < 4.5).map((e) => `${e.outerHTML} ${contrast(e)}`); }"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium; Debian has a package of that name")
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Two sentences, a pause between and after them, as a WAV file."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("no espeak-ng; Debian has a package of that name")
    path = tmp_path_factory.mktemp("speech") / "two sentences.wav"
    pause = "<break time='1500ms'/>"
    text = f"<speak>{pause.join([*SENTENCES, ''])}</speak>"
    command = ["espeak-ng", "-v", "en-us", "-m", "-w", str(path), text]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def server(start_server):
    with start_server("--device", "cpu", "--decode-workers", "1", "--api-keys", KEY) as (_, client):
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture(scope="module")
def browser(chromium, speech):
    arguments = [
        "--no-sandbox",  # which root may not have
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={speech}",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


class Watch:
    """What a page asks for, and what it complains of."""

    def __init__(self, page):
        self.requests = []
        self.complaints = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message):
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)


@pytest.fixture
def open_page(browser, server):
    """Open the page, and afterwards require that it kept to this server and had no complaint."""

    @contextmanager
    def opened(*, key=KEY, complains_of=(), **options):
        context = browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        watch = Watch(page)
        page.goto(str(server.base_url))
        if key:
            page.get_by_text("API key").click()
            page.get_by_label("Key").fill(key)
            page.get_by_text("API key").click()
        yield page
        host = f"{server.base_url.host}:{server.base_url.port}"
        own = (f"http://{host}/", f"ws://{host}/", f"blob:http://{host}/", "data:")
        assert [url for url in watch.requests if not url.startswith(own)] == []
        unexpected = [
            each for each in watch.complaints if not any(part in each for part in complains_of)
        ]
        assert unexpected == []
        context.close()

    return opened


def transcribe(page, *files):
    page.set_input_files("#files", [str(file) for file in files])
    card = page.locator("article").first
    expect(card.locator(".actions")).to_be_visible()
    return card


def spoken(card):
    """The card's text without the buttons between."""
    return " ".join(" ".join(card.locator(".segment > p:not(.note)").all_inner_texts()).split())


def test_a_file_is_transcribed_as_the_api_does(open_page, server, speech):
    answer = server.post("/transcribe", files={"file": speech.read_bytes()}).json()
    assert answer["text"]
    with open_page() as page:
        card = transcribe(page, speech)
        assert spoken(card) == answer["text"]
        expect(card.locator(".status")).to_contain_text(f"{answer['duration']:.1f} s of audio")
        expect(card.locator(".transcript")).to_have_attribute("aria-busy", "false")
        card.get_by_text("Time taken").click()
        stages = card.locator("tbody th").all_inner_texts()
        assert stages[:4] == [
            "Reading the audio", "Waiting for its turn", "Listening (encoder)",
            "Writing (language model)",
        ]  # fmt: skip
        assert all(text.endswith(" ms") for text in card.locator("td:not(.bar)").all_inner_texts())
        assert page.evaluate("document.querySelector('article canvas').width") > 0


def test_alternatives_are_listed_the_best_first(open_page, speech):
    with open_page() as page:
        page.get_by_text("Options").click()
        page.select_option("#n-best", "3")
        card = transcribe(page, speech)
        segment = card.locator(".segment").first
        segment.get_by_text("3 alternatives").click()
        answers = segment.locator("li").all_inner_texts()
        assert len(answers) == 3
        assert answers[0].startswith(segment.locator("p").first.inner_text())
        assert all(answer.endswith(" %") for answer in answers)


def test_clicks_and_keys_seek_the_audio(open_page, speech):
    with open_page() as page:
        card = transcribe(page, speech)
        audio = card.locator("audio")
        expect(card.locator("canvas")).to_be_visible()
        card.locator("canvas").click(position={"x": 300, "y": 20})
        page.wait_for_function("() => document.querySelector('audio').currentTime > 1")
        audio.evaluate("(audio) => { audio.pause(); audio.currentTime = 0; }")
        time = card.get_by_role("button", name="Play from").last
        start_s = float(card.locator(".segment").last.get_attribute("data-from"))
        time.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "(start) => document.querySelector('audio').currentTime > start", arg=start_s
        )
        expect(card.locator(".segment").last).to_have_attribute("aria-current", "true")


def test_transcripts_are_downloaded_and_copied(open_page, speech):
    with open_page(permissions=["clipboard-read", "clipboard-write"]) as page:
        card = transcribe(page, speech)

        def download(form):
            with page.expect_download() as download:
                card.get_by_role("button", name=f"Download {form}").click()
            assert download.value.suggested_filename == f"two sentences.{form.lower()}"
            return download.value.path().read_text(encoding="utf-8")

        text = spoken(card)
        subtitles = list(srt.parse(download("SRT")))
        assert " ".join(each.content for each in subtitles) == text
        assert all(each.start < each.end for each in subtitles)
        assert download("VTT").startswith("WEBVTT\n\n00:00:0")
        assert download("TXT") == f"{text}\n"
        assert '"timings"' in download("JSON")
        card.get_by_role("button", name="Copy").click()
        expect(card.locator(".status")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_the_microphone_is_recorded_and_transcribed(open_page):
    with open_page() as page:
        page.get_by_role("button", name="Record", exact=True).click()
        expect(page.locator("#record-status")).to_have_text("Recording")
        expect(page.locator("#live")).not_to_be_empty()  # text while the microphone is on
        expect(page.locator("#level")).to_be_visible()
        assert page.locator("#record-time").inner_text().endswith(" s")
        page.get_by_role("button", name="Stop").click()
        card = page.locator("article")
        expect(card.locator(".actions")).to_be_visible()
        assert card.get_by_role("heading").inner_text().startswith("Recording ")
        assert spoken(card)
        expect(page.get_by_role("button", name="Record", exact=True)).to_be_visible()


def test_a_file_that_waits_can_be_cancelled(open_page, speech):
    with open_page() as page:
        page.set_input_files("#files", [str(speech)] * 3)
        waiting = page.locator("article").first  # the last one that was chosen
        expect(waiting.locator(".status")).to_have_text("Waiting")
        waiting.get_by_role("button", name="Cancel").click()
        expect(waiting.locator(".status")).to_have_text("Cancelled")
        expect(page.locator("article").nth(1).locator(".actions")).to_be_visible()
        expect(waiting.locator(".status")).to_have_text("Cancelled")
        waiting.get_by_role("button", name="Try again").click()
        expect(waiting.locator(".actions")).to_be_visible()


def test_the_record_button_keeps_the_focus_and_recordings_their_end(open_page):
    samples = []
    with open_page() as page:
        button = page.locator("#record")
        button.focus()
        for number in range(1, 4):
            page.keyboard.press("Enter")
            expect(button).to_have_text("Stop")
            expect(page.locator("#record-time")).to_have_text("1 s")
            page.keyboard.press("Enter")
            expect(page.locator("article")).to_have_count(number)
            expect(button).to_be_focused()
            length_s = page.locator("article audio").first.evaluate(
                "audio => audio.readyState ? audio.duration : new Promise("
                "done => audio.addEventListener('loadedmetadata', () => done(audio.duration)))"
            )
            samples.append(round(16_000 * length_s))
    # Blocks of 2048 are gathered; a recording ends within one, but for one in sixteen.
    assert any(each % 2048 for each in samples), samples


def test_a_browser_that_keeps_nothing_for_the_page_does_not_stop_it(open_page, speech):
    with open_page(key=None) as page:
        page.add_init_script(
            "Object.defineProperty(window, 'sessionStorage',"
            " { get() { throw new DOMException('denied', 'SecurityError'); } })"
        )
        page.reload()
        page.get_by_text("API key").click()
        page.get_by_label("Key").fill(KEY)
        card = transcribe(page, speech)
        assert spoken(card)
        assert card.locator(".transcript").get_attribute("lang") == "en"


def test_a_file_that_is_no_audio_gets_the_servers_reason(open_page, tmp_path):
    letter = tmp_path / "letter.wav"
    letter.write_text("Dear Sir or Madam")
    with open_page(complains_of=["415"]) as page:
        page.set_input_files("#files", str(letter))
        alert = page.locator("article [role=alert]")
        expect(alert).to_contain_text("The file is not audio in a known container")
        expect(alert).to_contain_text("audio_unrecognised")
        assert "Traceback" not in page.content()
        page.get_by_role("button", name="Try again").click()
        expect(alert).to_contain_text("The file is not audio")


def test_without_a_key_the_page_asks_for_one_and_keeps_it_for_the_tab(open_page, speech):
    with open_page(key=None, complains_of=["401"]) as page:
        page.set_input_files("#files", str(speech))
        expect(page.locator("article [role=alert]")).to_contain_text("API key")
        expect(page.get_by_label("Key")).to_be_focused()
        page.keyboard.type(KEY)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("article .actions")).to_be_visible()
        page.reload()
        assert page.locator("#api-key").input_value() == KEY
        assert page.evaluate("localStorage.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_and_worked_without_a_mouse(open_page, speech, tmp_path, scheme):
    letter = tmp_path / "letter.wav"
    letter.write_text("Dear Sir or Madam")
    with open_page(color_scheme=scheme, complains_of=["415"]) as page:
        transcribe(page, speech)
        page.set_input_files("#files", str(letter))
        expect(page.locator("article [role=alert]").first).to_be_visible()
        for summary in page.locator("summary:visible").all():
            summary.click()
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate(DOUBLE_IDS) == []
        assert page.evaluate(FAINT) == []
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate("document.activeElement.id || document.activeElement.innerText")
            )
        assert {"files", "record", "language", "n-best", "api-key"} <= reached
        assert {"Copy", "SRT", "Try again"} <= reached


def test_the_page_fits_a_narrow_screen(open_page, speech):
    with open_page(viewport={"width": 360, "height": 640}) as page:
        card = transcribe(page, speech)
        card.get_by_text("Time taken").click()
        page.get_by_text("Options").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_programs_are_told_what_is_where_and_get_no_page(server):
    for accept in ("application/json", "*/*"):
        answer = server.get("/", headers={"Accept": accept})
        assert "POST /transcribe" in answer.json()["endpoints"]
    page = server.get("/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "Accept" in page.headers["vary"]
    assert server.get("/web/../settings.py").status_code == 404
    assert server.get("/web/nothing.js").status_code == 404
