"""Cut the power of `make speedrun` at random moments (kill -9 for all its processes), start the same command again each time, and say which work was done twice.

python benchmarks/power_cuts.py [--profile kindergarten] [--cuts 5] [--seed 0] [--like FOLDER_OF_AN_UNDISTURBED_RUN] [--record FILE.json]
"""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import load_file

from kills import ROOT, kill_all
from nanochat.checkpoint import last_checkpoint
from nanochat.common import load_profile

TRAINED = dict(pretrain="base", midtrain="mid", sft="sft", grpo="rl")  # module → stage


def speedrun(home: Path, profile: str) -> subprocess.Popen:
    "What `make speedrun` starts, in a session of its own; it writes to log.txt"
    run = home / "runs/run"
    run.mkdir(parents=True, exist_ok=True)
    with open(home / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "papermill", "speedrun.ipynb", str(run / "speedrun.ipynb"), "-p", "profile", profile, "-p", "run", "run", "-p", "nproc", "0", "--log-output",
                                 "--no-progress-bar", "--kernel", "python3"], cwd=ROOT, start_new_session=True, env=os.environ | dict(NANOCHAT_HOME=str(home)), stdout=log, stderr=log)


def stage_of(commands: list[list[str]]) -> str:
    "The stage that one of these command lines runs; empty: none"
    for words in commands:
        module = next((word.removeprefix("nanochat.") for word in words if word.startswith("nanochat.")), "")
        if module == "evaluate": return f"eval_{words[words.index('--stage') + 1]}"
        if module: return TRAINED.get(module, module)
    return ""


def measured(home: Path) -> list[dict]:
    "The steps of training that were noted so far, in the order in which they were done"
    path, steps = home / "runs/run/metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try: entry = json.loads(line)
        except ValueError: continue  # a line cut short
        if "loss" in entry: steps.append(entry)
    return steps


def repeated(steps: list[dict], start: int, done: int) -> int:
    "How many steps of a session, which did steps[start:done], were done again after it"
    if start == done: return 0
    last = steps[done - 1]
    first = next((entry["step"] for entry in steps[done:] if entry["stage"] == last["stage"]), last["step"] + 1)
    return last["step"] + 1 - first


def finished(home: Path) -> dict[str, str]:
    "The records of the stages that are complete, but for the report, which is written anew each time"
    return {path.stem: path.read_text() for path in (home / "runs/run/stages").glob("*.json") if path.stem != "report"}


def worked(run: Path) -> float:
    "Seconds that the stages of a run have taken so far; the unfinished one notes them every five"
    try: return (sum(json.loads(path.read_text())["seconds"] for path in run.glob("stages/*.json"))
                 + sum(float(path.read_text()) + min(5, time.time() - path.stat().st_mtime) for path in run.glob("stages/*.seconds")))
    except FileNotFoundError: return worked(run)  # the stage ended just now


def cut_run(home: Path, profile: str, moments: list[float]) -> list[dict]:
    "Run to the end through cuts at these moments, in seconds of the stages' work; what each cut found"
    cuts, run = [], home / "runs/run"
    while True:
        process = speedrun(home, profile)
        while process.poll() is None and (len(cuts) == len(moments) or worked(run) < moments[len(cuts)]): time.sleep(0.2)
        if process.returncode: raise SystemExit(f"the run failed by itself; see {home}/log.txt")
        if process.returncode == 0: return cuts
        stage, done = stage_of(kill_all(home)), finished(home)
        process.wait()
        cuts.append(dict(second=round(moments[len(cuts)]), stage="" if stage in done else stage, steps=len(measured(home)), finished=done))
        print(f"cut {len(cuts)} after {cuts[-1]['second']} s of work, in stage: {stage or 'none'}; complete: {', '.join(done) or 'none'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", default="kindergarten")
    parser.add_argument("--cuts", type=int, default=5, help="the run is divided into so many parts; one cut at a random moment of each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--like", help="folder of a run of the same profile that nobody disturbed, made on this machine: it tells the length, and the weights must be equal")
    parser.add_argument("--record", help="write what happened to this JSON file")
    args = parser.parse_args()
    home, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    length = worked(Path(args.like)) if args.like else 60 * load_profile(args.profile)["about"]["minutes"]
    cuts = cut_run(home, args.profile, [length * (i + rng.random()) / args.cuts for i in range(args.cuts)])
    steps, records, faults, start = measured(home), finished(home), [], 0
    for number, cut in enumerate(cuts, 1):
        done, before = cut.pop("steps"), cut.pop("finished")
        cut["repeated_steps"], start = repeated(steps, start, done), done
        cut["checkpoint_interval"] = json.loads(records[cut["stage"]])["options"]["save_every"] if cut["stage"] in TRAINED.values() else 0
        if cut["repeated_steps"] > cut["checkpoint_interval"]: faults.append(f"cut {number}: {cut['repeated_steps']} steps were done twice")
        faults += [f"cut {number}: stage {name} was complete and ran again" for name, record in before.items() if records[name] != record]
        print(f"cut {number}: begun twice: {cut['stage'] or 'no stage'}; done twice: {cut['repeated_steps']} steps" + f", with a checkpoint every {cut['checkpoint_interval']}" * (cut["checkpoint_interval"] > 0))
    if len(cuts) < args.cuts: faults.append(f"the run was over before cut {len(cuts) + 1}; name an undisturbed one, which tells the length: --like")
    equal = {}
    for name in TRAINED.values() if args.like else ():
        mine, theirs = (load_file(last_checkpoint(run / name) / "model.safetensors") for run in (home / "runs/run", Path(args.like)))
        equal[name] = all(torch.equal(mine[key], theirs[key]) for key in theirs)
        if not equal[name]: faults.append(f"the weights of {name} differ from those of the undisturbed run")
    print(f"{args.profile}: {len(cuts)} cuts, {worked(home / 'runs/run'):.0f} s of work where {length:.0f} were expected; {', '.join(faults) or 'no fault'}" + (f"; the weights are equal to the bit: {', '.join(equal)}" if equal and all(equal.values()) else ""))
    if args.record: Path(args.record).write_text(json.dumps(dict(profile=args.profile, seed=args.seed, seconds=round(worked(home / 'runs/run')), expected=round(length), cuts=cuts, equal_to_the_bit=equal, faults=faults), indent=1) + "\n")
    if faults: raise SystemExit(f"the run is kept in {home}")
    shutil.rmtree(home)


if __name__ == "__main__": main()
