"What must hold of the pages around the notebooks: the site's map, links, commands, and what CI runs."
import importlib, json, os, re, shlex, subprocess, sys
from pathlib import Path

import pytest, yaml

from nanochat.common import Stage, build_parser, load_profile, module_command, parse_override, parse_value, resolve_options, stage_options

ROOT = Path(__file__).resolve().parent.parent
HOWTO = sorted((ROOT / "howto").glob("*.md"))
PAGES = [*HOWTO, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "llms.txt", "runs_recorded/README.md", "rustbpe/README.md"))]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for folder in ("nbs", "lessons", "howto", ".") for path in (ROOT / folder).glob("*.ipynb"))
MODULES = dict(dataset="dataset", tokenizer="tokenizer", base="pretrain", mid="midtrain", sft="sft", rl="grpo", eval="evaluate")  # by section of a profile


def links(path): return [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()) if not re.match(r"\w+:", target)]


def commands(path): # as lists of words
    "The lines of a page's bash blocks"
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    return [words for block in blocks for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def named(node): # every page in a part of _quarto.yml
    if isinstance(node, str): return [node] if node.endswith((".ipynb", ".md")) and "*" not in node else []
    return [page for part in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else []) for page in named(part)]


def stage_main(module): return importlib.import_module(f"nanochat.{module}").main


# --- pages and links -------------------------------------------------------------------------------------------------

def test_the_site_s_map_names_pages_that_exist_and_every_notebook_and_page():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    pages = named(site["website"])
    assert [page for page in pages + site["project"]["resources"] if not (ROOT / page).is_file()] == []
    sidebar = named(site["website"]["sidebar"])
    assert sorted(sidebar) == sorted([*NOTEBOOKS, *(str(path.relative_to(ROOT)) for path in PAGES if path.suffix == ".md")])


def test_llms_txt_names_every_notebook():
    assert set(NOTEBOOKS) - set(links(ROOT / "llms.txt")) - {"nbs/index.ipynb"} == set()


