"""What does each switch of the modern recipe gain? The classic model and optimizer, each switch alone, and all together, trained on the same tokens.

python benchmarks/ablation.py --record runs_recorded/ablation.json     # the kindergarten's text and size
python benchmarks/ablation.py --profile realdata --data FOLDER         # your own text: a folder in the hub's layout

Equal tokens first. Then every model whose step takes longer or shorter than the classic one's by over 2% is trained again, for as many steps as fit into
the same time. How long a step takes is measured step against step: one of the classic model, one of the other, in turns, so that other work on the machine counts for
both; on a CPU in seconds of the processor.

Whatever is finished is kept: the same command again goes on where it stopped, and another --run starts over. A seed changes the first
weights, not the order of the text: the spread does not hold what another order would add. With --steps on the kindergarten's text stay below
180: about step 190 its documents turn from stories to games, and a run that ends just then measures the surprise (2.9 bits per byte, all switches alike).
"""
import argparse, json, math, platform, shutil, statistics, time
from dataclasses import replace
from pathlib import Path

import torch

from nanochat import pretrain
from nanochat.common import Compute, Run, compute_init, load_profile, pick_dtype, resolve_options
from nanochat.dataloader import DocumentLoader
from nanochat.dataset import corpus_sources, main as dataset_stage
from nanochat.gpt import RECIPES
from nanochat.muon import make_optimizers
from nanochat.tokenizer import Tokenizer, main as tokenizer_stage
from nanochat.train import Trainer, accumulation_steps

FORMAT = dict(float32=dict(dtype="float32"))  # of matrix products; else what compute_init picks
OPTIMIZER = dict(polar_express=dict(quintics="polar_express"), normuon=dict(line_memory=0.9), decay=dict(weight_decay=0.28), cautious_decay=dict(weight_decay=0.28, cautious=True),
                 long_warmdown=dict(warmdown=0.65, final_lr=0.05), long_momentum=dict(momentum=0.97, momentum_steps=400, momentum_end=0.9))
VARIANTS = {"classic": {}} | {name: {name: value} for name, value in RECIPES["modern"].items()} | OPTIMIZER | {"modern": dict(recipe="modern")} | FORMAT


def new_trainer(run: Run, compute: Compute, options: dict, name: str, fields: dict, seed: int) -> Trainer: # options: of the stage base
    "A new model with these fields, ready to be trained"
    tokenizer, shape = Tokenizer.load(run.path("tokenizer")), (options["batch_size"], options["sequence_len"])
    if "dtype" in fields: compute = replace(compute, dtype=pick_dtype(compute.device, fields["dtype"]))
    torch.manual_seed(seed)
    overrides = {key: value for key, value in fields.items() if key not in ("recipe", "dtype")}
    chosen, rates, schedule = pretrain.choose_fields(fields.get("recipe", "classic"), overrides, **{key: options[key] for key in pretrain.CLASSIC})
    model = pretrain.new_model(tokenizer, compute, options["depth"], options["n_embd"], options["n_head"], options["sequence_len"], **chosen)
    return Trainer(model, make_optimizers(model, **rates), DocumentLoader(corpus_sources(run), tokenizer, *shape, packing=options["packing"], device=compute.device), run, compute, f"ablation_{name}_{seed}",
                   tokenizer, options["steps"], 0.0, accumulation_steps(options["total_batch_size"], *shape), schedule, compile=options["compile"], log_every=10**9)


def train(run: Run, compute: Compute, options: dict, name: str, fields: dict, seed: int) -> dict:
    "Train one model and measure it, or take the result of an earlier call with the same options"
    file, settings = ("ablation", f"{name}_{seed}.json"), options | dict(fields=fields, seed=seed)
    if run.path(*file).exists() and (known := run.read_json(*file))["settings"] == settings: return known
    torch._dynamo.reset()  # it gives up compiling after eight models of one class
    trainer = new_trainer(run, compute, options, name, fields, seed)
    shutil.rmtree(run.path(trainer.stage), ignore_errors=True)
    trainer.fit()
    model = trainer.model.eval()
    result = dict(settings=settings, steps=trainer.step, tokens=trainer.tokens, params=model.num_params(), flops_per_token=model.flops_per_token(),
                  bpb=pretrain.validation_bits_per_byte(model, run, trainer.tokenizer, compute, options["batch_size"], options["sequence_len"], options["eval_tokens"]))
    run.write_json(result, *file)
    shutil.rmtree(run.path(trainer.stage))
    return result


