"""Which of the switches of reinforcement learning help? Each practises from the same finetuned weights of a complete run, over several seeds of the problems' order and of the sampling.

python benchmarks/rl_switches.py --run kindergarten --seeds 1 2 3 --record runs_recorded/rl_switches.json

One that is no switch goes along: `wrong_sign` turns every advantage around, as a mistake would, and must make the model worse.
Every practice is a run of its own beside the given one, called RUN-SWITCH-SEED, so a comparison that was cut short goes on where it stopped.
"""
import argparse, contextlib, json, math, os, shutil, statistics, time
from unittest import mock

from nanochat import grpo
from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.tasks import load_task

SWITCHES = dict( # options of the stage, apart from those that the run's own practice had
    simple={}, deviation=dict(divide_by_deviation=True), fixed_length=dict(fixed_length=True), four_steps=dict(inner_steps=4), four_steps_no_clip=dict(inner_steps=4, clip=0.0),
    clip_high=dict(inner_steps=4, clip_high=0.28), leash=dict(kl=0.05), resample=dict(resample=3), wrong_sign={})
ALL_OFF = dict(divide_by_deviation=False, fixed_length=False, inner_steps=1, clip=0.2, clip_high=0.0, kl=0.0, resample=0)


def sibling(run: Run, name: str) -> Run:
    "A run with the same data, tokenizer and finetuned model, and nothing after them"
    if Run(name).record("sft"): return Run.open(name)
    folder = Run(name).path()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "stages").mkdir(parents=True)
    for part in ("tokenizer", "sft"): os.symlink(run.path(part).resolve(), folder / part)
    (folder / "run.json").write_text(json.dumps(run.info | dict(name=name), indent=1))
    shutil.copy(run.path("stages", "sft.json"), folder / "stages")
    return Run.open(name)


def practise(run: Run, name: str, options: dict) -> dict:
    "The stage's record, and how the measures went"
    copy, own = sibling(run, name), grpo.advantages
    with mock.patch.object(grpo, "advantages", lambda *given: -own(*given)) if "-wrong_sign-" in name else contextlib.nullcontext():
        record = grpo.main(run=copy.name, profile=run.info["profile"], **options)
    log = [m for m in copy.metrics("rl") if "reward" in m]
    def course(key): return [round(m[key], 4) for m in log if key in m]
    return dict(seconds=record["results"]["train_seconds"], **{key: course(key) for key in ("reward", "informative", "length", "entropy", "kl", "clipped", "replaced") if course(key)})


def compare(simple: list[float], other: list[float]) -> str:
    "Mean difference of the pairs with the same seed, and its standard error"
    pairs = [b - a for a, b in zip(simple, other)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return f"{statistics.mean(pairs):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="kindergarten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--switches", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--problems", type=int, default=1000, help="of the exam")
    parser.add_argument("--options", type=json.loads, default={}, help='options of every practice, as in {"steps": 20}')
    parser.add_argument("--record", help="write the figures to this JSON file, after each practice")
    args = parser.parse_args()
    run, compute, began = Run.open(args.run), compute_init("cpu"), time.time()
    base = ((run.record("rl") or {}).get("options") or {}) | ALL_OFF | dict(eval_every=0, eval_examples=1, save_every=10) | args.options
    tokens = base.get("max_tokens", 256)
    test = load_task("GSM8K", "test", run.data_root)
    problems = min(args.problems, len(test))
    def solved(name, stage): return grpo.solve_rate(*load_model(name, stage, compute.device)[:2], test, compute, problems, tokens)
    start, results, courses = solved(args.run, "sft"), {name: [] for name in args.switches}, {}
    print(f"{args.run}, finetuned: {start:.3f} of {problems} problems, ± {math.sqrt(start * (1 - start) / problems):.3f}", flush=True)
    for seed in args.seeds: # seed by seed, so that what is done at any time can be compared
        for name in args.switches:
            sibling_name = f"{args.run}-{name}-{seed}"
            courses[f"{name} {seed}"] = practise(run, sibling_name, base | SWITCHES[name] | dict(seed=seed))
            results[name].append(solved(sibling_name, "rl"))
            print(f"seed {seed}  {name:<20} {results[name][-1]:.3f}  {courses[f'{name} {seed}']['seconds']:.0f} s", flush=True)
            if args.record:
                record = dict(run=args.run, seeds=args.seeds, problems=problems, sft=start, solved=results, options=base, switches={k: SWITCHES[k] for k in args.switches},
                              machine=run.info.get("machine"), seconds=round(time.time() - began), courses=courses)
                with open(args.record, "w") as file: file.write(json.dumps(record, indent=1) + "\n")
    print(f"\n{'':<20} {'solved':<24} {'against simple':<18} seconds")
    for name, shares in results.items():
        against = compare(results["simple"], shares) if name != "simple" and "simple" in results else ""
        mean_seconds = statistics.mean(courses[f"{name} {seed}"]["seconds"] for seed in args.seeds)
        print(f"{name:<20} {f'{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})':<24} {against:<18} {mean_seconds:.0f}")