def test_the_how_to_index_names_every_page():
    assert {path.name for path in HOWTO} - set(links(ROOT / "howto/index.md")) == {"index.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path):
    assert [target for target in links(path) if not (path.parent / target).exists()] == []


def prose(path):
    "The Markdown of a page or a notebook, without its code blocks"
    text = path.read_text() if path.suffix != ".ipynb" else "\n\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    "The names by which a page's headings are linked, as pandoc and GitHub make them"
    def plain(heading): return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip()
    return {re.sub(r"[^\w\- .]", "", plain(heading)).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*?)(?: \{[^}]*\})?$", prose(path), re.MULTILINE)} | set(re.findall(r"\{#([\w-]+)", prose(path)))


@pytest.mark.parametrize("path", [*map(ROOT.joinpath, NOTEBOOKS), *PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_with_an_anchor_lead_to_a_heading(path):
    found = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(path)))
    inside = [(path.parent / target if target else path, anchor) for target, anchor in found if not re.match(r"\w+:", target)]
    assert [(target.name, anchor) for target, anchor in inside if anchor not in anchors(target)] == []


def empty_outputs(notebook):
    "Outputs that need a kernel to be seen: a widget, or the words that stand for one, without a picture or HTML beside it"
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = [kind for kind, value in data.items() if (kind.startswith("image/") or kind in ("text/html", "text/markdown")) and "".join(value).strip()]
            told = re.match(r"\w*(Box|Slider|Tab|Output|Button|Buttons|Dropdown|Text|Label|HTML|Accordion|Play|Progress)\(\w+=", "".join(data.get("text/plain", "")))
            if not shown and (told or any("widget-view" in kind for kind in data)): yield number


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_stores_no_empty_widget(path): assert list(empty_outputs(json.loads((ROOT / path).read_text()))) == []


def test_an_empty_widget_would_be_found():
    def cell(**data): return dict(outputs=[dict(output_type="display_data", data=data)])
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": ["Tab()"]}
    cells = [cell(**view), cell(**view, **{"text/html": ["<svg/>"]}), cell(**view, **{"text/html": [" "]}), cell(**{"text/plain": ["HBox(children=(…))"]}), cell(**{"text/plain": ["Text(3)"]}), {}]
    assert list(empty_outputs(dict(cells=cells))) == [0, 2, 3]


@pytest.mark.slow
def test_smalldocs_finds_nothing_on_the_site():
    program = Path(sys.executable).parent / "smalldocs"
    if not program.exists(): pytest.skip("smalldocs is not installed")
    done = subprocess.run([program, "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_reference_has_a_heading_for_every_public_name(tmp_path):
    command = yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["pre-render"].split()
    assert command[:3] == [".venv/bin/python", "-m", "nanochat.reference"]
    subprocess.run([sys.executable, *command[1:3], tmp_path], cwd=ROOT, check=True)
    modules = [path.stem for path in (ROOT / "nanochat").glob("*.py") if not path.stem.startswith("_")]
    assert sorted(path.stem for path in tmp_path.glob("*.md")) == sorted(modules)
    for module in modules:
        headings = re.findall(r"^## `(\w+)`$", (tmp_path / f"{module}.md").read_text(), re.M)
        assert headings == importlib.import_module(f"nanochat.{module}").__all__
    assert "| `q` | `Tensor` |  | (B, H, T, D) |" in (tmp_path / "attention.md").read_text()
    assert "### `Engine.generate`" in (tmp_path / "engine.md").read_text()


# --- commands in pages -----------------------------------------------------------------------------------------------

def check_module(words): # of a command from `-m` on
    "Raise for an option or value that the module's command line refuses"
    name, *given = words
    module = importlib.import_module(name)
    main = module.examine if "--tasks" in given and hasattr(module, "examine") else module.main  # the harness's command of nanochat.hf
    if isinstance(main, Stage):
        known = stage_options(main.func)
        for option, text in vars(build_parser(main.func, main.section).parse_args(given)).items():
            if option in known and text is not None: parse_value(option, text, known[option]["kind"])
    elif hasattr(module, "build_parser"): module.build_parser().parse_args(given)
    else: assert not any(word.startswith("-") for word in given), words  # a command without options


def check_override(text):
    "Raise for a stage, an option or a value that does not exist"
    for section, values in parse_override(text).items():
        mains = [stage_main(module) for module in (MODULES.values() if section == "all" else [MODULES[section]])]
        if section == "all": assert all(any(option in stage_options(main.func) for main in mains) for option in values), text
        else: resolve_options(mains[0].func, section, load_profile("tiny"), values)


@pytest.mark.parametrize("path", [*HOWTO, ROOT / "CONTRIBUTING.md", ROOT / "README.md"], ids=lambda path: path.name)
def test_commands_of_a_page_exist(path, capsys):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path):
        while re.match(r"[A-Z_]+=", words[0]): words = words[1:]
        program, *given = words
        try:
            if "-m" in given and given[given.index("-m") + 1].startswith("nanochat."): check_module(given[given.index("-m") + 1:])
            for i, word in enumerate(given):
                if word == "override": check_override(given[i + 1])
                elif word.startswith("OPTIONS=") and "override" in word: check_override(shlex.split(word[8:])[2])
                elif word.startswith("PROFILE=") and word != "PROFILE=mine": load_profile(word[8:])
                elif re.match(r"(benchmarks|tests|nbs|howto)/", word): assert (ROOT / word).exists()
        except SystemExit: pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        if program == "make": assert next(word for word in given if "=" not in word and word != "-B") in targets, words
        if program.startswith(".venv/bin/"): assert (Path(sys.executable).parent / program.removeprefix(".venv/bin/")).exists(), program


def test_own_conversations_are_taken_as_the_pages_say(tmp_path):
    from nanochat.tasks import load_mixture
    page = (ROOT / "howto/own_data.md").read_text()
    (tmp_path / "mine.jsonl").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    wanted = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["mixture"]["Custom:/data/mine.jsonl"]
    assert load_mixture(tmp_path, {"Custom:mine.jsonl": wanted}).counts == {"Custom:mine.jsonl": 3}


# --- several nodes ---------------------------------------------------------------------------------------------------

PROGRAMS = {"scontrol": 'printf "first\\nsecond\\n"', "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
            "papermill": f'exec "{sys.executable}" -c "import os, json, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))" "$@"'}


def run_script(script, folder, **variables): # what papermill was called with: [(environment, words)]
    "Run a launcher's script with stand-ins for the cluster's programs"
    for name, body in PROGRAMS.items():
        path = folder / (".venv/bin" if name == "papermill" else "bin") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True,
                          env=dict(PATH=f"{folder / 'bin'}:{os.environ['PATH']}", HOME=str(folder), NANOCHAT_HOME=str(folder / "home")) | variables)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("launcher", ["slurm.sh", "skypilot.yaml"])
def test_launchers_give_every_node_what_the_stages_need(launcher, tmp_path, monkeypatch):
    text = (ROOT / "howto" / launcher).read_text()
    if launcher == "slurm.sh": calls = run_script(text, tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="both")
    else: calls = [call for node in "01" for call in run_script(yaml.safe_load(text)["run"], tmp_path, SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK=node, SKYPILOT_NODE_IPS="first\nsecond")]
    assert len({words[1] for _, words in calls}) == 2, "both nodes write one notebook"
    for node, (variables, words) in enumerate(calls):
        assert words[0] == "speedrun.ipynb" and load_profile(words[words.index("profile") + 1])["nproc"] == 8
        for name in ("NNODES", "NODE_RANK", "MASTER_ADDR"): monkeypatch.setenv(name, variables[name])
        assert ["--nnodes=2", f"--node-rank={node}", "--master-addr=first"] == module_command(8)[3:6]


# --- CI --------------------------------------------------------------------------------------------------------------

def workflow(name): return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())


def steps(name): return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_ci_runs_the_readme_s_two_commands_and_nothing_else():
    section = (ROOT / "README.md").read_text().split("## Two commands")[1].split("```")[1]
    promised = [line.partition("#")[0].strip() for line in section.splitlines()[1:] if line.strip()]
    local = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make")]
    run = [command for step in steps("ci.yml") if (given := step.get("run")) for command in (local if given == ".ci/run" else [given])]
    assert len(promised) == 2 and sorted(run) == sorted(promised)


@pytest.mark.parametrize("name", ["ci.yml", "site.yml"])
def test_actions_have_a_major_version_and_their_files_exist(name):
    for step in steps(name):
        if "uses" in step: assert re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", step["uses"]), step
        elif step["run"].startswith("make"): assert re.search(rf"^{step['run'].split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else: assert os.access(ROOT / step["run"], os.X_OK), step


def test_the_site_that_is_published_is_the_one_that_is_built():
    upload = next(step for step in steps("site.yml") if "upload-pages" in step.get("uses", ""))
    assert upload["with"]["path"] == yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["output-dir"]


def test_issue_forms_and_hooks_are_well_formed():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form) and all({"type", "attributes"} <= set(part) for part in form["body"]), path.name
    assert "nanochat doctor" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"] and {"export", "clean", "ruff"} == {hook["id"] for hook in hooks[0]["hooks"]}