def step_ratio(run: Run, compute: Compute, options: dict, name: str, pairs: int = 40) -> float: # against the classic model
    "How many times as long a step takes: the median of pairs of steps, one right after the other; kept like a result"
    file, settings = ("ablation", f"{name}_step_ratio.json"), options | dict(fields=VARIANTS[name], pairs=pairs)
    if run.path(*file).exists() and (known := run.read_json(*file))["settings"] == settings: return known["ratio"]
    torch._dynamo.reset()
    trainers, times = [new_trainer(run, compute, options, each, VARIANTS[each], 0) for each in ("classic", name)], ([], [])
    clock = time.process_time if compute.device.type == "cpu" else time.perf_counter
    for _ in range(3 + pairs):
        for trainer, taken in zip(trainers, times):
            start = clock()
            trainer.train_step(1.0)
            taken.append(clock() - start)
    result = dict(settings=settings, ratio=statistics.median(other / classic for classic, other in list(zip(*times))[3:]))  # the first steps compile
    run.write_json(result, *file)
    return result["ratio"]


def show(name: str, results: list[dict], base: list[dict], ratio: float) -> str: # results and base: one for each seed; ratio: of the step's time
    "One line of the table"
    bpb, [first, *_] = [r["bpb"] for r in results], results
    gains = [r["bpb"] - b["bpb"] for r, b in zip(results, base)]
    gain = "" if results is base else f"{statistics.mean(gains):+.4f}" + (f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.4f}" if len(gains) > 1 else "")
    return (f"{name:<18}{statistics.mean(bpb):.4f} ({min(bpb):.4f} to {max(bpb):.4f})   {gain:<20}{first['params'] / 1e6:>10.2f}"
            f"{first['flops_per_token'] / base[0]['flops_per_token']:>12.2f}{first['tokens'] / 1e6:>10.2f}{ratio:>10.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="name of the run that holds text, tokenizer and results (default: ablation-PROFILE)")
    parser.add_argument("--profile", default="kindergarten", help="gives the sizes")
    parser.add_argument("--data", help="a folder in the hub's layout; by default the profile's own text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="of each model; by default the profile's")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=[name for name in VARIANTS if name not in FORMAT], help="which models; classic is always one of them, float32 only where named")
    parser.add_argument("--record", help="write everything to this JSON file")
    args = parser.parse_args()
    args.run = args.run or f"ablation-{args.profile}"
    dataset_stage(args.run, args.profile, **(dict(data=args.data) if args.data else {}))
    tokenizer_stage(args.run, args.profile)
    known = Run.open(args.run).record("dataset")["options"]["data"]
    if args.data and known != args.data: raise SystemExit(f"run {args.run} holds other data ({known}); choose another --run")
    run, profile = Run.open(args.run), load_profile(args.profile)
    options = resolve_options(pretrain.main.func, "base", profile, dict(steps=args.steps) if args.steps else {})
    compute = compute_init(options["device"], options["dtype"])
    names = [name for name in VARIANTS if name in args.only or name == "classic"]
    results, same_time = {name: [] for name in names}, {}
    for turn, seed in enumerate(args.seeds):
        for name in names[turn:] + names[:turn]:  # each seed begins with another model, so that none always runs on a warmer machine
            results[name].append(train(run, compute, options, name, VARIANTS[name], seed))
            print(f"seed {seed}, {name}: {results[name][-1]['bpb']:.4f} bits per byte", flush=True)
    ratios = {name: 1.0 if name == "classic" else step_ratio(run, compute, options, name) for name in names}
    for name, ratio in ratios.items():
        if abs(ratio - 1) < 0.02: continue
        fitting = options | dict(steps=round(options["steps"] / ratio))
        same_time[name] = [train(run, compute, fitting, f"{name}_same_time", VARIANTS[name], seed) for seed in args.seeds]
        print(f"{name}, {fitting['steps']} steps: {statistics.mean(r['bpb'] for r in same_time[name]):.4f} bits per byte", flush=True)
    for title, table in {"the same tokens": results, "the same time": same_time}.items():
        print(f"\n{title:<18}{'bits per byte':<29}{'against classic':<20}{'weights, M':>10}{'operations':>12}{'tokens, M':>10}{'step time':>10}")
        for name in table: print(show(name, table[name], results["classic"], ratios[name]))
    if args.record:
        def bare(table): return {name: [{k: v for k, v in r.items() if k != "settings"} for r in rows] for name, rows in table.items()}
        record = dict(profile=args.profile, corpus=run.info["corpus"], seeds=args.seeds, options=options, machine=run.info.get("machine"), git=run.info.get("git"), torch=torch.__version__, python=platform.python_version(),
                      device=str(compute.device), dtype=str(compute.dtype)[6:], threads=torch.get_num_threads(), step_ratios=ratios, results=bare(results), same_time=bare(same_time))
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
