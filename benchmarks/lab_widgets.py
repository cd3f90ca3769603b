"""Every widget of every lesson, driven in a real JupyterLab in a headless Chromium.

python benchmarks/lab_widgets.py [--pictures FOLDER] [LESSON …]       (default: all lessons, half an hour on two cores)

Needs `chromium`. A lesson is opened as a learner opens it and run cell by cell at scale tiny. As soon as a cell shows a widget, every control of it is moved
once, with the keyboard or the mouse, and what the widget shows has to change; a control that changed nothing then, such as the slider of a board that is
still empty, gets a second chance when the lesson has run. Then the stored lesson, as a page of HTML without a kernel, has to show something in the same
place, and something else when its second dot is clicked. Exit status 1 where a control or a twin does nothing or a cell fails. What was seen
goes to runs_recorded/lab_widgets.json. Pictures of every widget, before, after, in the dark theme and as a twin, go to FOLDER.
"""
import argparse, ast, base64, contextlib, json, os, re, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from test_serve import BROWSER, Page

RECORD = ROOT / "runs_recorded" / "lab_widgets.json"
SETTINGS = {"notebook-extension/tracker": dict(windowingMode="none"), "apputils-extension/notification": dict(fetchNews="false")}   # all cells stay on the page
# every control of a widget, in the order of the page; what stands in a picture is none. A number and the button beside it are one control, and so is a play bar
CONTROLS = """
const kinds = {slider: '.noUi-handle', menu: 'select', text: 'input[type=text]', box: 'input[type=checkbox]', play: '.widget-play', guess: '.widget-hbox:has(input[type=number]):has(.widget-button)', button: '.widget-button, .widget-toggle-button, .widget-toggle-buttons button:not(.mod-active)'};
const kind = e => Object.keys(kinds).find(k => e.matches(kinds[k]));
const label = e => [e.closest('.widget-inline-hbox')?.querySelector('.widget-label')?.textContent, e.closest('label, button')?.textContent, ''].find(x => x != null && x != '\\u200b').trim();
const controls = root => [...root.querySelectorAll(Object.values(kinds).join(','))].filter(e => !e.closest('.widget-html-content') && !e.parentElement.closest('.widget-play, ' + kinds.guess));
const view = root => [...root.querySelectorAll('.widget-html-content')].map(e => e.innerHTML).join('');
const cell = i => document.querySelectorAll('.jp-Notebook .jp-Cell')[i];
const widget = i => cell(i)?.querySelector('.jp-OutputArea-output .jupyter-widgets');
"""
RUN_ON = """window.stopped = null; const app = window.jupyterapp, nb = app.shell.currentWidget.content;
(async () => { for (let i = %d; i < nb.widgets.length; i++) {
    nb.activeCellIndex = i;
    if (nb.widgets[i].model.type != 'code') continue;
    await app.commands.execute('notebook:run-cell');
    const made = nb.widgets[i].outputArea.model.toJSON();
    if (made.some(o => o.output_type == 'error' || (o.data || {})['application/vnd.jupyter.widget-view+json'])) { window.stopped = [i, made.filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)]; return }
  } window.stopped = [-1, []] })();"""
IDLE = ("follow",)   # reads a run again while another process trains it: in a lesson the training itself does that
KEYS = dict(ArrowRight=39, ArrowLeft=37, Enter=13)


