"""Packages to compare with, in a virtual environment of their own: one of them is imported by the same name as our crate."""
import json, os, shutil, subprocess, sys
from pathlib import Path

PACKAGES = ("rustbpe==0.1.0", "tokenizers==0.23.3", "tiktoken==0.14.0", "gigatoken==0.10.0", "numpy")


def peers_python() -> Path:
    "The Python that has the peers; made on first use"
    folder = Path(os.environ.get("NANOCHAT_HOME", Path.home() / ".cache" / "nanochat")) / "peers"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        uv = shutil.which("uv") or str(Path(".uv/bin/uv").resolve())
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *PACKAGES], check=True)
        (folder / "ready").touch()
    return python


def measure(python: Path, script: str, *args: str, threads: int | None = None) -> dict:
    "Run a script that prints one line of JSON, in a process of its own, on so many cores"
    environment = os.environ | dict(RAYON_NUM_THREADS=str(threads or os.cpu_count()), TOKENIZERS_PARALLELISM="true")
    prefix = ["taskset", "-c", f"0-{threads - 1}"] if threads and shutil.which("taskset") else []
    done = subprocess.run([*prefix, str(python), "-c", script, *args], capture_output=True, text=True, env=environment)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])
