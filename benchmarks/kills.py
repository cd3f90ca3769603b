"""Kill a training run of two processes again and again, at random moments, and compare its last weights with those of a run that nobody disturbed.

python benchmarks/kills.py [--kills 20] [--steps 2000] [--life 22] [--record FILE.json]
"""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def stage(home: Path, module: str, *words: str, nproc: int = 1) -> subprocess.Popen:
    "Start a stage in a session of its own"
    start = [sys.executable, "-m"] if nproc == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m", "--"]
    return subprocess.Popen([*start, f"nanochat.{module}", "--run", "run", "--profile", "tiny", *words], cwd=ROOT, start_new_session=True,
                            env=os.environ | dict(NANOCHAT_HOME=str(home), OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_all(home: Path) -> list[list[str]]:
    "kill -9 for every process that works in this home; returns their command lines"
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_HOME") == str(home): found.append((process, process.cmdline()))
        except psutil.Error: continue
    for process, _ in found:  # only now: a stage dies with the notebook's kernel, and would not have been seen
        try: process.kill()
        except psutil.Error: continue
    return [words for _, words in found]


def last_step(home: Path) -> int:
    "Step of the newest checkpoint"
    return max((int(path.name[5:]) for path in (home / "runs/run/base").glob("step_*")), default=0)


def killed_run(home: Path, options: list[str], kills: int, rng: random.Random, seconds: float) -> list[int]:
    "Train to the end through so many kills; returns the step of the newest checkpoint at each"
    steps = []
    while True:
        process, limit = stage(home, "pretrain", *options, nproc=2), rng.uniform(0.3, 1.0) * seconds if len(steps) < kills else None
        try: process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kill_all(home)
            process.wait()
            steps.append(last_step(home))
            print(f"kill {len(steps)} after {limit:.1f} s, newest checkpoint: step {steps[-1]}", flush=True)
            continue
        if process.returncode: raise SystemExit("the run failed by itself")
        return steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--life", type=float, default=22.0, help="seconds after which it is killed at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="write what happened to this JSON file")
    args = parser.parse_args()
    options, homes = ["--steps", str(args.steps), "--save-every", "5"], [Path(tempfile.mkdtemp()) for _ in range(2)]
    for module in ("dataset", "tokenizer"):
        if stage(homes[0], module).wait(): raise SystemExit(f"stage {module} failed")
    shutil.copytree(homes[0], homes[1], dirs_exist_ok=True)
    info = homes[1] / "runs/run/run.json"
    info.write_text(info.read_text().replace(str(homes[0]), str(homes[1])))
    start = time.time()
    if stage(homes[0], "pretrain", *options, nproc=2).wait(): raise SystemExit("the undisturbed run failed")
    seconds = time.time() - start
    steps = killed_run(homes[1], options, args.kills, random.Random(args.seed), args.life)
    straight, killed = (load_file(home / f"runs/run/base/step_{args.steps:08d}/model.safetensors") for home in homes)
    equal = all(torch.equal(straight[name], killed[name]) for name in straight)
    print(f"{len(steps)} kills, {args.steps} steps, {seconds:.0f} s undisturbed: the weights are {'equal to the bit' if equal else 'DIFFERENT'}")
    if args.record: Path(args.record).write_text(json.dumps(dict(kills=len(steps), steps=args.steps, processes=2, newest_checkpoint_at_each_kill=steps, equal_to_the_bit=equal), indent=1) + "\n")
    for home in homes: shutil.rmtree(home)
    if not equal: raise SystemExit(1)


if __name__ == "__main__": main()