@contextlib.contextmanager
def jupyter_lab(folder: Path):
    "A JupyterLab on a free port of this machine, in a folder with copies of the lessons"
    for path in (ROOT / "lessons").glob("*.ipynb"): shutil.copy(path, folder)
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "NANOCHAT_WIDGETS", "NANOCHAT_STRICT")}
    env |= dict(NANOCHAT_HOME=str(folder / "home"), PYTHONPATH=str(ROOT), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(folder / "spaces"), JUPYTER_CONFIG_DIR=str(folder / "config"))
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                                    "--IdentityProvider.token="], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/lab").is_success: break
            time.sleep(.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


class Lab(Page):
    "A page that has widgets"
    DEEP = CONTROLS

    def wide(self): self.call("Emulation.setDeviceMetricsOverride", width=1250, height=1400, deviceScaleFactor=1, mobile=False)
    def theme(self, name):
        self.js(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
        self.until(f"return document.body.dataset.jpThemeName == 'JupyterLab {name}'")
        time.sleep(1)
    def press(self, key, modifiers=0):
        for kind in ("keyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **(dict(text="\r") if key == "Enter" else {}))
    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"): self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    def spot(self, element):
        "Bring an element into view, and say where its middle is"
        return self.js(f"const e = {element}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]")
    def changed(self, before, i, seconds):
        end = time.time() + seconds
        while time.time() < end:
            if self.js(f"return view(widget({i}))") != before: return True
            time.sleep(.1)
        return False
    def picture(self, path, element):
        if not path: return
        box = self.js(f"const e = {element}; if (!e) return null; e.scrollIntoView({{block: 'start'}}); const r = e.getBoundingClientRect(); return [r.x + scrollX, r.y + scrollY, r.width, Math.min(r.height, 1300)]")
        if box and box[3] > 0: path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", clip=dict(zip(("x", "y", "width", "height"), box), scale=1))["data"]))

    def move(self, i: int, number: int) -> bool:
        "Move one control of the widget of a cell as a hand would, and say whether the widget then shows something else"
        kind = self.js(f"return kind(controls(widget({i}))[{number}])")
        element, before = f"controls(widget({i}))[{number}]", self.js(f"return view(widget({i}))")
        x, y = self.spot(element)
        if kind == "menu":
            self.js(f"const e = {element}; e.selectedIndex = e.selectedIndex ? 0 : 1; e.dispatchEvent(new Event('change', {{bubbles: true}}))")   # a headless browser opens no list
            return self.changed(before, i, 10)
        if kind == "slider":
            at_end = self.js(f"const e = {element}; e.focus(); return e.getAttribute('aria-valuenow') == e.getAttribute('aria-valuemax')")
            for _ in range(5):   # one step may be less than the picture shows
                self.press("ArrowLeft" if at_end else "ArrowRight")
                if self.changed(before, i, 4): return True
            return self.changed(before, i, 10)
        if kind == "guess": x, y = self.spot(element + ".querySelector('input')")
        self.click(x, y)
        if kind == "text":
            self.call("Input.insertText", text=" and Mia")
            self.press("Enter")
        if kind == "guess":
            self.js(element + ".querySelector('input').select()")
            self.call("Input.insertText", text="7")
            self.click(*self.spot(element + ".querySelector('button')"))
        if kind == "play":
            self.click(*self.spot(element + ".querySelector('button')"))
            moved = self.changed(before, i, 5)
            self.click(*self.spot(element + ".querySelector('button')"))
            return moved
        return self.changed(before, i, 20 if kind == "text" else 5)


def name_of(sources: list[str], i: int) -> str:
    "What a cell shows: the function or class that its last line calls"
    last = ast.parse(sources[i]).body[-1].value
    if isinstance(last, ast.Name): last = ast.parse(re.findall(rf"^{last.id} = (.*\(.*)", "\n".join(sources[:i + 1]), re.M)[-1].split("(")[0]).body[0].value
    return ast.unparse(last.func if isinstance(last, ast.Call) else last)


def drive(lesson: str, url: str, folder: Path, pictures: Path | None) -> list[dict]:
    "Run a lesson in JupyterLab and move every control of every widget"
    sources = ["".join(c["source"]) if c["cell_type"] == "code" else "" for c in json.loads((ROOT / "lessons" / f"{lesson}.ipynb").read_text())["cells"]]
    shot = lambda i, when: pictures / f"{lesson}_{i:03}_{when}.png" if pictures else None
    page, found = Lab(f"{url}/lab/tree/{lesson}.ipynb?reset", folder), []
    try:
        page.wide()
        page.until("return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", 180)
        page.until(f"return document.querySelectorAll('.jp-Notebook .jp-Cell').length >= {len(sources)}")
        page.theme("Light")
        for i, source in enumerate(sources):
            if page.js(f"return !!cell({i}).querySelector('.jp-RenderedHTMLCommon input[type=radio]')"): page.picture(shot(i, "0_opened"), f"cell({i}).querySelector('.jp-OutputArea')")
        i = -1
        while True:
            page.js(RUN_ON % (i + 1))
            i, errors = page.until("return window.stopped", 900)
            if i < 0: break
            if errors: raise SystemExit(f"{lesson}, cell {i}: {errors[0]}")
            page.until(f"return !!widget({i})")
            time.sleep(.3)
            page.picture(shot(i, "1_before"), f"widget({i})")
            names = page.js(f"return controls(widget({i})).map(e => [kind(e), label(e)])")
            found.append(dict(lesson=lesson, cell=i, widget=name_of(sources, i), controls=[[*names[n], page.move(i, n)] for n in range(len(names))]))
            if names: page.picture(shot(i, "2_after"), f"widget({i})")
        for one in found:
            for n, control in enumerate(one["controls"]): control[2] = control[2] or page.move(one["cell"], n)
        page.theme("Dark")
        for one in found:
            if one["controls"]: page.picture(shot(one["cell"], "3_dark"), f"widget({one['cell']})")
    finally: page.close()
    return found


def twins(found: list[dict], lesson: str, folder: Path, pictures: Path | None):
    "Look at the stored outputs of the same cells without a kernel"
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", "--output-dir", str(folder), str(ROOT / "lessons" / f"{lesson}.ipynb")], check=True)
    page = Lab((folder / f"{lesson}.html").as_uri(), folder / "browser_twin")
    try:
        page.wide()
        page.until("return !!document.querySelector('.jp-Cell')", 120)
        for one in found:
            output = f"document.querySelectorAll('.jp-Cell')[{one['cell']}].querySelector('.jp-OutputArea-child:last-child .jp-OutputArea-output')"
            first = page.js(f"return {output}?.getBoundingClientRect().height > 20 && {output}.innerText.trim()")
            one["twin"] = bool(first)
            page.picture(pictures / f"{lesson}_{one['cell']:03}_4_twin.png" if pictures else None, output)
            if page.js(f"return {output}.querySelectorAll('input[type=radio]').length") > 1:
                heights = f"return [...{output}.querySelectorAll('div')].map(e => e.getBoundingClientRect().height > 0).join()"
                before = page.js(heights)
                page.click(*page.spot(f"{output}.querySelectorAll('input[type=radio]')[1]"))
                one["dots"] = page.js(heights) != before
                page.picture(pictures / f"{lesson}_{one['cell']:03}_5_dot2.png" if pictures else None, output)
    finally: page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="such as 01_tokens; default: all")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    lessons = options.lessons or sorted(path.stem for path in (ROOT / "lessons").glob("*.ipynb"))
    if options.pictures: options.pictures.mkdir(parents=True, exist_ok=True)
    if not BROWSER: raise SystemExit("no chromium on this machine")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, jupyter_lab(Path(temporary)) as url:
        for lesson in lessons:
            start, folder = time.time(), Path(temporary) / f"browser_{lesson}"
            found = drive(lesson, url, folder, options.pictures)
            twins(found, lesson, folder, options.pictures)
            for one in found:
                still = [f"{kind} “{label}”" for kind, label, moved in one["controls"] if not moved and label not in IDLE]
                good = not still and one["twin"] and one.get("dots", True)
                print(f"{'ok ' if good else 'BAD'} {lesson:16}{one['cell']:4} {one['widget']:20}{len(one['controls']):3} controls" + (", without effect: " + ", ".join(still) if still else "") +
                      ("" if one["twin"] else ", no twin") + ("" if one.get("dots", True) else ", its dots do nothing"), flush=True)
                rows.append(one | dict(good=good))
            print(f"    {lesson}: {len(found)} widgets, {time.time() - start:.0f} s", flush=True)
            known = [row for row in json.loads(RECORD.read_text()) if row["lesson"] != lesson] if RECORD.exists() else []
            known = sorted(known + [row for row in rows if row["lesson"] == lesson], key=lambda row: (row["lesson"], row["cell"]))
            RECORD.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in known) + "\n]\n")
    raise SystemExit(0 if all(row["good"] for row in rows) else 1)


if __name__ == "__main__": main()
