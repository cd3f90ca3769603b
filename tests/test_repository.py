"What must hold of the repository itself."
import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for folder in ("nbs", "lessons", "howto", ".") for p in (ROOT / folder).glob("*.ipynb"))


def tool(name): return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the sources in which commands may write"
    copy = tmp_path_factory.mktemp("tree") / "nanochat-course"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".uv", "target", ".git", "__pycache__", "*.egg-info", ".pytest_cache"))
    return copy


def contents(folder, pattern): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern))}


def test_the_library_is_the_export_of_the_notebooks(tree):
    before = contents(tree / "nanochat", "*.py")
    subprocess.run([tool("nbdev_export")], cwd=tree, check=True)
    assert contents(tree / "nanochat", "*.py") == before


def test_the_notebooks_are_clean_and_keep_their_tags(tree):
    before = contents(tree, "*.ipynb")
    subprocess.run([tool("nbdev_clean")], cwd=tree, check=True)
    assert contents(tree, "*.ipynb") == before
    tags = [c["metadata"].get("tags") for c in json.loads((tree / "speedrun.ipynb").read_text())["cells"]]
    assert ["parameters"] in tags


def test_all_notebooks_but_the_speedrun_are_run():
    pattern = re.search(r"--skip_file_re '(.*?)'", (ROOT / "Makefile").read_text())[1]
    assert [p.name for p in NOTEBOOKS if re.search(pattern, p.name)] == ["speedrun.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_stores_outputs_without_errors_or_paths(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    outputs = json.dumps([c["outputs"] for c in cells])
    assert '"output_type": "error"' not in outputs
    assert not re.search(r"/(root|home/\w+|work)/", outputs), "a machine's path is in an output"
    if path.name != "speedrun.ipynb": assert sum(bool(c["outputs"]) for c in cells) >= len(cells) / 4, "outputs are not stored"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "nbs"], ids=lambda p: p.stem)
def test_no_exported_cell_is_longer_than_a_screen(path):
    exported = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if "".join(cell["source"]).startswith("#| export")]
    assert [source.splitlines()[1] for source in exported if len(source.splitlines()) > 40] == []


def test_the_readme_is_made_from_the_index(tree):
    made = subprocess.run([tool("jupyter"), "nbconvert", "--to", "markdown", "--no-input", "--log-level", "ERROR", "--stdout", "nbs/index.ipynb"], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "README.md").read_text().strip() == made.replace("](../", "](").strip()


def test_links_between_files_lead_somewhere():
    missing = []
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        text = path.read_text() if path.suffix == ".md" else "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
        text = re.sub(r"```.*?```", "", text, flags=re.S)   # table[i](ids) in code is no link
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not re.match(r"\w+:", target) and not (path.parent / target).exists(): missing.append((path.name, target))
    assert missing == []


def test_ruff_finds_no_mistake():
    if not Path(tool("ruff")).exists(): pytest.skip("ruff is not installed")
    found = subprocess.run([tool("ruff"), "check", "--no-cache", "--output-format", "concise"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_record_is_listed_with_the_pages_that_show_it():
    rows = [line for line in (ROOT / "runs_recorded/README.md").read_text().splitlines() if line.startswith("| [")]
    listed = [(name, pages) for row in rows for name in re.findall(r"\((\w+\.json)\)", row) for pages in [re.findall(r"\((\.\./[^)]*)\)", row.split("|")[4])]]
    assert sorted(name for name, _ in listed) == sorted(p.name for p in (ROOT / "runs_recorded").glob("*.json"))
    sources = {"../lessons/13_speedrun.ipynb": "nanochat/lesson_speedrun.py", "../lessons/06_pretraining.ipynb": "nanochat/lesson_pretrain.py"}
    for name, pages in listed:
        for page in pages:
            texts = [(ROOT / "runs_recorded" / page).read_text(), (ROOT / sources[page]).read_text() if page in sources else ""]
            assert any(name.removesuffix(".json") in text for text in texts), f"{page} does not show {name}"


def test_every_profile_loads_and_every_option_exists():
    from nanochat.common import list_profiles, load_profile, resolve_options
    import importlib
    sections = dict(dataset="dataset", tokenizer="tokenizer", base="pretrain", eval="evaluate", mid="midtrain", sft="sft", rl="grpo")
    for name in list_profiles():
        profile = load_profile(name)
        assert profile["profile"] == name and {"machine", "minutes", "memory_gb", "cost_usd"} <= set(profile["about"])
        assert set(profile["stages"]) <= {"all", *sections}, name
        for section, module in sections.items():
            resolve_options(importlib.import_module(f"nanochat.{module}").main.func, section, profile, {})


def test_the_seed_s_models_have_their_published_sizes():
    import torch
    from nanochat.gpt import GPT, GPTConfig
    with torch.device("meta"): sizes = {d: GPT(GPTConfig.from_depth(d)).num_params() for d in (20, 26, 32)}
    assert sizes == {20: 560_988_160, 26: 1_081_999_360, 32: 1_879_048_192}


def test_importing_the_core_needs_no_heavy_package():
    code = ("import sys; import nanochat.engine, nanochat.train, nanochat.tasks, nanochat.evaluate, nanochat.grpo; "
            "print([m for m in ('matplotlib', 'pandas', 'transformers', 'datasets', 'panel', 'fastapi', 'IPython') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
