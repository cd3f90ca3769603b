"""How large a model for how much computing? Models of several widths, each trained on what a budget of operations allows it: a small model reads much, a large one little.

python benchmarks/scaling.py --data FOLDER --record runs_recorded/scaling.json     # your own text: a folder in the hub's layout

For every budget (operations, counted as `flops_per_token` does) the best width lies inside of a valley; where its floor moves from budget to budget says
what to do with more computing (Hoffmann et al. 2022, arXiv 2203.15556, the second of their three ways). Operations are counted and not timed, so other
work on the machine does no harm. What is finished is kept: the same command again goes on where it stopped.
"""
import argparse, json, platform
from pathlib import Path

import torch

from ablation import train
from nanochat import pretrain
from nanochat.common import Run, compute_init, load_profile, resolve_options
from nanochat.dataset import main as dataset_stage
from nanochat.tokenizer import Tokenizer, main as tokenizer_stage

HEAD = 32  # width of a head, where the model is so wide
FEWEST, MOST = 40, 4000  # steps: fewer do not train, more take too long on two cores


def sized(run: Run, compute, options: dict, width: int, budget: float) -> dict:
    "The options with this width, and with as many steps as the budget allows it"
    sizes = options | dict(n_embd=width, n_head=max(1, width // HEAD))
    model = pretrain.new_model(Tokenizer.load(run.path("tokenizer")), compute, sizes["depth"], width, sizes["n_head"], sizes["sequence_len"])
    return sizes | dict(steps=round(budget / (model.flops_per_token() * sizes["total_batch_size"])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="scaling", help="name of the run that holds text, tokenizer and results")
    parser.add_argument("--data", help="a folder in the hub's layout; by default the kindergarten's text")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192, 256])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.5e12, 4.5e12, 13.5e12], help="operations of one training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", help="write everything to this JSON file")
    args = parser.parse_args()
    dataset_stage(args.run, "kindergarten", **(dict(data=args.data) if args.data else {}))
    tokenizer_stage(args.run, "kindergarten")
    run = Run.open(args.run)
    options = resolve_options(pretrain.main.func, "base", load_profile("kindergarten"), dict(eval_tokens=131_072))
    compute, found = compute_init(options["device"], options["dtype"]), []
    for budget in sorted(args.budgets):
        for width in args.widths:
            sizes = sized(run, compute, options, width, budget)
            if not FEWEST <= sizes["steps"] <= MOST: continue
            result = train(run, compute, sizes, f"width{width}_{budget:.2g}", {}, args.seed)
            found.append(dict(budget=budget, width=width) | {k: result[k] for k in ("params", "flops_per_token", "steps", "tokens", "bpb")})
            print(f"{budget:.2g} operations, width {width:>3}: {result['params']:>9,} weights, {result['tokens']:>9,} tokens, {result['bpb']:.4f} bits per byte", flush=True)
    if args.record:
        record = dict(corpus=run.info["corpus"], seed=args.seed, options=options, machine=run.info.get("machine"), git=run.info.get("git"), torch=torch.__version__, python=platform.python_version(),
                      dtype=str(compute.dtype)[6:], results=found)
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
